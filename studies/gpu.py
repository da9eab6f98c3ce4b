"""One short check of a GPU: python -m studies.gpu

Trains a few iterations twice (are they bit-equal?) and on the CPU (how far apart do they end?), and
times the parts of an iteration with 4, 16 and 64 prompts. On an NVIDIA H200 it takes a minute.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median

import torch

from arcopo import (Adapter, Settings, branch_noise, collect_buffer, draw_noise, exit_code, fork,
                    iterate, iterate_buffered, load, parse, seeded, update)
from reward import TRAIN_PROMPTS

USED = {"device", "base", "timesteps", "clip", "group", "anchors"}
STEPS, GROUPS, ROUNDS, PROMPTS = 5, 8, 5, (4, 16, 64)


class Training:
    """A training from its start, in steps of one."""

    def __init__(self, name: str, settings: Settings, parts: tuple):
        self.model, reward, buffer_reward = parts
        lr = settings.lr if name == "on-policy" else settings.buffer_lr
        self.adapter = Adapter.new(self.model, settings.rank, settings.alpha, seeded(0, name))
        self.optimizer = torch.optim.AdamW(self.adapter.parameters(), lr, weight_decay=0)
        own = self.model, self.adapter, self.optimizer, settings
        if name == "on-policy":
            self.step = lambda i: iterate(*own, TRAIN_PROMPTS, reward, seeded(0, "gpu", i))
        else:
            buffer = collect_buffer(self.model, settings, TRAIN_PROMPTS, buffer_reward, GROUPS, 0)
            self.step = lambda i: iterate_buffered(*own, buffer, seeded(0, "gpu", i))

    def weights(self) -> torch.Tensor:
        return torch.cat([p.detach().flatten().cpu() for p in self.adapter.parameters()])


def agreement(name: str, settings: Settings, parts: tuple, on_cpu: tuple) -> None:
    """Two trainings on the device and one on the CPU, with the same random numbers."""
    one, two = (Training(name, settings, parts) for _ in range(2))
    cpu = Training(name, settings, on_cpu)
    start, equal = cpu.weights(), True
    for i in range(STEPS):
        rows = [training.step(i) for training in (one, two, cpu)]
        timeless = [row | {"seconds": 0} for row in rows]
        equal = equal and timeless[0] == timeless[1] and torch.equal(one.weights(), two.weights())
    gap = (one.weights() - cpu.weights()).norm() / (cpu.weights() - start).norm()
    print(f"{name}: twice on the device {'bit-equal' if equal else 'DIFFERENT'}; after {STEPS} "
          f"iterations the adapter differs from the CPU's by {gap:.0e} of its change")


def milliseconds(call: Callable) -> float:
    """Median over rounds, after two that warm up."""
    took = []
    for _ in range(2 + ROUNDS):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        began = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        took.append((time.perf_counter() - began) * 1e3)
    return median(took[2:])


def timings(settings: Settings, parts: tuple, P: int) -> None:
    """The parts of an on-policy iteration with P prompts."""
    model, reward, _ = parts
    method, prompts = replace(settings, prompts=P), TRAIN_PROMPTS[:P]
    adapter = Adapter.new(model, settings.rank, settings.alpha, seeded(0))
    optimizer = torch.optim.AdamW(adapter.parameters(), 1e-6, weight_decay=0)
    noise = draw_noise(model, P, seeded(1))
    own = branch_noise(noise, 1, method.sigma, method.group, seeded(2))
    rewards = torch.randn(P, method.group, generator=seeded(3)).to(model.device)

    @torch.no_grad()
    def forked():
        with adapter.on(model):
            return fork(model, prompts, 1, noise, *own)

    branches, clips = forked()
    names = [prompt for prompt in prompts for _ in range(method.group)]
    found = {"fork": milliseconds(forked),
             "reward": milliseconds(lambda: reward(clips.flatten(0, 1), names)),
             "update": milliseconds(lambda: update(model, adapter, optimizer, branches, rewards,
                                                   method, seeded(4))),
             "iteration": milliseconds(lambda: iterate(model, adapter, optimizer, method,
                                                       TRAIN_PROMPTS, reward, seeded(5)))}
    memory = torch.cuda.max_memory_allocated() / 1e6 if torch.cuda.is_available() else 0
    print(f"{P} prompts: " + ", ".join(f"{name} {ms:.0f} ms" for name, ms in found.items())
          + f", {memory:.0f} MB")


def study(settings: Settings) -> int:
    parts = load(settings)
    on_cpu = load(replace(settings, device="cpu"), parts[1].scales)
    for name in ("on-policy", "semi"):
        agreement(name, settings, parts, on_cpu)
    for P in PROMPTS:
        timings(settings, parts, P)
    return 0


def main(arguments: list | None = None) -> int:
    try:
        return study(parse(arguments, only=USED, description=__doc__.split("\n\n")[0]))
    except BaseException as error:
        return exit_code(error)


if __name__ == "__main__":
    sys.exit(main())
