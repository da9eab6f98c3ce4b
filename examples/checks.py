"""Properties of the method that hold for any generator behind the contract.

Branches are equal before the pivot, the gradient of a replay equals finite differences, replay and
rollout agree, and a few iterations raise a toy reward. `decode` must keep the chunks apart: each
value of a clip belongs to one chunk.
"""

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from arcopo import (Adapter, Method, branch_noise, draw_noise, fork, iterate, replay, sample,
                    seeded, surrogate_log_policy)


def check(model: nn.Module, prompts: list[str], iterations: int = 15) -> None:
    """Prints, and raises AssertionError if a property does not hold."""
    level = lambda clips, prompts: {"reward": clips.flatten(1).mean(1)}
    method = Method(group=4, anchors=2, prompts=2, micro=2, floor=1e-6)
    noise = draw_noise(model, 2, seeded(0))
    own = branch_noise(noise, 1, method.sigma, method.group, seeded(1))
    branches, clips = fork(model, prompts[:2], 1, noise, *own)
    clips = clips.unflatten(2, (model.chunks, -1))
    before, at = ((clips[:, :, p] - clips[:, :1, p]).abs().max().item() for p in (0, 1))
    print(f"branches differ before the pivot by {before}, at it by {at:.3f}")
    assert before == 0 < at
    adapter = Adapter.new(model, 4, 4.0, seeded(0))
    for p in adapter.parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=seeded(2)).to(p)
    A, h = adapter.parameters()[0], 1e-2
    step, anchor = torch.tensor([1]), torch.tensor([2])

    def value() -> Tensor:
        x = replay(model, branches, step, anchor).flatten(2)
        candidates = branches.candidates[:, step].flatten(3)
        return surrogate_log_policy(candidates, x, method.tau)[..., 0].sum()

    with adapter.on(model):
        gradient = torch.autograd.grad(value(), A)[0]
        A.data += h * gradient / gradient.norm()
        above = value().item()
        A.data -= 2 * h * gradient / gradient.norm()
        difference = (above - value().item()) / (2 * h)
    print(f"gradient {gradient.norm():.5f}, finite difference {difference:.5f}")
    assert abs(gradient.norm() - difference) < 0.05 * gradient.norm()
    adapter, noise = Adapter.new(model, 4, 4.0, seeded(0)), draw_noise(model, 2, seeded(3))
    optimizer = torch.optim.AdamW(adapter.parameters(), 1e-2, weight_decay=0)
    rewards = [sample(model, prompts[:2], noise).mean().item()]
    for step in range(iterations):
        row = iterate(model, adapter, optimizer, method, prompts, level, seeded(0, step))
        assert row["replay_error"] < 1e-3 and row["skipped"] == 0
    with adapter.on(model):
        rewards.append(sample(model, prompts[:2], noise).mean().item())
    print(f"replay error {row['replay_error']:.0e}; reward {rewards[0]:.4f} -> {rewards[1]:.4f}")
    assert rewards[1] > rewards[0]
