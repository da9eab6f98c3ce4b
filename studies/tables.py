"""The tables of README.md and EVIDENCE.md, from the CSVs here: python -m studies.tables

Writes each table or number between its two comments, <!-- NAME --> and <!-- end -->. --check only
compares. ± is the standard deviation over seeds; Δ is the change from the base of the same seed.
"""

import re
import sys
import textwrap
from functools import partial
from statistics import mean, stdev

from arcopo import Parser
from reward import UserError
from studies.claims import RUNS
from studies.common import HERE, program, read

FILES = HERE.parent / "README.md", HERE / "EVIDENCE.md"
DIGITS = {"judge": 3, "ta": 3, "area": 0}           # others: 2
TITLES = {"ta": "TA", "all_right": "all right"}
PIVOTS = "1", "2", "3", "4"


def rows_of(file: str, **wanted: str) -> list[dict]:
    """Raises UserError if there are none."""
    found = [row for row in read(HERE / file) if all(row[k] == v for k, v in wanted.items())]
    if not found:
        raise UserError(f"{HERE / file}: no rows with {wanted}; run python -m studies.claims")
    return found


def values(rows: list[dict], column: str) -> list[float]:
    return [float(row[column]) for row in rows]


def changes(rows: list[dict], base: list[dict], column: str) -> list[float]:
    """From the base of the same seed."""
    start = {row["seed"]: float(row[column]) for row in base}
    return [float(row[column]) - start[row["seed"]] for row in rows]


def spread(values: list[float], digits: int, sign: str = "") -> str:
    """Mean ± standard deviation; a single value alone."""
    text = f"{mean(values):{sign}.{digits}f}"
    return text + (f"±{stdev(values):.{digits}f}" if len(values) > 1 else "")


def markdown(cells: dict[str, dict[str, str]], corner: str = "") -> str:
    """{label: {title: text}} -> a Markdown table with aligned columns; what is missing is empty."""
    titles = list(dict.fromkeys(title for row in cells.values() for title in row))
    rows = [[corner, *titles]]
    for label, row in cells.items():
        rows.append([label, *(row.get(title, "") for title in titles)])
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows)


# ------------------------------------------------------------------ tables of results.csv

def scores(columns: str, models: dict[str, tuple[str, str]]) -> str:
    """{label: (run, model)} -> a table. A column "Δ NAME" has changes from the run's base."""
    table = {}
    for label, (run, model) in models.items():
        rows = rows_of("results.csv", run=run, model=model)
        base = rows_of("results.csv", run=run, model="base")
        row = table[label] = {}
        for column in columns.split(", "):
            name = column.removeprefix("Δ ")
            delta = name != column
            numbers = changes(rows, base, name) if delta else values(rows, name)
            title = column.replace(name, TITLES.get(name, name))
            row[title] = spread(numbers, DIGITS.get(name, 2), "+" if delta else "")
        if model != "base":
            for name in ("mended", "spoiled"):
                row[name] = spread([100 * value for value in values(rows, name)], 0)    # percent
    return markdown(table)


BASES = {"base": ("recipe", "base"), "base, higher times": ("AR-CoPO, higher times", "base"),
         "teacher": ("flow matching", "base"),
         "right captions": ("right captions", "base")}
README = {"base": "base", "semi": "semi", "merged, s = 0.4": "s = 0.4",
          "merged, s = 0.8": "s = 0.8", "merged, s = 1": "s = 1", "on-policy": "on-policy",
          "on-policy x 0.8": "on-policy x 0.8"}
RECIPE = ("base", "semi", "s = 0.4", "s = 1", "s = 2", "on-policy x 0.4", "on-policy",
          "on-policy x 2")
BASELINE = {"AR-CoPO": ("AR-CoPO", "on-policy"),
            "SDE-GRPO": ("SDE-GRPO", "sde-grpo"),
            "AR-CoPO, higher times": ("AR-CoPO, higher times", "on-policy"),
            "SDE-GRPO, higher times": ("SDE-GRPO, higher times", "sde-grpo")}
SEMI = ("semi, 25 times the rate", "semi, 25 times the rate, ε 1e-6", "off-policy",
        "off-policy, 25 times the rate")
TEXT_ALONE = {"semi": ("recipe", "semi")} | {name: (name, "semi") for name in SEMI} | {
    "on-policy": ("TA alone", "on-policy"),
    "on-policy, 4 times the rate": ("TA alone, 4 times the rate", "on-policy")}
OTHERS = {name: (name, "on-policy") for name in ("flow matching", "right captions")}
SETTINGS = {f"`{run.name}`" if run.name else "the defaults": (run.name, "on-policy")
            for run in RUNS if run.claims == "settings"}


def headline() -> str:
    """One sentence of result, of merged at s = 1."""
    rows, base = (rows_of("results.csv", run="recipe", model=m) for m in ("s = 1", "base"))
    wrong = 1 - mean(values(base, "all_right"))
    mended, spoiled = (mean(values(rows, name)) for name in ("mended", "spoiled"))
    return (f"Of this base's clips {wrong:.0%} are wrong. The recipe mends {mended:.0%} of them "
            f"and spoils\n{spoiled:.0%} of the right ones; an independent judge rises by "
            f"{spread(changes(rows, base, 'judge'), 3)} (five seeds).")


# ------------------------------------------------------------------ tables of the other CSVs

