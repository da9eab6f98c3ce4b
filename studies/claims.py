"""Run what each claim of the paper needs, over seeds: python -m studies.claims C2 --seeds 5

Appends to results.csv (the final table of each run) and curves.csv (scores along training), or to
base.csv, entropy.csv or cost.csv, in --out, by default this folder. What is there is not run again.
"base" measures the base, "settings" changes one setting at a time.
"""

import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from arcopo import Parser, write_csv
from reward import UserError
from studies.common import HERE, program, read

ON = "python arcopo.py --method on-policy --seed S --steps"
SEMI = "python arcopo.py --method semi --seed S --steps 100"
SDE = "python -m studies.sde_grpo --seed S --steps"
RECIPE = "python -m studies.merging --seed S --steps 100 --sweep 0.4,0.6,0.8,1,1.5,2"
MEASURE = "python -m studies.measure --seed S --what"
HIGHER = "--timesteps 1,0.5,0.25,0.1"           # solver noise decides more
SEPARATE = "base", "entropy", "cost"            # runs that write a CSV of this name, and no other


class Run(NamedTuple):
    claims: str         # that need it
    name: str           # in the CSVs
    command: str        # S is the seed
    seeds: tuple = ()   # fixed ones; (): 0 to --seeds - 1


RUNS = [
    Run("base", "base", f"{MEASURE} base"),
    Run("C1", "entropy", f"{MEASURE} entropy"),
    Run("C1", "entropy", f"{MEASURE} entropy {HIGHER}"),
    Run("C2", "AR-CoPO", f"{ON} 60 --anchors 12 --lr 2e-4"),
    Run("C2", "SDE-GRPO", f"{SDE} 60"),
    Run("C2", "AR-CoPO, higher times", f"{ON} 60 --anchors 12 --lr 2e-4 {HIGHER}"),
    Run("C2", "SDE-GRPO, higher times", f"{SDE} 60 {HIGHER}"),
    Run("C3 C4 C5 C6", "recipe", RECIPE),
    Run("C3 C6", "recipe, 200 iterations", RECIPE.replace("--steps 100", "--steps 200")),
    Run("C4 C6", "recipe, on-policy without TA", f"{RECIPE} --reward vq=1,mq=1"),
    Run("C4 C5", "TA alone", f"{ON} 100 --reward ta=1 --judge-every 10"),
    Run("C4 C5", "TA alone, 4 times the rate",
        f"{ON} 100 --reward ta=1 --judge-every 10 --lr 4e-4"),
    Run("C5", "off-policy", f"{SEMI} --clip-range inf"),
    Run("C4 C5", "semi, 25 times the rate", f"{SEMI} --buffer-lr 5e-4"),
    Run("C5", "semi, 25 times the rate, ε 1e-6", f"{SEMI} --buffer-lr 5e-4 --clip-range 1e-6"),
    Run("C4 C5", "off-policy, 25 times the rate", f"{SEMI} --buffer-lr 5e-4 --clip-range inf"),
    Run("C7", "flow matching", f"{ON} 60 --base assets/teacher.safetensors"),
    Run("C7", "right captions", f"{ON} 60 --base assets/right-captions.safetensors"),
    Run("C8", "cost", f"{MEASURE} cost"),
    *(Run("settings", change, f"{ON} 60 {change}".strip(), (0, 1, 2)) for change in (
        "", "--sigma 0.25", "--sigma 1", "--group 6", "--group 24", "--anchors 1", "--anchors 12",
        "--updates 1", "--clip-range 1e-3", "--lr 2e-4", "--reward ta=1,vq=1,mq=1")),
]


def write_rows(file: Path, about: dict, new: list[dict]) -> None:
    """Append to a CSV file, in place of the run's rows if it has some. Columns that it has not are
    added, empty in the rows before."""
    rows = [row for row in read(file) if not about.items() <= row.items()]
    rows += [about | row for row in new]
    empty = {name: "" for row in rows for name in row}
    write_csv(file, [empty | row for row in rows])


def execute(out: Path, run: Run, seed: int, extra: list[str]) -> None:
    """Run one command in a fresh folder, then copy its CSVs to the shared ones; if that was done
    before, do nothing."""
    about = {"run": run.name, "command": run.command, "seed": str(seed)}
    separate = run.name in SEPARATE
    result = out / f"{run.name if separate else 'results'}.csv"
    if any(about.items() <= row.items() for row in read(result)):
        return
    folder = out / "runs" / "".join(c if c.isalnum() else "-" for c in f"{run.name}-{seed}")
    shutil.rmtree(folder, ignore_errors=True)       # what an interrupted run wrote
    words = [str(seed) if word == "S" else word for word in shlex.split(run.command)[1:]]
    words = [sys.executable, *words, "--out", str(folder.absolute()), *extra]
    print("$", shlex.join(words), flush=True)
    if subprocess.run(words, cwd=HERE.parent).returncode:
        raise UserError(f"{shlex.join(words)}: failed")
    for file in sorted(folder.glob("*-curve.csv")):
        training = {"training": file.name.removesuffix("-curve.csv")}
        write_rows(out / "curves.csv", about | training, read(file))
    found = read(folder / f"{run.name if separate else 'judged'}.csv")
    write_rows(result, about, found)                        # last: then the run counts as done


def study(args) -> None:
    for run in RUNS:
        for seed in run.seeds or range(args.seeds):
            if set(run.claims.split()) & set(args.claims):
                execute(Path(args.out), run, seed, args.extra)


def main(arguments: list | None = None) -> int:
    parser = Parser(description=__doc__.split("\n\n")[0])
    known = {claim for run in RUNS for claim in run.claims.split()}
    parser.add_argument("claims", nargs="+", choices=sorted(known), help="what to run")
    parser.add_argument("--seeds", type=int, default=5, help="seeds 0 to N - 1 [5]")
    parser.add_argument("--out", default=str(HERE), help="folder of the CSVs [studies]")
    parser.add_argument("--extra", type=shlex.split, default=[],
                        help="settings added to each command")
    return program(study, parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
