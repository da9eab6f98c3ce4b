"""The tables of README.md and EVIDENCE.md, from the CSVs here: python -m studies.tables

Writes each table or number between its two comments, <!-- NAME --> and <!-- end -->. --check only
compares. ± is the standard deviation over seeds; a change is from the base of the same seed.
"""

import re
import sys
from pathlib import Path
from statistics import mean

from arcopo import Parser, exit_code
from reward import UserError
from studies.base import SCORES
from studies.claims import PRETRAIN, TUNING, read
from studies.cost import by_seed, markdown, report, spread
from studies.pretrain import COUNTS

HERE = Path(__file__).resolve().parent
FILES = HERE.parent / "README.md", HERE / "EVIDENCE.md"


def rows_of(file: str, **wanted: str) -> list[dict]:
    """Raises UserError if there are none."""
    found = [row for row in read(HERE / file) if all(row[k] == v for k, v in wanted.items())]
    if not found:
        raise UserError(f"{HERE / file}: no rows with {wanted}; run python -m studies.claims")
    return found


def column(rows: list[dict], name: str) -> dict[str, float]:
    """{seed: value}"""
    return {row["seed"]: float(row[name]) for row in rows}


def change(rows: list[dict], base: list[dict], name: str, digits: int = 2) -> str:
    """Mean change of a column from the base of the same seed."""
    start = column(base, name)
    return spread([value - start[seed] for seed, value in column(rows, name).items()], digits, "+")


def models(run: str) -> list[str]:
    return list(dict.fromkeys(row["model"] for row in rows_of("results.csv", run=run)))


def readme() -> str:
    """The main table."""
    shown = {"base": "base", "semi": "semi-on-policy (s = 0)", "s = 0.4": "merged, s = 0.4",
             "s = 0.6": "merged, s = 0.6", "s = 0.8": "merged, s = 0.8", "s = 1": "merged, s = 1",
             "on-policy": "on-policy"}
    table = [["", "reward", "TA", "judge", "all right", "area, px²"]]
    for model, label in shown.items():
        rows = rows_of("results.csv", run="recipe", model=model)
        table.append([label, *(spread(list(column(rows, name).values()), digits) for name, digits in
                               (("reward", 2), ("ta", 3), ("judge", 3), ("all_right", 2),
                                ("area", 0)))])
    return markdown(table)


def bases() -> str:
    """The generators before alignment."""
    table = [["", "all right", "visual", "motion quality", "judge", "area, px²"]]
    runs = {"teacher": "flow", "base": "recipe", "base, distilled times":
            "equal rows, distilled times", "second base": "second base"}
    for label, run in runs.items():
        rows = rows_of("results.csv", run=run, model="base")
        table.append([label, *(spread(list(column(rows, name).values()), digits) for name, digits in
                               (("all_right", 2), ("visual", 2), ("motion_quality", 2),
                                ("judge", 3), ("area", 0)))])
    return markdown(table)


def durations() -> str:
    """What the commands of the README take, on a CPU and on a GPU."""
    rows = [row for row in rows_of("durations.csv") if row["unit"] != "seconds a step"]
    devices = list(dict.fromkeys(row["device"] for row in rows))
    table = [["what", *devices]]
    for what in dict.fromkeys(row["what"] for row in rows):
        cells = dict.fromkeys(devices, "")
        for row in rows:
            if row["what"] == what:
                digits = 0 if row["unit"] == "MB" else 1
                cells[row["device"]] = f"{float(row['value']):,.{digits}f} {row['unit']}"
        table.append([what, *cells.values()])
    return markdown(table)


def pretraining() -> str:
    """What pre-training takes, from the seconds of a step."""
    table = [["", "steps, teacher", "steps, student", "minutes in fp32", "minutes in bf16"]]
    shipped = [COUNTS[f"{stage}_steps"][0] for stage in ("teacher", "student")]
    second = [int(n) for n in re.findall(r"-steps (\d+)", PRETRAIN)]
    for label, steps in (("base", shipped), ("second base", second)):
        seconds = [sum(n * float(rows_of("durations.csv", what=f"{stage}, {p}")[0]["value"])
                       for stage, n in zip(("teacher", "student"), steps))
                   for p in ("fp32", "bf16")]
        table.append([label, *(f"{n:,}" for n in steps), *(f"{s / 60:.0f}" for s in seconds)])
    return markdown(table)


def measured(subject: str, measure: str) -> list[float]:
    """Of studies.base, a value for each seed."""
    return list(column(rows_of("base.csv", subject=subject, measure=measure), "value").values())


def world() -> str:
    """Clips of the world under the judge's rules."""
    table = [["", *(name.replace("_", " ") for name in SCORES)]]
    for subject in ("sharp clips", "training clips"):
        table.append([subject, *(spread(measured(subject, name), 2) for name in SCORES)])
    return markdown(table)


