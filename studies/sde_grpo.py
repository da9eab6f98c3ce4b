"""The baseline of Fig. 2: python -m studies.sde_grpo --steps 100 (arcopo.py's settings, and below).

Branches share the initial noise and differ in the solver noise, whose re-noising is a Gaussian
policy. To change only the exploration and the policy, it forks at a chunk as AR-CoPO does; the
papers of SDE-GRPO (Flow-GRPO, DanceGRPO) let whole rollouts differ. All G branches are replayed, at
the T - 1 steps that add noise; --policy contrastive is AR-CoPO with as many replayed branches.
"""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import arcopo
from arcopo import (SECTIONS, Fork, Generator, Method, Noise, Settings, load_generator,
                    neighbor_noise, replay, seeded)
from reward import UserError, check_unused, command, open_run, option, parse_options


LR, CLIP_RANGE = 5e-4, 1.2e-5


@dataclass
class SdeSettings(Settings):
    policy: str = option("gaussian", "gaussian (SDE-GRPO) or contrastive (AR-CoPO, all G anchors)",
                         "gaussian | contrastive")
    sde_lr: float = option(LR, "learning rate of SDE-GRPO", "(0, 1e6]")
    sde_clip_range: float = option(CLIP_RANGE, "ε of SDE-GRPO", "(0, inf]")
    reward_noise: float = option(0.0, "deviation of Gaussian noise added to each training reward",
                                 "[0, 1e6]")

    def __post_init__(self):
        unused = "method sample buffer buffer_groups buffer_lr buffer_reward sweep"
        contrastive = self.policy == "contrastive"
        unused += " sde_lr sde_clip_range" if contrastive else " sigma tau lr clip_range"
        check_unused(self, unused.split(), f"--policy {self.policy}")
        if self.anchors not in (Settings.anchors, self.group):
            raise UserError(f"--anchors {self.anchors}: this study replays all branches")
        self.anchors = self.anchors if self.resume else self.group
        super().__post_init__()


def gaussian_log_density(x: Tensor, mean: Tensor, std: float | Tensor) -> Tensor:
    """log N(x; mean, std²), element by element; all broadcast."""
    std = torch.as_tensor(std)
    return -((x - mean) / std).square() / 2 - std.log() - math.log(2 * math.pi) / 2


class SdeGrpo(Method):
    def branch_noise(self, noise: Noise, pivot: int,
                     rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Only the solver noise differs: [P, G, *chunk_shape], [P, G, T-1, *chunk_shape]."""
        initial = neighbor_noise(noise.initial[:, pivot], 0.0, self.group)
        solver = neighbor_noise(noise.solver[:, pivot], 1.0, self.group, rng)
        return initial.transpose(0, 1), solver.transpose(0, 1)

    def draw_pairs(self, T: int, rng: torch.Generator) -> Tensor:
        """The T - 1 steps that add noise; log_policies replays every branch there."""
        return torch.cartesian_prod(torch.arange(T - 1), torch.tensor([0]))

    def log_policies(self, model: Generator, branches: Fork, step: Tensor, anchor: Tensor,
                     predict: Callable = replay) -> Tensor:
        """log N(x_t; (1-t) x̂₀^(θ), t² I) of each branch's own re-noising -> [P, K, G]; a mean over
        elements, as in Flow-GRPO's code. `anchor` is not used."""
        G = self.group
        every = torch.cartesian_prod(step, torch.arange(G, device=step.device)).T
        mean = predict(model, branches, *every).unflatten(1, (-1, G)).flatten(3)     # [P, K, G, D]
        t = torch.tensor(model.timesteps, device=mean.device)[step + 1].view(-1, 1, 1)
        reached = branches.states[:, step + 1].flatten(3)
        return gaussian_log_density(reached, (1 - t) * mean, t).mean(-1)


def sde_grpo(settings: Settings, lr: float = LR, clip_range: float = CLIP_RANGE) -> SdeGrpo:
    plain = vars(arcopo.methods(settings)["on-policy"])
    return SdeGrpo(**plain | {"lr": lr, "clip_range": clip_range})


def noisy(reward: Callable, deviation: float, seed: int) -> Callable:
    """The reward with Gaussian noise on each clip's total, the same for the same clips."""

    def call(clips: Tensor, prompts: list[str]) -> dict[str, Tensor]:
        scores = reward(clips, prompts)
        generator = seeded(seed, "reward noise", scores["reward"].sum().item())
        noise = torch.randn(len(clips), generator=generator).to(scores["reward"])
        return scores | {"reward": scores["reward"] + deviation * noise}

    return call


def main(arguments: list | None = None) -> int:
    def call() -> int:
        given = parse_options(
            SdeSettings, SECTIONS | {"policy": "SDE-GRPO"}, arguments, __doc__.split("\n\n")[0]
        )
        settings, _ = open_run(given)  # with --resume, those of the run
        if not load_generator(settings.base, timesteps=settings.timesteps).solver_steps:
            raise UserError(
                "--base, --timesteps: this sampler adds no noise that SDE-GRPO could "
                "explore; choose a consistency model with two or more times"
            )
        own = {"sde-grpo": sde_grpo(settings, settings.sde_lr, settings.sde_clip_range)}
        if settings.policy == "contrastive":
            own = {"on-policy": arcopo.methods(settings)["on-policy"]}
        wrap = lambda reward: noisy(reward, settings.reward_noise, settings.seed)
        return arcopo.run(given, own, wrap)

    return command("sde_grpo", call)


if __name__ == "__main__":
    sys.exit(main())
