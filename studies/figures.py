"""Every plot of README.md and EVIDENCE.md, from the CSVs here: python -m studies.figures

Needs matplotlib. Lines are means over seeds, bands one standard deviation.
"""

import csv
import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev

try:
    import matplotlib
except ModuleNotFoundError:
    print("figures: matplotlib is missing; pip install matplotlib", file=sys.stderr)
    sys.exit(2)
matplotlib.use("Agg")
import matplotlib.pyplot as plt

from arcopo import Parser, exit_code
from studies.cost import by_seed, iterations

HERE = Path(__file__).resolve().parent
TITLES = {"reward": "reward", "judge": "judge", "area": "shape area, px²",
          "all_right": "all right", "ta": "TA", "text": "judge: text", "visual": "judge: visual",
          "displacement": "displacement, px"}


def read(name: str, **wanted: str) -> list[dict]:
    with open(HERE / name, newline="") as file:
        return [row for row in csv.DictReader(file) if all(row[k] == v for k, v in wanted.items())]


def means(rows: list[dict], x: str, y: str) -> dict[float, list[float]]:
    """{x: values of y}, where there are two or more."""
    values = defaultdict(list)
    for row in rows:
        values[float(row[x])].append(float(row[y]))
    return {place: values[place] for place in sorted(values) if len(values[place]) > 1}


def band(axes, rows: list[dict], x: str, y: str, label: str) -> None:
    """Mean and standard deviation of y over the rows with the same x."""
    values = means(rows, x, y)
    middle, width = ([f(v) for v in values.values()] for f in (mean, stdev))
    axes.plot(list(values), middle, marker="o", markersize=3, label=label)
    ends = ([m + sign * w for m, w in zip(middle, width)] for sign in (-1, 1))
    axes.fill_between(list(values), *ends, alpha=0.2, linewidth=0)


def tradeoff():
    """C6: merged models by strength s."""
    figure, plots = plt.subplots(1, 4, figsize=(13, 3))
    recipe = read("results.csv", run="recipe")
    merged = [row | {"s": row["model"].partition("= ")[2] or "0"} for row in recipe
              if row["model"] not in ("base", "on-policy")]
    for axes, column in zip(plots, ("reward", "judge", "all_right", "area")):
        band(axes, merged, "s", column, "merged")
        base = mean(float(row[column]) for row in recipe if row["model"] == "base")
        axes.axhline(base, color="grey", linestyle=":", label="base")
        axes.set(xlabel="strength s", title=TITLES[column])
    plots[0].legend()
    return figure


TRAININGS = {  # label: run and training in curves.csv, iteration in cost.csv
    "AR-CoPO": ("recipe", "on-policy", "AR-CoPO"),
    "AR-CoPO, 12 anchors": ("equal rows", "on-policy", "AR-CoPO, all anchors"),
    "AR-CoPO, 12 anchors, best": ("equal rows, best", "on-policy", "AR-CoPO, all anchors"),
    "SDE-GRPO": ("equal rows", "sde-grpo", "SDE-GRPO"),
    "SDE-GRPO, best": ("equal rows, best", "sde-grpo", "SDE-GRPO"),
    "semi": ("recipe", "semi", "")}


def curves():
    """C2, and reward against judge along training."""
    figure, plots = plt.subplots(1, 4, figsize=(15, 3.5))
    seconds = {name: mean(took) for name, took in iterations(by_seed(read("cost.csv")), 4).items()}
    for label, (run, training, iteration) in TRAININGS.items():
        rows = read("curves.csv", run=run, training=training)
        for axes, column in zip(plots, ("reward", "judge")):
            band(axes, rows, "step", column, label)
        points = [[mean(v) for v in means(rows, "step", column).values()]
                  for column in ("reward", "judge")]
        line = plots[2].plot(*points, marker="o", markersize=3, label=label)[0]
        if iteration:
            took = [step * seconds[iteration] for step in means(rows, "step", "reward")]
            plots[3].plot(took, points[0], marker="o", markersize=3, color=line.get_color())
    for axes, column in zip(plots, ("reward", "judge")):
        axes.set(title=TITLES[column], xlabel="iteration")
    plots[2].set(title="along training", xlabel="reward", ylabel="judge")
    plots[3].set(title="reward", xlabel="seconds of training, alone on 2 cores")
    plots[2].legend(fontsize=7, loc="lower right")
    return figure


def ta():
    """C4 and C5."""
    figure, plots = plt.subplots(2, 3, figsize=(12, 6))
    plots = plots.flatten()
    lines = [("on-policy", "ta", "on-policy"),
             ("on-policy, lr 4e-4", "ta at 4e-4", "on-policy"),
             ("semi", "ta", "semi"), ("semi, lr 4e-4", "ta at 4e-4", "semi"),
             ("off-policy, lr 4e-4", "ta at 4e-4", "off-policy")]
    columns = "ta", "judge", "text", "visual", "displacement"
    for label, run, training in lines:
        rows = read("curves.csv", run=run, training=training)
        if training == "off-policy":            # its collapse would flatten all others
            rows = [row for row in rows if float(row["step"]) <= 20]
        for axes, column in zip(plots, columns):
            band(axes, rows, "step", column, label)
        points = [[mean(v) for v in means(rows, "step", column).values()]
                  for column in ("ta", "judge")]
        if training != "off-policy":
            plots[5].plot(*points, marker="o", markersize=3)
    for axes, column in zip(plots, columns):
        axes.set(title=TITLES[column], xlabel="iteration")
    plots[5].set(title="along training", xlabel="TA", ylabel="judge")
    plots[0].legend(fontsize=7)
    return figure


def entropy():
    """C1."""
    figure, plots = plt.subplots(1, 2, figsize=(9, 3))
    rows = [row for row in read("entropy.csv") if "--timesteps" not in row["command"]]
    for axes, column, title in zip(plots, ("pivot_chunk", "reward"),
                                   ("pixels of the pivot chunk", "reward")):
        for source in dict.fromkeys(row["source"] for row in rows if row["source"] != "nothing"):
            band(axes, [row for row in rows if row["source"] == source], "pivot", column, source)
        axes.set(title=f"deviation between branches: {title}", xlabel="pivot chunk", yscale="log")
        axes.set_xticks(range(1, 5))
    plots[0].legend(fontsize=7)
    return figure


FIGURES = {"tradeoff.png": tradeoff, "curves.png": curves, "ta.png": ta, "entropy.png": entropy}


def main(arguments: list | None = None) -> int:
    try:
        parser = Parser(description=__doc__.split("\n\n")[0])
        parser.add_argument("--out", default=str(HERE.parent / "assets"), help="folder [assets]")
        out = Path(parser.parse_args(arguments and [str(a) for a in arguments]).out)
        out.mkdir(parents=True, exist_ok=True)
        for name, draw in FIGURES.items():
            figure = draw()
            figure.tight_layout()
            figure.savefig(out / name, dpi=100, metadata={"Software": None})
            plt.close(figure)
            print(f"wrote {out / name}")
        return 0
    except BaseException as error:
        return exit_code(error)


if __name__ == "__main__":
    sys.exit(main())