def errors() -> str:
    """The base's clips, in a sentence."""
    found = []
    for measure in dict.fromkeys(row["measure"] for row in rows_of("base.csv", subject="clips")):
        rows = rows_of("base.csv", subject="clips", measure=measure)
        found.append(f"{measure.replace('_', ' ')} {spread(values(rows, 'value'), 2)}")
    return textwrap.fill("; ".join(found), 98)


def pivots() -> str:
    """The base's groups of branches."""
    table = {}
    for label, measure in (
            ("right and wrong colour or shape", "groups with right and wrong colour or shape"),
            ("deviation of TA", "deviation of ta"), ("area and light", "area and light"),
            ("MQ and light", "mq and light")):
        rows = {p: rows_of("base.csv", subject=f"pivot {p}", measure=measure) for p in PIVOTS}
        table[label] = {f"pivot {p}": spread(values(rows[p], "value"), 2) for p in PIVOTS}
    return markdown(table)


def entropy() -> str:
    """C1: deviation of the pivot chunk by the initial noise, over that by the first solver noise,
    which counts most."""
    table = {}
    for command in [run.command for run in RUNS if run.name == "entropy"]:
        row = table[command.partition("--timesteps ")[2] or "1,0.1,0.05,0.02 (shipped)"] = {}
        for p in PIVOTS:
            rows = rows_of("entropy.csv", command=command, pivot=p)
            initial = values([r for r in rows if r["source"] == "initial noise"], "deviation")
            solver = values([r for r in rows if r["source"] == "solver noise 1"], "deviation")
            row[f"pivot {p}"] = spread([a / b for a, b in zip(initial, solver)], 1)
    return markdown(table, "sampler times")


def cost() -> str:
    """C8: ratios of seconds by device and P, and of what counting gives; means over pivots."""
    rollouts, everything = "independent rollouts", "update, all anchors and chunks"
    ratios = {
        "fork / independent rollouts": (["fork"], [rollouts]),
        "update of the pivot / of all chunks, branches": (["update"], [everything]),
        "fork and update / those of whole sequences": (["fork", "update"], [rollouts, everything]),
        "update, 4 anchors / all 12": (["update"], ["update, all anchors"]),
        "SDE-GRPO: fork and update / AR-CoPO's, all 12":
            (["fork", "SDE-GRPO, update"], ["fork", "update, all anchors"])}
    runs = {}                                               # {column: {seed: {part: rows}}}
    for row in rows_of("cost.csv"):
        part = re.sub(r" \d$", "", row["part"])             # without the pivot
        device = row["device"].removeprefix("NVIDIA ").removesuffix(" cores")
        seeds = runs.setdefault(f"{device}, P={row['prompts']}", {})
        seeds.setdefault(row["seed"], {}).setdefault(part, []).append(row)
    table = {}
    total = lambda run, parts, column: sum(mean(values(run[part], column)) for part in parts)
    for label, (above, below) in ratios.items():
        row = table[label] = {}
        for title, seeds in runs.items():
            measured, counted = ([total(run, above, column) / total(run, below, column)
                                  for run in seeds.values()] for column in ("seconds", "counted"))
            row[title] = spread(measured, 2)
        row["counted"] = f"{counted[0]:.2f}"                # the same for all
    return markdown(table, "ratio")


def durations() -> str:
    """What the commands of the README take."""
    table = {}
    for row in rows_of("durations.csv"):
        digits = 0 if row["unit"] == "MB" else 1
        text = f"{float(row['value']):,.{digits}f} {row['unit']}"
        table.setdefault(row["what"], {})[row["device"]] = text
    return markdown(table)


# ------------------------------------------------------------------ the files

TABLES = {
    "headline": headline,
    "readme": partial(scores, "reward, judge, all_right, area",
                      {label: ("recipe", model) for label, model in README.items()}),
    "recipe": partial(scores, "reward, ta, judge, all_right",
                      {model: ("recipe", model) for model in RECIPE}),
    "bases": partial(scores, "all_right, colour, shape, direction, visual", BASES),
    "baseline": partial(scores, "Δ reward, Δ judge, Δ all_right, Δ area", BASELINE),
    "text_alone": partial(scores, "Δ ta, Δ judge, Δ area", TEXT_ALONE),
    "others": partial(scores, "Δ reward, Δ judge, Δ all_right, Δ area", OTHERS),
    "settings": partial(scores, "Δ reward, Δ judge, Δ area", SETTINGS),
    "errors": errors, "pivots": pivots, "entropy": entropy, "cost": cost, "durations": durations}


def filled(text: str) -> str:
    """The text of a file with new tables and numbers."""
    def new(match: re.Match) -> str:
        return f"<!-- {match[1]} -->{match[2]}{TABLES[match[1]]()}{match[2]}<!-- end -->"
    return re.sub(r"<!-- (\w+) -->(\n?).*?<!-- end -->", new, text, flags=re.DOTALL)


def study(args) -> None:
    for file in FILES:
        before = file.read_text(encoding="utf-8")
        after = filled(before)
        if args.check and after != before:
            raise UserError(f"{file}: its tables are not those of the CSVs; run python -m "
                            "studies.tables")
        if after != before:
            file.write_text(after, encoding="utf-8")


def main(arguments: list | None = None) -> int:
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    return program(study, parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
