"""What an iteration costs (C8): python -m studies.cost

Times each part, the median of rounds side by side in one run, next to the predictions of a chunk by
a row that counting gives (a gradient counts as two more). Writes cost.csv: seconds, count, device.
Run it with nothing else running.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch
from tqdm import tqdm

from arcopo import (Adapter, Generator, Settings, branch_noise, command, draw_noise, fork, load,
                    rollout, seeded, update, write_csv)
from reward import TRAIN_PROMPTS, UserError
from studies import sde_grpo

USED = set("""group sigma anchors updates prompts clip_range tau floor lr rank alpha out base
           timesteps seed device reward clip""".split())
ROUNDS = 3


def timed(call: Callable) -> float:
    """Seconds of a call."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    began = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - began


class Iteration:
    """The parts of an iteration, each a call without arguments, by name."""

    def __init__(self, model: Generator, reward: Callable, settings: Settings):
        self.model, self.settings, self.reward = model, settings, reward
        self.adapter = Adapter.new(model, settings.rank, settings.alpha, seeded(0, "adapter"))
        self.optimizer = torch.optim.AdamW(self.adapter.parameters(), settings.lr, weight_decay=0)
        self.prompts = TRAIN_PROMPTS[: settings.prompts]
        self.repeated = [prompt for prompt in self.prompts for _ in range(settings.group)]
        self.rewards = torch.randn(settings.prompts, settings.group, generator=seeded(0))
        self.rewards = self.rewards.to(model.device)
        self.noise = draw_noise(model, settings.prompts, seeded(settings.seed, "noise"))
        self.forks = {}

    @torch.no_grad()
    def fork(self, pivot: int) -> None:
        own = branch_noise(self.noise, pivot, self.settings.sigma, self.settings.group, seeded(1))
        with self.adapter.on(self.model):
            self.forks[pivot] = fork(self.model, self.prompts, pivot, self.noise, *own)

    def score(self) -> None:
        self.reward(self.forks[0][1].flatten(0, 1).clone(), self.repeated)

    def update(self, pivot: int, **changes) -> None:
        update(self.model, self.adapter, self.optimizer, self.forks[pivot][0], self.rewards,
               replace(self.settings, **changes), seeded(2))

    def sde_update(self) -> None:
        sde_grpo.update(self.model, self.adapter, self.optimizer, self.forks[0][0], self.rewards,
                        self.settings)

    @torch.no_grad()
    def independent(self) -> None:
        """G rollouts of each prompt that share nothing."""
        with self.adapter.on(self.model):
            rollout(self.model, self.model.begin(self.repeated),
                    self.noise.repeat(self.settings.group), 0, self.model.chunks)

    @torch.no_grad()
    def uncached(self) -> None:
        """As independent, but each prediction runs over all chunks before it again."""
        noise = self.noise.initial.repeat_interleave(self.settings.group, 0)
        with self.adapter.on(self.model):
            for p in range(self.model.chunks):
                for t in self.model.timesteps:
                    context = self.model.begin(self.repeated)
                    for q in range(p):
                        context = self.model.extend(context, noise[:, q])
                    self.model.predict(noise[:, p], t, context)

    def parts(self) -> dict[str, tuple[Callable, float]]:
        """{name: (what runs it, counted predictions)}; a part may use those before it."""
        T, L, m = len(self.model.timesteps), self.model.chunks, self.settings
        P, G, passes = m.prompts, m.group, 1 + 3 * m.updates                    # π_old first
        chunks = lambda first, last: (last - first) * (T + 1) - (last == L)     # no extend after L
        found = {}
        for p in range(L):
            prefix = P * chunks(0, p) if p else 0
            found[f"fork {p + 1}"] = lambda p=p: self.fork(p), prefix + P * G * chunks(p, L)
            found[f"update {p + 1}"] = lambda p=p: self.update(p), passes * P * m.anchors * T
        found["reward"] = self.score, 0
        found["independent rollouts"] = self.independent, P * G * chunks(0, L)
        found["uncached rollouts"] = self.uncached, P * G * T * L * (L + 1) / 2
        found["update, all anchors"] = lambda: self.update(0, anchors=G), passes * P * G * T
        found["update, all anchors and chunks"] = (
            lambda: [self.update(p, anchors=G) for p in range(L)], passes * P * G * T * L)
        found["SDE-GRPO, update"] = self.sde_update, passes * P * G * (T - 1)
        return found


def study(settings: Settings) -> int:
    folder = Path(settings.out)
    model, reward, _ = load(settings)
    if model.flow or len(model.timesteps) < 2:
        raise UserError("--base, --timesteps: SDE-GRPO needs a sampler that adds noise")
    folder.mkdir(parents=True, exist_ok=True)
    parts = Iteration(model, reward, settings).parts()
    seconds = {name: [] for name in parts}
    for step in tqdm(range(ROUNDS + 1), "cost", unit="round"):
        for name, (call, _) in parts.items():
            took = timed(call)
            if step > 0:                                    # the first round is a warm-up
                seconds[name].append(took)
    rows = [{"part": name, "seconds": median(seconds[name]), "counted": counted}
            for name, (_, counted) in parts.items()]
    if model.device.type == "cuda":
        device = torch.cuda.get_device_name(model.device)
    else:
        device = f"CPU, {torch.get_num_threads()} threads"
    write_csv(folder / "cost.csv", [row | {"prompts": settings.prompts, "device": device}
                                    for row in rows])
    for row in rows:
        print(f"{row['part']:<42}{row['seconds']:>9.4f} s{row['counted']:>9.0f}")
    print(f"wrote {folder}/cost.csv")
    return 0


def main(arguments: list | None = None) -> int:
    return command(study, arguments, only=USED, description=__doc__)


if __name__ == "__main__":
    sys.exit(main())