def pivots() -> str:
    """The base's groups of branches by pivot."""
    subjects = [f"pivot {p}" for p in range(1, 5)]
    table = [["", *subjects]]
    for label, measure in (("deviation of the reward", "deviation"), ("VQ and area", "vq and area"),
                           ("TA and area", "ta and area"), ("MQ and area", "mq and area"),
                           ("reward and area", "reward and area"),
                           ("reward and area, brightness fixed",) * 2):
        table.append([label, *(spread(measured(subject, measure), 2) for subject in subjects)])
    return markdown(table)


def area() -> str:
    """Which reward changes the area."""
    names = {"TA, VQ and MQ": ("factors", "on-policy"),
             "VQ alone": ("area, VQ alone", "on-policy"),
             "random": ("area, random reward", "on-policy")}
    header = ["reward", "seeds", "Δ reward", "Δ judge", "Δ VQ", "Δ area"]
    return markdown([header, *trained(names, (("vq", 2), ("area", 1)))])


def recipe() -> str:
    """C3 and C6: Tables 1 and 3 of the paper."""
    names = {"reward": 2, "judge": 3, "ta": 3, "vq": 2, "mq": 3, "area": 0, "spread": 1}
    table = [["", *names]]
    for model in models("recipe"):
        rows = rows_of("results.csv", run="recipe", model=model)
        table.append([model, *(spread(list(column(rows, n).values()), d)
                               for n, d in names.items())])
    return markdown(table)


SHIPPED, DISTILLED = "1,0.1,0.05,0.02 (shipped)", "1,0.5,0.25,0.1"


def noise_ratios() -> dict[tuple, list[float]]:
    """C1: {(times, solver noise, pivot): deviation of the pivot chunk by the initial noise over
    that by this solver noise, for each seed}."""
    found = {}
    for line in dict.fromkeys(row["command"] for row in rows_of("entropy.csv")):
        for p in range(1, 5):
            find = lambda source: column(rows_of("entropy.csv", command=line, source=source,
                                                 pivot=str(p)), "pivot_chunk")
            initial = find("initial noise")
            for i in (1, 2, 3):
                found[line.partition("--timesteps ")[2] or SHIPPED, i, p] = [
                    initial[seed] / value for seed, value in find(f"solver noise {i}").items()]
    return found


def entropy() -> str:
    """C1."""
    ratios = noise_ratios()
    table = [["sampler's times", "solver noise", *(f"pivot {p}" for p in range(1, 5))]]
    for times in dict.fromkeys(times for times, *_ in ratios):
        for i in (1, 2, 3):
            table.append([times if i == 1 else "", str(i),
                          *(spread(ratios[times, i, p], 1) for p in range(1, 5))])
    return markdown(table)


def least_ratio() -> str:
    """C1: the smallest ratio of any seed at the shipped times, rounded down."""
    return str(int(min(min(x) for (times, *_), x in noise_ratios().items() if times == SHIPPED)))


def distilled_ratios() -> str:
    """C1: the ratios to the first solver noise at the times of the distillation."""
    found = [mean(x) for (times, i, _), x in noise_ratios().items() if (times, i) == (DISTILLED, 1)]
    return f"{min(found):.0f} to {max(found):.0f}"


def first_text() -> str:
    """C4: the judge's text of the base."""
    return f"{mean(column(rows_of('results.csv', run='ta', model='base'), 'text').values()):.2f}"


def trained(names: dict[str, tuple], more: tuple = ()) -> list[list[str]]:
    """{label: (run, model)} -> label, seeds and changes of the final table, a row for each."""
    table = []
    for label, (name, model) in names.items():
        rows = rows_of("results.csv", run=name, model=model)
        base = rows_of("results.csv", run=name, model="base", command=rows[0]["command"])
        cells = [change(rows, base, "reward"), change(rows, base, "judge", 3)]
        cells += [change(rows, base, n, d) for n, d in more]
        table.append([label, str(len(rows)), *cells])
    return table


def training(run: str, model: str, name: str, digits: int) -> str:
    return spread(list(column(rows_of("training.csv", run=run, training=model), name).values()),
                  digits)


def baseline() -> str:
    """C2."""
    names = {f"{method}{label}": (f"equal rows{run}", model)
             for label, run in ((", shipped", ""), (", best", ", best"), (", noisy", ", noisy"),
                                (", distilled times",) * 2, (", distilled times, 2e-4",) * 2)
             for method, model in (("AR-CoPO", "on-policy"), ("SDE-GRPO", "sde-grpo"))}
    names |= {f"AR-CoPO, {label}": (run, "on-policy") for label, run in
              (("distilled times, 4e-4", "equal rows, distilled times, 4e-4"),
               ("36 rows, shipped", "36 rows"), ("36 rows, best", "36 rows, best"))}
    table = [["", "seeds", "Δ reward", "Δ judge", "Δ TA", "Δ area", "training reward", "deviation",
              "flat groups", "clipped"]]
    for row, pair in zip(trained(names, (("ta", 3), ("area", 0))), names.values()):
        table.append([*row, *(training(*pair, name, digits) for name, digits in
                              (("last_reward", 2), ("deviation", 3), ("flat_groups", 2),
                               ("clip_fraction", 2)))])
    return markdown(table)


