"""The world and the base before training: python -m studies.base (settings of arcopo.py)

Writes base.csv, a row for each subject and measure. The judge's scores of sharp clips of the world
and of the base's training clips, four of each prompt. At each pivot, for a group of branches of
each held-out prompt: the deviation of the reward in a group, and correlations between branches of
a group, pooled over groups.
"""

import sys
import time
from itertools import starmap
from pathlib import Path

from torch import Tensor

from arcopo import draw_noise, fork, load, methods, parse, seeded
from reward import (BACKGROUND, HELD_OUT_PROMPTS, TRAIN_PROMPTS, check_folder, check_unused,
                    command, judge, make_clips, markdown, progress, write_rows)

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


def study(settings) -> int:
    used = "out base timesteps seed device precision reward clip sigma"
    check_unused(settings, vars(settings).keys() - {*used.split()}, "this study")
    folder = Path(settings.out or time.strftime("runs/base-%Y%m%d-%H%M%S"))
    check_folder(folder, new=True)
    model, reward, _ = load(settings)
    folder.mkdir(parents=True, exist_ok=bool(settings.out))
    found, P, G = {}, len(HELD_OUT_PROMPTS), settings.group
    for name, quality in (("sharp clips", "sharp"), ("training clips", None)):
        prompts = 4 * TRAIN_PROMPTS
        scores = judge(make_clips(prompts, seeded(settings.seed, "study", name), quality), prompts)
        found[name] = {measure: scores[measure].mean().item() for measure in SCORES}
    prompts = [prompt for prompt in HELD_OUT_PROMPTS for _ in range(G)]
    for pivot in progress(range(model.chunks), "base", unit="pivot"):
        rng = seeded(settings.seed, "study", pivot)
        noise = draw_noise(model, P, rng)
        own = methods(settings)["on-policy"].branch_noise(noise, pivot, rng)
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
    write_rows(folder / "base.csv", rows)
    print(markdown([list(rows[0]), *([*map(str, row.values())] for row in rows)]))
    print(f"\nwrote {folder}/base.csv")
    return 0


def main(arguments: list | None = None) -> int:
    return command("base", lambda: study(parse(arguments, __doc__.split("\n\n")[0])))


if __name__ == "__main__":
    sys.exit(main())
