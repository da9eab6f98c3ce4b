"""The pictures of README.md and EVIDENCE.md: python -m studies.figures

Plots are made from the CSVs here: lines are means over seeds, bands one standard deviation. With
--run FOLDER, also what needs a model: fork.png from the base, and clips.gif from the run's merged/.
Needs matplotlib.
"""

import sys
from pathlib import Path
from statistics import mean, stdev

try:
    import matplotlib
except ModuleNotFoundError:
    print("figures: matplotlib is missing; pip install matplotlib", file=sys.stderr)
    sys.exit(2)
matplotlib.use("Agg")
import imageio.v3 as iio
import matplotlib.pyplot as plt
import numpy as np
import torch

from arcopo import (Adapter, Parser, Settings, branch_noise, draw_noise, exit_code, fork,
                    group_advantages, load, load_generator, sample, seeded)
from reward import HELD_OUT_PROMPTS, judge
from studies.claims import read

HERE = Path(__file__).resolve().parent
TITLES = {"reward": "reward", "judge": "judge", "area": "area of the shape, px²",
          "all_right": "share of clips all right", "ta": "TA", "direction": "direction right"}
COLOURS = {"on-policy": "tab:red", "semi": "tab:blue", "merged": "tab:purple",
           "on-policy, scaled": "tab:red", "base": "grey", "semi, 25 times the rate": "tab:cyan",
           "off-policy, 25 times the rate": "tab:orange",
           "on-policy, 4 times the rate": "tab:brown"}
SIZE = {"font.size": 13, "axes.titlesize": 14, "legend.fontsize": 12}


def rows_of(name: str, **wanted: str) -> list[dict]:
    return [row for row in read(HERE / name) if all(row[k] == v for k, v in wanted.items())]


def band(axes, rows: list[dict], x: str, y: str, label: str, line: str = "-") -> None:
    """Mean and standard deviation of y over the rows with the same x."""
    places = sorted({float(row[x]) for row in rows})
    found = [[float(row[y]) for row in rows if float(row[x]) == place] for place in places]
    middle = np.array([mean(v) for v in found])
    width = np.array([stdev(v) if len(v) > 1 else 0 for v in found])
    axes.plot(places, middle, line, marker="o", markersize=4, label=label, color=COLOURS[label])
    axes.fill_between(places, middle - width, middle + width, alpha=0.15, linewidth=0,
                      color=COLOURS[label])


def curves():
    """The recipe's trainings."""
    figure, plots = plt.subplots(1, 4, figsize=(16, 4))
    for axes, column in zip(plots, ("reward", "judge", "all_right", "area")):
        for training in ("on-policy", "semi"):
            band(axes, rows_of("curves.csv", run="recipe", training=training), "step", column,
                 training)
        axes.set(title=TITLES[column], xlabel="iteration")
    plots[0].legend()
    return figure


def tradeoff():
    """C6: merged models and the scaled on-policy adapter, by s."""
    figure, plots = plt.subplots(1, 4, figsize=(16, 4))
    rows = rows_of("results.csv", run="recipe")
    merged = [row | {"s": row["model"].partition("= ")[2] or "0"} for row in rows
              if row["model"] == "semi" or row["model"].startswith("s = ")]
    scaled = [row | {"s": row["model"].partition(" x ")[2] or "1"} for row in rows
              if row["model"].startswith("on-policy")]
    scaled += [row | {"s": "0"} for row in rows if row["model"] == "base"]
    for axes, column in zip(plots, ("reward", "judge", "all_right", "area")):
        band(axes, merged, "s", column, "merged")
        band(axes, scaled, "s", column, "on-policy, scaled", "--")
        base = mean(float(row[column]) for row in rows if row["model"] == "base")
        axes.axhline(base, color=COLOURS["base"], linestyle=":", label="base")
        axes.axvline(1, color="black", linewidth=0.8, linestyle="--", label="largest s of Sec. 4.4")
        axes.set(title=TITLES[column], xlabel="strength s")
    plots[0].legend()
    return figure


def ta():
    """C4 and C5: trainings on TA alone."""
    figure, plots = plt.subplots(1, 4, figsize=(16, 4))
    lines = {"on-policy": ("TA alone", "on-policy"),
             "on-policy, 4 times the rate": ("TA alone, 4 times the rate", "on-policy"),
             "semi": ("semi", "semi"),
             "semi, 25 times the rate": ("semi, 25 times the rate", "semi"),
             "off-policy, 25 times the rate": ("off-policy, 25 times the rate", "off-policy")}
    for label, (run, training) in lines.items():
        rows = rows_of("curves.csv", run=run, training=training)
        for axes, column in zip(plots, ("ta", "judge", "all_right")):
            band(axes, rows, "step", column, label)
            axes.set(title=TITLES[column], xlabel="iteration")
        steps = sorted({int(row["step"]) for row in rows})
        points = [[mean(float(row[c]) for row in rows if int(row["step"]) == step)
                   for step in steps] for c in ("ta", "judge")]
        plots[3].plot(*points, marker="o", markersize=4, color=COLOURS[label])
    plots[3].set(title="along training", xlabel="TA", ylabel="judge")
    plots[0].legend()
    return figure