TA_ALONE = {"semi": ("ta", "semi"), "semi, lr 4e-4": ("ta at 4e-4", "semi"),
            "on-policy": ("ta", "on-policy"), "on-policy, lr 4e-4": ("ta at 4e-4", "on-policy"),
            "off-policy, lr 4e-4": ("ta at 4e-4", "off-policy")}


def at_equal_ta() -> str:
    """C4: the first point of each curve at which TA has gained as much as semi."""
    columns = {"ta": 3, "text": 3, "visual": 3, "motion_quality": 3, "judge": 3, "displacement": 1}
    table = [["", "TA gain", "seeds", "iteration",
              *(f"Δ {name.replace('_', ' ')}" for name in list(columns)[1:])]]
    curves = {label: {seed: rows_of("curves.csv", run=run, training=model, seed=seed)
                      for seed in column(rows_of("curves.csv", run=run, training=model), "step")}
              for label, (run, model) in TA_ALONE.items()}
    gain = lambda rows, row, name: float(row[name]) - float(rows[0][name])
    semi, base = (column(rows_of("results.csv", run="ta", model=model), "ta")
                  for model in ("semi", "base"))
    for wanted in (mean(semi[seed] - base[seed] for seed in semi), 0.01):
        for label, seeds in curves.items():
            found = [(rows, next((row for row in rows if gain(rows, row, "ta") >= wanted), None))
                     for rows in seeds.values()]
            found = [pair for pair in found if pair[1]]
            if found:
                cells = [spread([float(row["step"]) for _, row in found], 0)]
                cells += [spread([gain(rows, row, name) for rows, row in found], digits, "+")
                          for name, digits in list(columns.items())[1:]]
            else:
                cells = ["not reached", *[""] * (len(columns) - 1)]
            table.append([label, f"{wanted:.4f}", f"{len(found)} of {len(seeds)}", *cells])
    return markdown(table)


def text_alone() -> str:
    """C4, C5: the final table of training on TA alone."""
    more = (("ta", 3), ("text", 3), ("visual", 3), ("motion_quality", 3), ("area", 0),
            ("displacement", 1), ("spread", 1))
    header = ["", "seeds", "Δ reward", "Δ judge", *(f"Δ {n.replace('_', ' ')}" for n, _ in more)]
    return markdown([header, *trained(TA_ALONE, more)])


def collapse() -> str:
    """C5: without the clip, by seed."""
    run = "ta at 4e-4"
    curves = {seed: rows_of("curves.csv", run=run, training="off-policy", seed=seed)
              for seed in column(rows_of("results.csv", run=run, model="off-policy"), "ta")}
    table = [["", *(f"seed {seed}" for seed in curves)]]
    for name, label in (("ta", "TA"), ("text", "text"), ("judge", "judge")):
        before, after = (column(rows_of("results.csv", run=run, model=model), name)
                         for model in ("base", "off-policy"))
        kept = [f"{after[seed] / before[seed]:.0%}" for seed in curves]
        table.append([f"{label}, share of the base's", *kept])
    first = lambda rows: next((row["step"] for row in rows if float(rows[0]["judge"])
                               - float(row["judge"]) > 0.05), "never")
    table.append(["iteration at which the judge is 0.05 lower", *map(first, curves.values())])
    return markdown(table)


def others() -> str:
    """C7."""
    names = {"flow matching": ("flow", "on-policy"), "second base": ("second base", "on-policy")}
    header = ["", "seeds", "Δ reward", "Δ judge", "Δ all right", "Δ area"]
    return markdown([header, *trained(names, (("all_right", 2), ("area", 0)))])


def cost() -> str:
    """C8."""
    return report(by_seed(rows_of("cost.csv")), 4)


def factors() -> str:
    """One setting changed at a time."""
    runs = [run for run in dict.fromkeys(row["run"] for row in rows_of("results.csv"))
            if run.startswith("factors")]
    header = ["", "seeds", "Δ reward", "Δ judge", "Δ area", "Δ spread", "clipped"]
    table = trained({run[8:] or "the defaults": (run, "on-policy") for run in runs},
                    (("area", 0), ("spread", 1)))
    clipped = [training(run, "on-policy", "clip_fraction", 2) for run in runs]
    return markdown([header, *([*row, cell] for row, cell in zip(table, clipped))])


def tuning() -> str:
    """The search for settings."""
    table = [["command", "seeds", "training reward", "Δ reward", "Δ judge", "Δ TA", "clipped"]]
    commands = {(row["run"], row["training"]): row["command"]
                for row in rows_of("training.csv") if row["run"].startswith("tuning")}
    for pair, line in commands.items():
        seeds, *cells = trained({"": pair}, (("ta", 4),))[0][1:]
        line = line.replace("--seed S ", "").removeprefix("python ").removesuffix(f" {TUNING}")
        table.append([f"`{line}`", seeds, training(*pair, "last_reward", 2), *cells,
                      training(*pair, "clip_fraction", 2)])
    return markdown(table)


TABLES = {f.__name__: f for f in (
    readme, durations, world, bases, pretraining, pivots, area, tuning, entropy, least_ratio,
    distilled_ratios, baseline, recipe, text_alone, at_equal_ta, first_text, collapse, others, cost,
    factors)}


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
