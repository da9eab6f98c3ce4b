"""Every plot of README.md and EVIDENCE.md, from the CSVs here: python -m studies.figures

Needs matplotlib. Lines are means over seeds, bands one standard deviation.
"""

import csv
import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from reward import Parser, check_folder, command, nonempty

HERE = Path(__file__).resolve().parent
TITLES = {
    "reward": "reward", "judge": "judge", "area": "shape area, px²", "ta": "TA",
    "text": "judge: text", "visual": "judge: visual", "displacement": "displacement, px"}


def read(name: str, **wanted: str) -> list[dict]:
    with open(HERE / name, newline="") as file:
        return [row for row in csv.DictReader(file) if all(row[k] == v for k, v in wanted.items())]


def band(axes, rows: list[dict], x: str, y: str, label: str) -> None:
    """Mean and standard deviation of y over the rows with the same x."""
    values = defaultdict(list)
    for row in rows:
        values[float(row[x])].append(float(row[y]))
    places = sorted(place for place in values if len(values[place]) > 1)
    middle, width = ([f(values[place]) for place in places] for f in (mean, stdev))
    axes.plot(places, middle, marker="o", markersize=3, label=label)
    axes.fill_between(places,
                      *([m + sign * w for m, w in zip(middle, width)] for sign in (-1, 1)),
                      alpha=0.2,
                      linewidth=0)


def tradeoff():
    figure, plots = plt.subplots(1, 3, figsize=(10, 3))
    rows = [
        row for row in read("results.csv", run="recipe")
        if row["model"] not in ("base", "on-policy")]
    rows = [row | {"s": row["model"].partition("= ")[2] or "0"} for row in rows]
    for axes, column in zip(plots, ("reward", "judge", "area")):
        band(axes, rows, "s", column, "merged")
        base = mean(float(row[column]) for row in read("results.csv", run="recipe", model="base"))
        axes.axhline(base, color="grey", linestyle=":", label="base")
        axes.set(xlabel="strength s", title=TITLES[column])
    plots[0].legend()
    return figure


def curves():
    figure, plots = plt.subplots(3, 2, figsize=(8, 8), sharex="col")
    settings = [("as shipped", "recipe", "sde-grpo"), ("lower times",) + ("deterministic",) * 2,
                ("lower times, noisy reward",) + ("deterministic and noisy",) * 2]
    for row, (title, ours, theirs) in zip(plots, settings):
        for axes, column in zip(row, ("reward", "judge")):
            band(axes, read("curves.csv", run=ours, training="on-policy"), "step", column,
                 "AR-CoPO")
            band(axes, read("curves.csv", run=theirs, training="sde-grpo"), "step", column,
                 "SDE-GRPO")
            axes.set(title=f"{TITLES[column]}, {title}", xlabel="iteration")
    plots[0, 0].legend()
    return figure


def ta():
    figure, plots = plt.subplots(1, 5, figsize=(15, 3))
    lines = [("on-policy, lr 4e-4", "ta, lr 4e-4", "on-policy"),
             ("semi, lr 4e-4", "ta, lr 4e-4", "semi"), ("semi, lr 5e-5", "ta", "semi"),
             ("off-policy, lr 5e-5", "ta", "off-policy")]
    for axes, column in zip(plots, ("ta", "judge", "text", "visual", "displacement")):
        for label, run, training in lines:
            band(axes, read("curves.csv", run=run, training=training), "step", column, label)
        axes.set(title=TITLES[column], xlabel="iteration")
    plots[0].legend(fontsize=7)
    return figure


def entropy():
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

    def call() -> int:
        parser = Parser(__doc__.split("\n\n")[0])
        parser.add_argument("--out",
                            type=nonempty,
                            default=str(HERE.parent / "assets"),
                            help="folder [assets]")
        out = Path(parser.parse_args(arguments and [str(a) for a in arguments]).out)
        check_folder(out)
        out.mkdir(parents=True, exist_ok=True)
        for name, draw in FIGURES.items():
            figure = draw()
            figure.tight_layout()
            figure.savefig(out / name, dpi=100, metadata={"Software": None})
            plt.close(figure)
            print(f"wrote {out / name}")
        return 0

    return command("figures", call)


if __name__ == "__main__":
    sys.exit(main())
