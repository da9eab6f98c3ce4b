"""The baseline of Fig. 2: python -m studies.sde_grpo --steps 100 (arcopo.py's settings).

Branches share the initial noise and differ in the solver noise, whose re-noising is a Gaussian
policy. To change only the exploration and the policy, it forks at a chunk as AR-CoPO does; the
papers of SDE-GRPO (Flow-GRPO, DanceGRPO) let whole rollouts differ. All G branches are replayed, at
the T - 1 steps that add noise.
"""

import math
import sys

import torch
from torch import Tensor

from arcopo import (
    Fork,
    Generator,
    Method,
    Noise,
    Settings,
    load_generator,
    methods,
    neighbor_noise,
    parse,
    replay,
    run,
)
from reward import UserError, command


def gaussian_log_density(x: Tensor, mean: Tensor, std: float | Tensor) -> Tensor:
    """log N(x; mean, std²), element by element; all broadcast."""
    std = torch.as_tensor(std)
    return -((x - mean) / std).square() / 2 - std.log() - math.log(2 * math.pi) / 2


class SdeGrpo(Method):
    def branch_noise(
        self, noise: Noise, pivot: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Only the solver noise differs: [P, G, *chunk_shape], [P, G, T-1, *chunk_shape]."""
        initial = neighbor_noise(noise.initial[:, pivot], 0.0, self.group)
        solver = [
            neighbor_noise(step, 1.0, self.group, generator)
            for step in noise.solver[:, pivot].unbind(1)
        ]
        return initial.transpose(0, 1), torch.stack(solver, 2).transpose(0, 1)

    def log_policies(self, model: Generator, branches: Fork, anchors: Tensor) -> Tensor:
        """log N(x_s; (1-s) x̂₀^(θ), s² I) of each branch's own re-noising -> [P, T-1, 1, G]; a mean
        over elements, as in Flow-GRPO's code. `anchors` is not used: every branch is replayed."""
        noisy = branches._replace(states=branches.states[:, :-1])
        replayed = replay(model, noisy, torch.arange(self.group))  # [P, T-1, G, *chunk_shape]
        s = torch.tensor(model.timesteps[1:], device=replayed.device).view(-1, 1, 1, 1, 1, 1)
        density = gaussian_log_density(branches.states[:, 1:], (1 - s) * replayed, s)
        return density.flatten(3).mean(3)[:, :, None]


def sde_grpo(settings: Settings) -> SdeGrpo:
    return SdeGrpo(**vars(methods(settings)["on-policy"]))


def main(arguments: list | None = None) -> int:
    def call() -> int:
        settings = parse(arguments, __doc__.split("\n\n")[0])
        if settings.method or settings.sample or settings.buffer:
            raise UserError("--method, --sample and --buffer: not used by this study")
        if not load_generator(settings.base, timesteps=settings.timesteps).solver_steps:
            raise UserError(
                "--base, --timesteps: this sampler adds no noise that SDE-GRPO could "
                "explore; choose a consistency model with two or more times"
            )
        return run(settings, {"sde-grpo": sde_grpo(settings)})

    return command("sde_grpo", call)


if __name__ == "__main__":
    sys.exit(main())
