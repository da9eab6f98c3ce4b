"""The pictures of README.md and EVIDENCE.md: python -m studies.figures

Plots are made from the CSVs here: lines are means over seeds, bands one standard deviation. With
--run FOLDER, also what needs a model: fork.png from the base, and clips.gif from the run's merged/.
Needs matplotlib.
"""

import sys
from pathlib import Path
from statistics import mean, stdev

import imageio.v3 as iio
import matplotlib.pyplot as plt
import numpy as np
import torch

from arcopo import (Adapter, Parser, Settings, branch_noise, choose_strength, draw_noise, fork,
                    group_advantages, load, load_generator, sample, seeded)
from reward import HELD_OUT_PROMPTS, judge
from studies.common import HERE, program
from studies.tables import TEXT_ALONE, changes, rows_of

TITLES = {"reward": "reward, standard deviations", "judge": "judge", "ta": "TA",
          "all_right": "share of clips all right", "area": "area of the shape, px²",
          "displacement": "displacement in a clip, px",
          "spread": "spread of a prompt's clips, px"}
COLOURS = {"on-policy": "tab:red", "semi": "tab:blue", "merged": "tab:purple",
           "on-policy, scaled": "tab:red", "semi, 25 times the rate": "tab:cyan",
           "off-policy, 25 times the rate": "tab:orange",
           "on-policy, 4 times the rate": "tab:brown"}
COLUMNS = "reward", "judge", "all_right", "area"


def changes_by(x: str, rows: list[dict], base: list[dict], column: str) -> dict:
    """{place on the x axis: changes of a score from the base of the same seed}."""
    places = sorted({float(row[x]) for row in rows})
    return {place: changes([row for row in rows if float(row[x]) == place], base, column)
            for place in places}


def band(axes, points: dict[float, list[float]], label: str, line: str = "-") -> None:
    """Mean and standard deviation."""
    middle = np.array([mean(v) for v in points.values()])
    width = np.array([stdev(v) if len(v) > 1 else 0 for v in points.values()])
    axes.plot(list(points), middle, line, marker="o", markersize=4, label=label,
              color=COLOURS[label])
    axes.fill_between(list(points), middle - width, middle + width, alpha=0.15, linewidth=0,
                      color=COLOURS[label])
    axes.axhline(0, color="grey", linestyle=":", linewidth=1)


def along(run: str, training: str, column: str) -> dict[float, list[float]]:
    """Changes of a score since iteration 0."""
    rows = rows_of("curves.csv", run=run, training=training)
    return changes_by("step", rows, [row for row in rows if row["step"] == "0"], column)


