"""The generator before alignment: python -m studies.base --base assets/base.safetensors

Writes base.csv, a row for each subject and measure. Subject "clips": what is wrong with the clips
of held-out prompts (the command's --judge-samples of each), and the AUC with which TA tells the
right clips from the wrong ones. Subject "pivot p": groups of branches of each held-out prompt that
differ in the initial noise of chunk p.
"""

import sys
from dataclasses import replace
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from arcopo import (Settings, branch_noise, command, draw_noise, fork, load, sample_batches, seeded,
                    write_csv)
from reward import BACKGROUND, HELD_OUT_PROMPTS, JUDGE_PROMPTS, judge

USED = set("out base timesteps seed device clip sigma group judge_prompts judge_samples".split())
ATTRIBUTES = "colour", "shape", "direction"


def auc(right: Tensor, wrong: Tensor) -> float:
    """Probability that a value of `right` is above one of `wrong`; NaN if either is empty."""
    return (right[:, None] > wrong).float().mean().item()


def correlation(x: Tensor, y: Tensor) -> float:
    """Between branches of a group, [P, G] each, pooled over groups."""
    x, y = (z - z.mean(1, keepdim=True) for z in (x.double(), y.double()))
    return ((x * y).sum() / (x.square().sum() * y.square().sum()).sqrt()).item()


def brightness(clips: Tensor) -> Tensor:
    """Mean over frames of the 24 brightest pixels: [N, F, 3, H, W] -> [N]."""
    signal = (clips.cpu() - BACKGROUND[:, None, None]).amax(2).flatten(2)
    return signal.topk(24).values.mean((1, 2))


def errors(model, reward, settings: Settings) -> dict[str, float]:
    """Of clips of the judging's prompts: shares, scores of the right clips, and AUC of TA."""
    prompts = [p for p in JUDGE_PROMPTS[settings.judge_prompts]
               for _ in range(settings.judge_samples)]
    clips = sample_batches(model, prompts, seeded(settings.seed, "judging"), settings.micro)
    scores = {name: x.cpu() for name, x in judge(clips, prompts).items()}
    ta, right = reward(clips, prompts)["ta"].cpu(), scores["all_right"] == 1
    count = sum(scores[name] for name in ATTRIBUTES)        # of right attributes
    empty = count == 0
    found = {"all right": right.float().mean().item(), "empty": empty.float().mean().item()}
    for name in ATTRIBUTES:
        wrong = (scores[name] == 0) & ~empty
        found[f"wrong {name}"] = wrong.float().mean().item()
        found[f"AUC of TA, {name}"] = auc(ta[right], ta[wrong & (count == 2)])      # alone
    for name in ("visual", "motion_quality"):
        found[f"{name} of right clips"] = scores[name][right].mean().item()
    return found


def groups(model, reward, settings: Settings, pivot: int) -> dict[str, float]:
    """Of groups that fork at the pivot."""
    P, G, rng = len(HELD_OUT_PROMPTS), settings.group, seeded(settings.seed, "study", pivot)
    noise = draw_noise(model, P, rng)
    own = branch_noise(noise, pivot, settings.sigma, G, rng)
    clips = fork(model, HELD_OUT_PROMPTS, pivot, noise, *own)[1].flatten(0, 1)
    prompts = [prompt for prompt in HELD_OUT_PROMPTS for _ in range(G)]
    values = reward(clips, prompts) | judge(clips, prompts) | {"light": brightness(clips)}
    values = {name: x.view(P, G).cpu() for name, x in values.items()}
    matching = values["colour"] * values["shape"]
    mixed = (matching.amin(1) == 0) & (matching.amax(1) == 1)
    found = {"groups with right and wrong colour or shape": mixed.float().mean().item()}
    found["deviation of ta"] = values["ta"].std(1, correction=0).mean().item()
    for one, other in (("vq", "light"), ("area", "light")):
        found[f"{one} and {other}"] = correlation(values[one], values[other])
    return found


def study(settings: Settings) -> int:
    folder = Path(settings.out)
    model, reward, _ = load(replace(settings, reward="ta=1,vq=1"))
    folder.mkdir(parents=True, exist_ok=True)
    found = {"clips": errors(model, reward, settings)}
    for pivot in tqdm(range(model.chunks), "base", unit="pivot"):
        found[f"pivot {pivot + 1}"] = groups(model, reward, settings, pivot)
    rows = [{"subject": subject, "measure": measure, "value": value}
            for subject, values in found.items() for measure, value in values.items()]
    write_csv(folder / "base.csv", rows)
    for row in rows:
        print(f"{row['subject']:<9}{row['measure']:<45}{row['value']:>9.4f}")
    print(f"wrote {folder}/base.csv")
    return 0


def main(arguments: list | None = None) -> int:
    return command(study, arguments, only=USED, description=__doc__)


if __name__ == "__main__":
    sys.exit(main())
