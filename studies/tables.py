"""The tables of README.md and EVIDENCE.md, from the CSVs here: python -m studies.tables

Writes each table or number between its two comments, <!-- NAME --> and <!-- end -->. --check only
compares. ± is the standard deviation over seeds; Δ is the change from the base of the same seed.
"""

import re
import sys
from pathlib import Path
from statistics import mean, stdev

from arcopo import Parser, exit_code
from reward import UserError
from studies.claims import RUNS, read

HERE = Path(__file__).resolve().parent
FILES = HERE.parent / "README.md", HERE / "EVIDENCE.md"
DIGITS = {"reward": 2, "judge": 3, "ta": 3, "all_right": 2, "area": 0}
TITLES = {"ta": "TA", "all_right": "all right"}


def markdown(rows: list[list[str]]) -> str:
    """A Markdown table with aligned columns; the first row is the header."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows = [rows[0], ["-" * width for width in widths], *rows[1:]]
    return "\n".join("| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows)


def spread(values: list[float], digits: int, sign: str = "") -> str:
    """Mean ± standard deviation; a single value alone."""
    text = f"{mean(values):{sign}.{digits}f}"
    return text + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")


def percent(values: list[float]) -> str:
    return spread([100 * value for value in values], 0)


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


def trained(labels: dict[str, tuple], columns: tuple) -> str:
    """{label: (run, model)} -> a table of changes, a row for each."""
    table = [["", *(f"Δ {TITLES.get(c, c)}" for c in columns), "mended", "spoiled"]]
    for label, (run, model) in labels.items():
        rows = rows_of("results.csv", run=run, model=model)
        base = rows_of("results.csv", run=run, model="base")
        cells = [spread(changes(rows, base, c), DIGITS[c], "+") for c in columns]
        cells += [percent(values(rows, c)) for c in ("mended", "spoiled")]
        table.append([label, *cells])
    return markdown(table)


SHOWN = {"base": "base", "semi": "semi-on-policy (s = 0)", "s = 0.4": "merged, s = 0.4",
         "s = 0.8": "merged, s = 0.8", "s = 1": "merged, s = 1", "on-policy": "on-policy",
         "on-policy x 0.8": "on-policy x 0.8"}


def table_of(models: dict[str, str], columns: tuple) -> str:
    """{model of the recipe: label} -> a table of scores."""
    table = [["", *(TITLES.get(c, c) for c in columns), "mended", "spoiled"]]
    for model, label in models.items():
        rows = rows_of("results.csv", run="recipe", model=model)
        cells = [spread(values(rows, c), DIGITS[c]) for c in columns]
        cells += [percent(values(rows, c)) if model != "base" else ""
                  for c in ("mended", "spoiled")]
        table.append([label, *cells])
    return markdown(table)


def readme() -> str:
    """The main table."""
    return table_of(SHOWN, ("reward", "judge", "all_right", "area"))


def headline() -> str:
    """One sentence of result, of merged at s = 1."""
    rows, base = (rows_of("results.csv", run="recipe", model=m) for m in ("s = 1", "base"))
    wrong = 1 - mean(values(base, "all_right"))
    mended, spoiled = (mean(values(rows, name)) for name in ("mended", "spoiled"))
    return (f"Of this base's clips {wrong:.0%} are wrong. The recipe mends {mended:.0%} of them "
            f"and spoils\n{spoiled:.0%} of the right ones; an independent judge rises by "
            f"{spread(changes(rows, base, 'judge'), 3)} (five seeds).")


def recipe() -> str:
    """C3 and C6: Tables 1 and 3 of the paper, and the control."""
    models = ("base", "semi", "s = 0.4", "s = 1", "s = 2", "on-policy x 0.4", "on-policy",
              "on-policy x 2")
    return table_of({m: m for m in models}, ("reward", "ta", "judge", "all_right"))


def bases() -> str:
    """The generators before alignment: shares of clips in percent, quality of the right ones."""
    shares = {"right": "all right", "empty": "empty", "colour": "wrong colour",
              "shape": "wrong shape", "direction": "wrong direction"}
    scores = {"visual": "visual of right clips", "motion": "motion_quality of right clips"}
    table = [["", *shares, *scores]]
    for command in [run.command for run in RUNS if run.name == "base"]:
        label = command.rpartition("/")[2].partition(".")[0] if "--base" in command else "base"
        found = lambda measure, command=command: values(
            rows_of("base.csv", command=command, subject="clips", measure=measure), "value")
        table.append([label.replace("-", " "), *(percent(found(m)) for m in shares.values()),
                      *(spread(found(m), 2) for m in scores.values())])
    return markdown(table)


def pivots() -> str:
    """The base's groups of branches."""
    table = [["", *(f"pivot {p}" for p in range(1, 5))]]
    for measure, label in (("groups with right and wrong colour or shape",
                            "groups with right and wrong clips"),
                           ("deviation of ta", "deviation of TA"),
                           ("area and light", "area and light")):
        rows = [rows_of("base.csv", command="python -m studies.base --seed S", measure=measure,
                        subject=f"pivot {p}") for p in range(1, 5)]
        table.append([label, *(spread(values(r, "value"), 2) for r in rows)])
    return markdown(table)