def curves():
    """The recipe's trainings; in the second row what would show a collapse."""
    figure, plots = plt.subplots(2, 3, figsize=(16, 8), layout="constrained")
    for axes, column in zip(plots.flat, (*COLUMNS, "displacement", "spread")):
        for training in ("on-policy", "semi"):
            band(axes, along("recipe", training, column), training)
        axes.set(title=f"Δ {TITLES[column]}", xlabel="iteration")
    figure.legend(*plots[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def tradeoff():
    """C6: merged models and the scaled on-policy adapter, by s, of each recipe."""
    columns = "reward", "judge", "all_right"
    recipes = {"recipe": "on-policy on TA and MQ",
               "recipe, 200 iterations": "the same, 200 iterations",
               "recipe, on-policy without TA": "on-policy on VQ and MQ"}
    figure, plots = plt.subplots(3, 4, figsize=(16, 11.4), layout="constrained")
    for row, (run, label) in zip(plots, recipes.items()):
        rows = rows_of("results.csv", run=run)
        base = [r for r in rows if r["model"] == "base"]
        merged = [r | {"s": r["model"].partition("= ")[2] or "0"} for r in rows
                  if r["model"] == "semi" or r["model"].startswith("s = ")]
        scaled = [r | {"s": r["model"].partition(" x ")[2] or "1"} for r in rows
                  if r["model"].startswith("on-policy")] + [r | {"s": "0"} for r in base]
        for models, name, line in (scaled, "on-policy, scaled", "--"), (merged, "merged", "-"):
            points = {column: changes_by("s", models, base, column) for column in columns}
            for axes, column in zip(row, columns):
                band(axes, points[column], name, line)
                axes.set(title=f"Δ {TITLES[column]}", xlabel="strength s")
            row[3].plot(*([mean(v) for v in points[c].values()] for c in ("reward", "all_right")),
                        line, marker="o", markersize=4, color=COLOURS[name])
        both = {s: (mean(points["reward"][s]), mean(points["judge"][s])) for s in points["judge"]}
        for axes in row[:3]:                            # points: of the merged models, the last
            axes.axvline(choose_strength(both, (0, 0)), color="black", linewidth=1.5, linestyle=":",
                         label="s by the rule of Sec. 4.4")
        row[3].set(title="Δ all right against Δ reward", xlabel="Δ reward")
        row[0].set_ylabel(label)
    figure.legend(*plots[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def ta():
    """C4 and C5: trainings on TA alone."""
    figure, plots = plt.subplots(1, 4, figsize=(16, 4.4), layout="constrained")
    limits = {"ta": (-0.12, 0.12), "judge": (-0.1, 0.08), "all_right": (-0.3, 0.15)}
    for label in ("on-policy", "on-policy, 4 times the rate", "semi", "semi, 25 times the rate",
                  "off-policy, 25 times the rate"):
        points = {column: along(*TEXT_ALONE[label], column) for column in limits}
        for axes, column in zip(plots, limits):
            band(axes, points[column], label)
            axes.set(title=f"Δ {TITLES[column]}", xlabel="iteration", ylim=limits[column])
        plots[3].plot(*([mean(v) for v in points[c].values()] for c in ("ta", "judge")),
                      marker="o", markersize=4, color=COLOURS[label])
    plots[3].set(title="Δ judge against Δ TA, from (0, 0)", xlabel="Δ TA", ylabel="Δ judge",
                 xlim=(-0.04, 0.1), ylim=(-0.04, 0.06))
    figure.legend(*plots[0].get_legend_handles_labels(), loc="outside lower center", ncols=5,
                  title="a line that leaves its panel has collapsed")
    return figure


def show(axes, frame: torch.Tensor, right: bool | None = None, size: int = 18) -> None:
    """A frame [3, H, W] in [0, 1]; with `right` given, a tick or a cross on it."""
    axes.imshow(frame.permute(1, 2, 0).clamp(0, 1).numpy())
    axes.set(xticks=[], yticks=[])
    if right is not None:
        axes.text(1, 5, "✓" if right else "✗", color="white", fontsize=size)


def fork_picture():
    """At pivot 2, of the base's groups of each held-out prompt, seed 0, the one whose rewards have
    the largest deviation."""
    settings = Settings(device="cpu")
    model, reward, _ = load(settings)
    P, G = len(HELD_OUT_PROMPTS), settings.group
    noise, rng = draw_noise(model, P, seeded(0, "figure")), seeded(0, "figure branches")
    own = branch_noise(noise, 1, settings.sigma, G, rng)
    clips = fork(model, HELD_OUT_PROMPTS, 1, noise, *own)[1]
    prompts = [prompt for prompt in HELD_OUT_PROMPTS for _ in range(G)]
    scores = reward(clips.flatten(0, 1), prompts)["reward"].view(P, G)
    group = int(scores.std(1).argmax())
    prompt, clips, scores = HELD_OUT_PROMPTS[group], clips[group], scores[group]
    right = judge(clips, [prompt] * G)["all_right"]
    advantages = group_advantages(scores, floor=settings.floor)
    order = scores.argsort(descending=True)
    figure, plots = plt.subplots(2, 1 + G, figsize=(16, 3.4), layout="constrained")
    show(plots[0, 0], clips[0, 2])
    plots[0, 0].set(title="one\nprefix")
    plots[1, 0].axis("off")
    for column, i in enumerate(order, 1):
        show(plots[0, column], clips[i, 5])
        show(plots[1, column], clips[i, 11], right[i])
        plots[0, column].set_title(f"r {scores[i]:+.2f}\nA {advantages[i]:+.2f}")
    plots[0, 1].set_ylabel("pivot\nchunk")
    plots[1, 1].set_ylabel("end of\nthe clip")
    figure.suptitle(f"“{prompt}”: one initial noise, {G} neighbours; all other noise is "
                    "shared. Sorted by reward r; A: advantage; tick: all right")
    return figure


def moving_picture(run: Path, file: Path) -> None:
    """The base above the run's merged model, on the same noise: of each held-out prompt the first
    clip that the base gets wrong, if there is one; the first eight of them. A tick: all right."""
    model, prompts = load_generator(), [p for p in HELD_OUT_PROMPTS for _ in range(8)]
    noise = draw_noise(model, len(prompts), seeded(0, "figure"))
    clips = {"base": sample(model, prompts, noise)}
    with torch.no_grad(), Adapter.load(run / "merged", model).on(model):
        clips["aligned"] = sample(model, prompts, noise)
    right = {name: judge(own, prompts)["all_right"] for name, own in clips.items()}
    first = {prompts[i]: i for i in reversed(range(len(prompts))) if not right["base"][i]}
    chosen, frames = sorted(first.values())[:8], []
    for f in range(clips["base"].shape[1]):
        figure, plots = plt.subplots(2, len(chosen), figsize=(8.3, 2.6), dpi=100)
        for row, (name, own) in zip(plots, clips.items()):
            for axes, i in zip(row, chosen):
                show(axes, own[i, f], right[name][i], size=11)
            row[0].set_ylabel(name, fontsize=13)
        for axes, i in zip(plots[1], chosen):
            colour, shape, *motion = prompts[i].removeprefix("a ").split()
            axes.set_xlabel(f"{colour} {shape}\n{' '.join(motion)}", fontsize=9.5)
        figure.subplots_adjust(0.04, 0.17, 0.995, 0.995, 0.04, 0.04)
        figure.canvas.draw()
        frames.append(np.asarray(figure.canvas.buffer_rgba())[..., :3].copy())
        plt.close(figure)
    iio.imwrite(file, np.stack(frames), extension=".gif", duration=150, loop=0)


def study(args) -> None:
    plt.switch_backend("agg")           # needs no display
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    pictures = {"curves": curves, "tradeoff": tradeoff, "ta": ta}
    if args.run:
        pictures["fork"] = fork_picture
        moving_picture(Path(args.run), out / "clips.gif")
    with plt.rc_context({"font.size": 13, "axes.titlesize": 14, "legend.fontsize": 11}):
        for name, draw in pictures.items():
            draw().savefig(out / f"{name}.png", dpi=80, metadata={"Software": None})
    print(f"wrote {out}")


def main(arguments: list | None = None) -> int:
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", default=str(HERE.parent / "assets"), help="folder [assets]")
    parser.add_argument("--run", help="a run of the recipe; draws fork.png and clips.gif too")
    return program(study, parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
