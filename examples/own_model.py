"""The smallest generator that fulfils the contract, aligned with a reward of five lines:

    python examples/own_model.py

It generates 1-D signals of 64 samples, in 4 chunks of 16. It has no cache of keys and values: the
context is the last chunk. Its weights are random; the reward asks for samples near 1.
"""

import sys
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from arcopo import Adapter, Method, draw_noise, iterate, sample, seeded


class Context(NamedTuple):
    last: Tensor                                    # [N, 16]: the chunk before

    def repeat(self, times: int) -> "Context":
        return Context(self.last.repeat_interleave(times, 0))


class Signals(nn.Module):
    timesteps, flow = (1.0, 0.1), False
    chunk_shape, chunks = (16,), 4

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(33, 64), nn.GELU(), nn.Linear(64, 16))

    @property
    def device(self) -> torch.device:
        return self.layers[0].weight.device

    def begin(self, prompts: list[str]) -> Context:
        return Context(torch.zeros(len(prompts), 16, device=self.device))

    def predict(self, x_t: Tensor, t: float | Tensor, context: Context) -> Tensor:
        t = torch.as_tensor(t, device=self.device).expand(len(x_t))[:, None]
        return (1 - t) * x_t + t * self.layers(torch.cat([x_t, context.last, t], 1))

    def extend(self, context: Context, x0: Tensor) -> Context:
        return Context(x0)

    @staticmethod
    def decode(latents: Tensor) -> Tensor:
        return latents.flatten(1)                   # [N, 64]


def near_one(signals: Tensor, prompts: list[str]) -> dict[str, Tensor]:
    """Minus the mean squared distance from 1."""
    return {"reward": -(signals - 1).square().mean(1)}


def main(steps: int = 150, lr: float = 3e-3) -> tuple[float, float]:
    """Prints and returns the mean reward before and after, on noise that was not trained on."""
    torch.manual_seed(0)
    model, prompts = Signals().requires_grad_(False), ["a signal"] * 8
    method = Method(prompts=4, floor=1e-3, tau=0.01)
    adapter = Adapter.new(model, 4, 4.0, seeded(0, "adapter"))
    optimizer = torch.optim.AdamW(adapter.parameters(), lr, weight_decay=0)
    noise = draw_noise(model, 500, seeded(0, "judging"))
    judge = lambda: near_one(sample(model, ["a signal"] * 500, noise), [])["reward"].mean().item()
    before = judge()
    for step in range(1, steps + 1):
        row = iterate(model, adapter, optimizer, method, prompts, near_one, seeded(0, step))
        if step % 30 == 0:
            print(f"iteration {step:3}  reward {row['reward']:.4f}")
    with adapter.on(model):
        after = judge()
    print(f"held-out reward {before:.4f} -> {after:.4f}")
    return before, after


if __name__ == "__main__":
    main()
