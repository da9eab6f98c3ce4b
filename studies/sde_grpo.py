"""The baseline of Fig. 2: python -m studies.sde_grpo --steps 60

SDE-GRPO: branches share the initial noise and differ in the solver noise, whose re-noising is a
Gaussian policy. To change only the exploration and the policy, it forks at a chunk as AR-CoPO does;
the papers of SDE-GRPO (Flow-GRPO, DanceGRPO) let whole rollouts differ. All G branches are
replayed, at the T - 1 steps that add noise; arcopo.py --anchors 12 replays as many rows per step.
"""

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from arcopo import (Adapter, Fork, Generator, Method, Noise, Settings, average_, average_rows,
                    clipped_objective, command, draw_noise, fork, group_advantages, judge_model,
                    judged_rows, load_generator, neighbor_noise, option, replay, reward_metrics,
                    score_branches, start, train, write_report)
from reward import TRAIN_PROMPTS, UserError

USED = set("""group updates prompts clip_range floor steps lr rank alpha out resume base timesteps
           seed device reward clip judge_prompts judge_samples judge_every""".split())


@dataclass
class SdeSettings(Settings):
    anchors: int = option(1, "without effect: all branches are replayed")
    lr: float = option(2e-4, "learning rate of AdamW")
    clip_range: float = option(1.2e-5, "ε of the ratio clip; inf: none")


def branch_noise(noise: Noise, pivot: int, group: int,
                 rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """As arcopo.branch_noise, but the initial noise is shared and the solver noise redrawn."""
    initial = noise.initial[:, pivot, None].expand(-1, group, *noise.initial.shape[2:])
    return initial, neighbor_noise(noise.solver[:, pivot], 1.0, group, rng).transpose(0, 1)


def log_densities(model: Generator, branches: Fork, x0: Tensor) -> Tensor:
    """log N(x_t; (1-t) x̂₀, t² I) of each branch's own re-noising, a mean over elements as in
    Flow-GRPO's code. x0 [P, T - 1, G, *chunk_shape] -> [P, T - 1, G]."""
    t = torch.tensor(model.timesteps[1:], device=x0.device).view(-1, 1, 1)
    z = (branches.states[:, 1:].flatten(3) - (1 - t) * x0.flatten(3)) / t
    return (-z.square() / 2 - t.log() - math.log(2 * math.pi) / 2).mean(-1)


def update(model: Generator, adapter: Adapter, optimizer: torch.optim.Optimizer, branches: Fork,
           rewards: Tensor, method: Method) -> dict[str, Tensor]:
    """As arcopo.update on-policy, with the Gaussian policy in place of the contrastive one."""
    T, G = len(model.timesteps), method.group
    every = torch.cartesian_prod(torch.arange(T - 1), torch.arange(G)).to(model.device)
    advantages = group_advantages(rewards, floor=method.floor)[:, None]

    def log_policy() -> Tensor:
        x0 = replay(model, branches, every[:, 0], every[:, 1])
        return log_densities(model, branches, x0.unflatten(1, (T - 1, G)))

    with adapter.on(model):
        old = log_policy().detach()
    norms, ratios = [], []
    for _ in range(method.updates):
        optimizer.zero_grad()
        with adapter.on(model):
            log_ratio = log_policy() - old
            (-clipped_objective(log_ratio, advantages, method.clip_range)).backward()
        norms.append(nn.utils.get_total_norm([average_(p.grad) for p in adapter.parameters()]))
        ratios.append(log_ratio.detach().exp())
        if torch.isfinite(norms[-1]):
            optimizer.step()
    rollouts = log_densities(model, branches, branches.candidates[:, :-1])
    clipped = (ratios[-1] - 1) * advantages.sign() > method.clip_range
    norms = torch.stack(norms)
    return {"replay_error": (old - rollouts).abs().mean(), "ratio_first": ratios[0].mean(),
            "clip_fraction": clipped.float().mean(), "grad_norm": norms.mean(),
            "skipped": (~norms.isfinite()).float().mean()}


def iterate(model: Generator, adapter: Adapter, optimizer: torch.optim.Optimizer, method: Method,
            prompts: list[str], reward: Callable, rng: torch.Generator) -> dict[str, float]:
    """As arcopo.explore and arcopo.iterate, but for the branches' noise and the update."""
    chosen = [prompts[i] for i in torch.randperm(len(prompts), generator=rng)[:method.prompts]]
    pivot = int(torch.randint(model.chunks, (), generator=rng))
    noise = draw_noise(model, len(chosen), rng)
    initial, solver = branch_noise(noise, pivot, method.group, rng)
    with torch.no_grad(), adapter.on(model):
        branches, clips = fork(model, chosen, pivot, noise, initial, solver)
        scores = score_branches(branches, clips, reward)
    row = reward_metrics(scores, method.floor)
    row |= update(model, adapter, optimizer, branches, scores["reward"], method)
    return average_rows([row])


def run(settings: SdeSettings) -> None:
    """As arcopo.run."""
    began = time.perf_counter()
    sampler = load_generator(settings.base, timesteps=settings.timesteps)
    if sampler.flow or len(sampler.timesteps) < 2:
        raise UserError("--base, --timesteps: this sampler adds no noise that SDE-GRPO could "
                        "explore; choose a consistency model with two or more times")
    folder, model, reward, _ = start(settings)
    iteration = partial(iterate, method=settings, prompts=TRAIN_PROMPTS, reward=reward)
    adapter = train("sde-grpo", model, settings, settings.lr, iteration, reward, folder)
    clips, scores = {}, {}
    for name, of in {"base": None, "sde-grpo": adapter}.items():
        clips[name], scores[name] = judge_model(of, model, reward, settings,
                                                settings.judge_samples, "judging")
    write_report(folder, settings, clips, judged_rows(scores), time.perf_counter() - began)


def main(arguments: list | None = None) -> int:
    return command(run, arguments, cls=SdeSettings, only=USED, description=__doc__)


if __name__ == "__main__":
    sys.exit(main())