def auc() -> str:
    """Of TA, right clips of the base over clips with one attribute wrong."""
    found = []
    for name in ("colour", "shape", "direction"):
        rows = rows_of("base.csv", command="python -m studies.base --seed S",
                       measure=f"AUC of TA, {name}")
        found.append(f"{spread(values(rows, 'value'), 2)} ({name})")
    return ", ".join(found)


def entropy() -> str:
    """C1: deviation of the pivot chunk by the initial noise, over that by the first solver noise,
    which counts most."""
    table = [["sampler times", *(f"pivot {p}" for p in range(1, 5))]]
    for line in dict.fromkeys(row["command"] for row in rows_of("entropy.csv")):
        cells = []
        for p in range(1, 5):
            initial, solver = (values(rows_of("entropy.csv", command=line, pivot=str(p),
                                              source=source), "deviation")
                               for source in ("initial noise", "solver noise 1"))
            cells.append(spread([a / b for a, b in zip(initial, solver)], 1))
        table.append([line.partition("--timesteps ")[2] or "1,0.1,0.05,0.02 (shipped)", *cells])
    return markdown(table)


def baseline() -> str:
    """C2."""
    names = [(f"{method}{times}", model) for times in ("", ", distilled times")
             for method, model in (("AR-CoPO", "on-policy"), ("SDE-GRPO", "sde-grpo"))]
    return trained({run.replace(" times", ""): (run, model) for run, model in names},
                   ("reward", "judge", "all_right", "area"))


TEXT_ALONE = {name: (name, "semi") for name in (
    "semi", "semi, 25 times the rate", "semi, 25 times the rate, ε 1e-6", "off-policy",
    "off-policy, 25 times the rate")}
TEXT_ALONE |= {"on-policy": ("TA alone", "on-policy"),
               "on-policy, 4 times the rate": ("TA alone, 4 times the rate", "on-policy")}


def text_alone() -> str:
    """C4, C5."""
    return trained(TEXT_ALONE, ("ta", "judge", "area"))


def others() -> str:
    """C7."""
    return trained({name: (name, "on-policy") for name in ("flow matching", "right captions")},
                   ("reward", "judge", "all_right", "area"))


def cost() -> str:
    """C8: ratios of seconds, and of what counting predicts."""
    runs = {}
    for row in rows_of("cost.csv"):
        runs.setdefault(row["seed"], {})[row["part"]] = row
    fork, update = ([f"{part} {p}" for p in range(1, 5)] for part in ("fork", "update"))
    pairs = {
        "fork, mean over pivots / independent rollouts": (fork, ["independent rollouts"] * 4),
        "update of the pivot / of all branches and chunks":
            (update, ["update, all anchors and chunks"] * 4),
        "cached rollouts / uncached": (["independent rollouts"], ["uncached rollouts"]),
        "update, 4 anchors / all 12": (update, ["update, all anchors"] * 4),
        "SDE-GRPO's update / AR-CoPO's": (["SDE-GRPO, update"] * 4, update)}
    table = [["ratio", "measured", "counted"]]
    for label, (above, below) in pairs.items():
        total = lambda run, parts, name: sum(float(run[part][name]) for part in parts)
        measured, counted = ([total(run, above, name) / total(run, below, name)
                              for run in runs.values()] for name in ("seconds", "counted"))
        table.append([label, spread(measured, 2), f"{counted[0]:.2f}"])
    return markdown(table)


def settings() -> str:
    """One setting changed at a time."""
    names = [run.name for run in RUNS if run.claims == "settings"]
    return trained({f"`{name}`" if name else "the defaults": (name, "on-policy")
                    for name in names}, ("reward", "judge", "area"))


def durations() -> str:
    """What the commands of the README take."""
    rows = rows_of("durations.csv")
    devices = list(dict.fromkeys(row["device"] for row in rows))
    table = [["", *devices]]
    for what in dict.fromkeys(row["what"] for row in rows):
        cells = dict.fromkeys(devices, "")
        for row in rows:
            if row["what"] == what:
                digits = 0 if row["unit"] == "MB" else 1
                cells[row["device"]] = f"{float(row['value']):,.{digits}f} {row['unit']}"
        table.append([what, *cells.values()])
    return markdown(table)


TABLES = {f.__name__: f for f in (
    readme, headline, recipe, bases, pivots, auc, entropy, baseline, text_alone, others,
    cost, settings, durations)}


def filled(text: str) -> str:
    """The text of a file with new tables and numbers."""
    def new(match: re.Match) -> str:
        if match[1] not in TABLES:
            raise UserError(f"<!-- {match[1]} -->: expected one of {', '.join(TABLES)}")
        return f"<!-- {match[1]} -->{match[2]}{TABLES[match[1]]()}{match[2]}<!-- end -->"
    return re.sub(r"<!-- (\w+) -->(\n?).*?<!-- end -->", new, text, flags=re.DOTALL)


def main(arguments: list | None = None) -> int:
    try:
        parser = Parser(description=__doc__.split("\n\n")[0])
        parser.add_argument("--check", action="store_true", help="compare, write nothing")
        check = parser.parse_args(arguments and [str(a) for a in arguments]).check
        for file in FILES:
            before = file.read_text(encoding="utf-8")
            after = filled(before)
            if check and after != before:
                raise UserError(f"{file}: its tables are not those of the CSVs; run python -m "
                                "studies.tables")
            if after != before:
                file.write_text(after, encoding="utf-8")
        return 0
    except BaseException as error:
        return exit_code(error)


if __name__ == "__main__":
    sys.exit(main())
