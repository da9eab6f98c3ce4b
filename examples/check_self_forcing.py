"""Self-Forcing's own code with tiny random weights, on the CPU: called by self_forcing.py --check.

The sampler equals Self-Forcing's own loop on the same noise, in float32 and bfloat16, and the
properties of checks.py hold. It writes nothing.
"""

import contextlib
import sys
import types
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from arcopo import Adapter, Noise, draw_noise, sample, seeded
from examples.checks import check
from examples.self_forcing import SelfForcing


class Text(nn.Module):
    """In place of T5: random embeddings, the same for the same prompt."""
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(32))

    def forward(self, text_prompts: list[str]) -> dict:
        texts = [torch.randn(5, 32, generator=seeded(0, prompt)) for prompt in text_prompts]
        return {"prompt_embeds": torch.stack(texts).to(self.weight)}


class Vae(nn.Module):
    """In place of the VAE: three of the latent's channels are the pixels."""
    def decode_to_pixel(self, latents: Tensor, use_cache: bool = False) -> Tensor:
        return latents[:, :, :3].float()


def tiny(repository: Path):
    """Self-Forcing's own wrapper with random weights -> SelfForcing, and its pipeline class. What
    it imports but the check does not need (diffusers, T5, the VAE, flash-attention) is replaced."""
    class Stub(types.ModuleType):
        def __getattr__(self, name: str):
            if name.startswith("__"):
                raise AttributeError(name)
            return object

    for name in ("diffusers", "diffusers.configuration_utils", "diffusers.models", "einops",
                 "diffusers.models.modeling_utils", "demo_utils", "demo_utils.memory",
                 "wan", "wan.modules", "wan.modules.t5", "wan.modules.tokenizers",
                 "wan.modules.vae", "pipeline", "utils.memory"):
        sys.modules[name] = Stub(name)
        sys.modules[name].__path__ = [str(repository / name.replace(".", "/"))]
    sys.modules["diffusers.configuration_utils"].register_to_config = lambda function: function
    sys.modules["diffusers.models.modeling_utils"].ModelMixin = nn.Module
    sys.path.insert(0, str(repository))
    from pipeline.causal_inference import CausalInferencePipeline
    from utils.wan_wrapper import FlowMatchScheduler, WanDiffusionWrapper
    from wan.modules import causal_model, model

    def attention(q: Tensor, k: Tensor, v: Tensor, k_lens=None) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    causal_model.attention = model.flash_attention = attention
    torch.manual_seed(0)
    wrapper = WanDiffusionWrapper.__new__(WanDiffusionWrapper)   # __init__ loads the checkpoint
    nn.Module.__init__(wrapper)
    wrapper.model = causal_model.CausalWanModel(dim=48, ffn_dim=280, num_heads=2, num_layers=2,
                                                text_dim=32, text_len=5, freq_dim=32)
    nn.init.normal_(wrapper.model.head.head.weight, std=0.1)
    wrapper.uniform_timestep, wrapper.seq_len = False, 32760
    wrapper.scheduler = FlowMatchScheduler(shift=5.0, sigma_min=0.0, extra_one_step=True)
    wrapper.scheduler.set_timesteps(1000, training=True)
    wrapper.post_init()
    return SelfForcing(wrapper, Text(), Vae(), (3, 16, 8, 8), 4), CausalInferencePipeline


def compare(model: SelfForcing, pipeline_class: type, prompts: list[str], dtype) -> None:
    """The code's own sampling loop, with our noise in place of what it draws."""
    noise = Noise(*(x.to(dtype).float() for x in draw_noise(model, len(prompts), seeded(0))))
    config = types.SimpleNamespace(denoising_step_list=[1000, 750, 500, 250], context_noise=0,
                                   warp_denoising_step=True, num_frame_per_block=3,
                                   independent_first_frame=False,
                                   model_kwargs=types.SimpleNamespace(local_attn_size=-1))
    pipeline = pipeline_class(config, "cpu", model.wrapper, *model.outside).to(dtype)
    pipeline.num_transformer_blocks, pipeline.frame_seq_length = 2, model.tokens // 3
    shape, start = (len(prompts), model.chunks * model.tokens, 2, 24), torch.tensor([0])
    caches = lambda: [{"k": torch.zeros(shape, dtype=dtype), "v": torch.zeros(shape, dtype=dtype),
                       "global_end_index": start.clone(), "local_end_index": start.clone(),
                       "is_init": False} for _ in range(2)]
    pipeline.kv_cache1, pipeline.crossattn_cache = caches(), caches()
    pipeline._initialize_kv_cache = pipeline._initialize_crossattn_cache = lambda **_: None
    drawn, torch.randn_like = torch.randn_like, lambda x: next(own).reshape(x.shape).to(dtype)
    own = (noise.solver[:, p, i] for p in range(model.chunks)
           for i in range(len(model.timesteps) - 1))
    try:
        with contextlib.redirect_stdout(None):      # it prints every time
            theirs = pipeline.inference(noise.initial.flatten(1, 2).to(dtype), prompts)
    finally:
        torch.randn_like = drawn
    difference = (sample(model, prompts, noise) - theirs).abs().max().item()
    print(f"sampler in {dtype}: differs from its own loop by {difference}")
    assert difference < 1e-5


def saved_for_backward(model: SelfForcing) -> float:
    """Bytes that a row at the last of 7 pivots saves, per token, layer and unit of width: the
    network in bf16, LoRA of rank 2 for its width of 48 (as 64 for 1,536)."""
    net, sizes = model.wrapper.model, {}
    layers, width = len(net.blocks), net.dim
    own = {p.untyped_storage().data_ptr() for p in net.parameters()}
    chunk = torch.randn(model.chunk_shape)
    past = tuple(torch.randn(1, model.tokens, net.num_heads, width // net.num_heads).bfloat16()
                 for _ in "kv")

    def keep(x: Tensor) -> Tensor:
        sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x
    adapter = Adapter.new(model, 2, 2.0, seeded(0))
    own |= {p.untyped_storage().data_ptr() for p in adapter.parameters()}
    text = model.begin(["a cat"]).texts[0]
    with adapter.on(model), torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        kept = model.row(chunk, torch.tensor(1.0), text, ((past,) * layers,) * 6)
    assert kept[0].requires_grad
    size = sum(size for pointer, size in sizes.items() if pointer not in own)
    return size / (layers * model.tokens * width)


def main(repository: Path) -> None:
    prompts = ["a cat", "a dog", "a boat"]
    model, pipeline_class = tiny(repository)
    compare(model, pipeline_class, prompts[:1], torch.float32)
    check(model, prompts)
    compare(model, pipeline_class, prompts[:1], torch.bfloat16)
    print(f"a row saves {saved_for_backward(model):.0f} bytes per token, layer and unit of width")
