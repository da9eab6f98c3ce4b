"""peft's LoRA in place of arcopo.Adapter: update, iterate and iterate_buffered need of an adapter
only parameters() and on(model).

    peft.inject_adapter_in_model(peft.LoraConfig(r=16, target_modules=...), model)
    adapter = PeftAdapter(model)

works after get_peft_model and after diffusers' add_adapter too, and for DoRA. Save it with peft's
own functions. The training loop of the script makes an arcopo.Adapter, and merge_adapters joins the
A and B of arcopo.Adapter, so neither takes this one.
"""

from contextlib import contextmanager

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn


class PeftAdapter:
    def __init__(self, model: nn.Module):
        self.layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
        self.trained = [p for p in model.parameters() if p.requires_grad]   # the base is frozen
        self.switch(False)

    def switch(self, on: bool) -> None:
        for layer in self.layers:
            layer.enable_adapters(on)       # off, requires_grad is False too

    def parameters(self) -> list[Tensor]:
        return self.trained

    @contextmanager
    def on(self, model: nn.Module):
        self.switch(True)
        try:
            yield
        finally:
            self.switch(False)