def image(frame: torch.Tensor) -> np.ndarray:
    """[3, H, W] in [0, 1] -> what imshow takes."""
    return frame.permute(1, 2, 0).clamp(0, 1).numpy()


def fork_picture():
    """A group of the base: the first held-out prompt whose branches at pivot 1 are of both kinds,
    right and wrong, seed 0."""
    settings = Settings(device="cpu")
    model, reward, _ = load(settings)
    for prompt in HELD_OUT_PROMPTS:
        noise, rng = draw_noise(model, 1, seeded(0, "figure")), seeded(0, "figure branches")
        own = branch_noise(noise, 0, settings.sigma, settings.group, rng)
        clips = fork(model, [prompt], 0, noise, *own)[1][0]
        right = judge(clips, [prompt] * len(clips))["all_right"]
        if 0 < right.mean() < 1:
            break
    scores = reward(clips, [prompt] * len(clips))["reward"]
    advantages = group_advantages(scores, floor=settings.floor)
    order = scores.argsort(descending=True)
    figure, plots = plt.subplots(2, len(clips), figsize=(16, 3.6))
    for column, i in enumerate(order):
        for axes, frame, name in ((plots[0, column], 2, "pivot\nchunk"), (plots[1, column], 11,
                                                                         "end of\nthe clip")):
            axes.imshow(image(clips[i, frame]))
            axes.set_xticks([])
            axes.set_yticks([])
            if column == 0:
                axes.set_ylabel(name)
        plots[0, column].set_title(f"r {scores[i]:+.2f}\nA {advantages[i]:+.2f}",
                                   color="tab:green" if advantages[i] > 0 else "tab:red")
    figure.suptitle(f"“{prompt}”: one initial noise, {len(clips)} neighbours; all other noise is "
                    "shared. Sorted by reward r; A is the advantage")
    return figure


def moving_picture(run: Path, file: Path) -> None:
    """The base above the run's merged model: the first eight held-out prompts, the same noise."""
    model, prompts = load_generator(), HELD_OUT_PROMPTS[:8]
    noise = draw_noise(model, len(prompts), seeded(0, "figure"))
    clips = {"base": sample(model, prompts, noise)}
    with torch.no_grad(), Adapter.load(run / "merged", model).on(model):
        clips["aligned"] = sample(model, prompts, noise)
    frames = []
    for i in range(clips["base"].shape[1]):
        figure, plots = plt.subplots(2, len(prompts), figsize=(8.3, 2.7), dpi=100)
        for row, (name, own) in enumerate(clips.items()):
            for column, prompt in enumerate(prompts):
                axes = plots[row, column]
                axes.imshow(image(own[column, i]))
                axes.set_xticks([])
                axes.set_yticks([])
                if column == 0:
                    axes.set_ylabel(name, fontsize=13)
                if row == 1:
                    colour, shape, *motion = prompt.removeprefix("a ").split()
                    axes.set_xlabel(f"{colour}\n{shape}\n{' '.join(motion)}", fontsize=11)
        figure.subplots_adjust(0.04, 0.25, 0.995, 0.995, 0.04, 0.04)
        figure.canvas.draw()
        frames.append(np.asarray(figure.canvas.buffer_rgba())[..., :3].copy())
        plt.close(figure)
    iio.imwrite(file, np.stack(frames), extension=".gif", duration=150, loop=0)


PLOTS = {"curves.png": curves, "tradeoff.png": tradeoff, "ta.png": ta}


def save(figure, file: Path) -> None:
    figure.tight_layout()
    figure.savefig(file, dpi=80, metadata={"Software": None})
    plt.close(figure)
    print(f"wrote {file}")


def main(arguments: list | None = None) -> int:
    try:
        parser = Parser(description=__doc__.split("\n\n")[0])
        parser.add_argument("--out", default=str(HERE.parent / "assets"), help="folder [assets]")
        parser.add_argument("--run", help="a run of the recipe; draws fork.png and clips.gif too")
        args = parser.parse_args(arguments and [str(a) for a in arguments])
        out = Path(args.out)
        out.mkdir(parents=True, exist_ok=True)
        with plt.rc_context(SIZE):
            for name, draw in PLOTS.items():
                save(draw(), out / name)
            if args.run:
                save(fork_picture(), out / "fork.png")
        if args.run:
            moving_picture(Path(args.run), out / "clips.gif")
            print(f"wrote {out / 'clips.gif'}")
        return 0
    except BaseException as error:
        return exit_code(error)


if __name__ == "__main__":
    sys.exit(main())
