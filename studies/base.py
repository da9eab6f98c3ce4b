"""The world and the base before training: python -m studies.base

Writes base.csv, a row for each subject and measure. The judge's scores of sharp clips of the world
and of the base's training clips, four of each prompt. At each pivot, for a group of branches of
each held-out prompt: the deviation of the reward in a group, and correlations between branches of
a group, pooled over groups.
"""

import sys
import time
from itertools import starmap
from pathlib import Path

import torch
from torch import Tensor

from tqdm import tqdm

from arcopo import branch_noise, draw_noise, exit_code, fork, load, parse, seeded, write_csv
from reward import BACKGROUND, HELD_OUT_PROMPTS, TRAIN_PROMPTS, judge, make_clips

USED = {"out", "base", "timesteps", "seed", "device", "reward", "clip", "sigma"}
SCORES = "all_right", "visual", "motion_quality"


def correlation(x: Tensor, y: Tensor) -> float:
    """Between branches of a group, [P, G] each, pooled over groups."""
    x, y = (z - z.mean(1, keepdim=True) for z in (x.double(), y.double()))
    return ((x * y).sum() / (x.square().sum() * y.square().sum()).sqrt()).item()


def partial_correlation(x: Tensor, y: Tensor, fixed: Tensor) -> float:
    """As correlation, with the linear effect of a third quantity removed from both."""
    xy, xz, yz = starmap(correlation, ((x, y), (x, fixed), (y, fixed)))
    return (xy - xz * yz) / ((1 - xz**2) * (1 - yz**2)) ** 0.5


def brightness(clips: Tensor) -> Tensor:
    """Of the 24 brightest pixels, the mean over frames: [..., F, 3, H, W] -> [...]."""
    signal = (clips.cpu() - BACKGROUND[:, None, None]).amax(-3).flatten(-2)
    return signal.topk(24).values.mean((-1, -2))


def random_reward(clips: Tensor, prompts: list[str]) -> Tensor:
    """For arcopo.py --reward studies.base:random_reward=1: noise, the same for the same clips."""
    return torch.randn(len(clips), generator=seeded(0, "reward", clips.sum().item()))


def study(settings) -> int:
    folder = Path(settings.out or time.strftime("runs/base-%Y%m%d-%H%M%S"))
    model, reward, _ = load(settings)
    folder.mkdir(parents=True, exist_ok=True)
    found, P, G = {}, len(HELD_OUT_PROMPTS), settings.group
    for name, quality in (("sharp clips", "sharp"), ("training clips", None)):
        prompts = 4 * TRAIN_PROMPTS
        scores = judge(make_clips(prompts, seeded(settings.seed, "study", name), quality), prompts)
        found[name] = {measure: scores[measure].mean().item() for measure in SCORES}
    prompts = [prompt for prompt in HELD_OUT_PROMPTS for _ in range(G)]
    for pivot in tqdm(range(model.chunks), "base", unit="pivot"):
        rng = seeded(settings.seed, "study", pivot)
        noise = draw_noise(model, P, rng)
        own = branch_noise(noise, pivot, settings.sigma, G, rng)
        clips = fork(model, HELD_OUT_PROMPTS, pivot, noise, *own)[1]
        flat = clips.flatten(0, 1)
        scores = {name: x.view(P, G).cpu() for name, x in reward(flat, prompts).items()}
        area, light = judge(flat, prompts)["area"].view(P, G).cpu(), brightness(clips)
        row = {"deviation": scores["reward"].std(1, correction=0).mean().item()}
        row |= {f"{name} and area": correlation(x, area) for name, x in scores.items()}
        fixed = partial_correlation(scores["reward"], area, light)
        row["reward and area, brightness fixed"] = fixed
        found[f"pivot {pivot + 1}"] = row
    rows = [{"subject": subject, "measure": measure, "value": value}
            for subject, values in found.items() for measure, value in values.items()]
    write_csv(folder / "base.csv", rows)
    for row in rows:
        print(f"{row['subject']:<16}{row['measure']:<36}{row['value']:>9.4f}")
    print(f"wrote {folder}/base.csv")
    return 0


def main(arguments: list | None = None) -> int:
    try:
        return study(parse(arguments, only=USED, description=__doc__.split("\n\n")[0]))
    except BaseException as error:
        return exit_code(error)


if __name__ == "__main__":
    sys.exit(main())
