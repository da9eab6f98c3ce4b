"""Run what each claim of the paper needs, over seeds: python -m studies.claims C2 --seeds 5

Appends to results.csv (the final table of each run), curves.csv (held-out curves), entropy.csv and
cost.csv in --out, by default this folder. What is there already is not run again.
"""

import csv
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from reward import Parser, UserError, append_row, check_folder, command, nonempty

HERE = Path(__file__).resolve().parent
TA = "--reward ta=1"
SECOND = "runs/second-base"
RUNS = [  # (claims, run in the CSVs, command; S is the seed)
    ("C1", "entropy", "python -m studies.entropy --seed S"),
    ("C8", "cost", "python -m studies.cost --seed S"),
    ("C2 C3 C6", "recipe", "python arcopo.py --steps 100 --seed S --sweep 0.4,0.6,0.8,1,1.5,2"),
    *(
        ("C2", run, f"python -m studies.sde_grpo --policy {policy} --steps 100{noise} --seed S")
        for run, noise in (("equal rows", ""), ("equal rows, noisy", " --reward-noise 0.3"))
        for policy in ("contrastive", "gaussian")
    ),
    *(
        ("C4 C5", "ta", f"python arcopo.py --method {method} {TA} --steps 100 --seed S")
        for method in ("on-policy", "semi", "off-policy")
    ),
    ("C6", "ta, merged", f"python arcopo.py {TA} --steps 100 --seed S --sweep 0.2,0.4,0.6,0.8,1"),
    (
        "C7",
        "flow",
        "python arcopo.py --base assets/teacher.safetensors --method on-policy --steps 40 --seed S",
    ),
    (
        "C7",
        "second base",
        "python -m studies.pretrain --seed 1 --width 128 --layers 4 --heads 2 "
        f"--out {SECOND} && python arcopo.py --base {SECOND}/base.safetensors "
        "--method on-policy --steps 60 --seed S",
    ),
]


def read(file: Path) -> list[dict]:
    return list(csv.DictReader(open(file, newline=""))) if file.exists() else []


def trained(line: str) -> str:
    """The model that a command adds to results.csv last."""
    words = line.split()
    method = words[words.index("--method") + 1] if "--method" in words else "on-policy"
    return "sde-grpo" if "gaussian" in words else method


def done(out: Path, run: str, line: str, seed: int) -> bool:
    if run in ("entropy", "cost"):
        return any(
            row["command"] == line and row["seed"] == str(seed) for row in read(out / f"{run}.csv")
        )
    return any(
        (row["run"], row["model"], row["seed"]) == (run, trained(line), str(seed))
        for row in read(out / "results.csv")
    )


def execute(out: Path, run: str, line: str, seed: int, extra: list[str]) -> None:
    """Run one command in a fresh folder, then copy its CSVs to the shared ones."""
    *before, last = line.split(" && ")
    for part in before:
        if not (HERE.parent / SECOND / "base.safetensors").exists():
            subprocess.run([sys.executable, *shlex.split(part)[1:]], cwd=HERE.parent, check=True)
    folder = out / "runs" / f"{run}-{trained(line)}-{seed}".replace(" ", "-").replace(",", "")
    shutil.rmtree(folder, ignore_errors=True)  # what an interrupted run wrote
    words = [str(seed) if word == "S" else word for word in shlex.split(last)[1:]]
    words = [sys.executable, *words, "--out", str(folder.absolute()), *extra]
    print("$", shlex.join(words), flush=True)
    subprocess.run(words, cwd=HERE.parent, check=True)
    about = {"run": run, "command": line, "seed": seed}
    if run in ("entropy", "cost"):
        for row in read(folder / f"{run}.csv"):
            append_row(out / f"{run}.csv", {"command": line, "seed": seed} | row)
        return
    columns = list(read(folder / "judged.csv")[0])[1:]
    for file in sorted(folder.glob("*-curve.csv")):
        for row in read(file):
            append_row(
                out / "curves.csv",
                about
                | {"training": file.name[:-10], "step": row["step"]}
                | {name: row[name] for name in columns},
            )
    for row in read(folder / "judged.csv"):  # last: done() looks here
        append_row(out / "results.csv", about | row)


def main(arguments: list | None = None) -> int:
    def call() -> int:
        parser = Parser(__doc__.split("\n\n")[0])
        parser.add_argument("claims", nargs="+", metavar="CLAIM", help="C1 ... C8")
        parser.add_argument("--seeds", type=int, default=5, help="seeds 0 to N - 1 [5]")
        parser.add_argument(
            "--out", type=nonempty, default=str(HERE), help="folder of the CSVs [studies]"
        )
        parser.add_argument("--extra", type=nonempty, help="settings added to each command")
        args = parser.parse_args(arguments and [str(a) for a in arguments])
        known = {claim for claims, *_ in RUNS for claim in claims.split()}
        if not set(args.claims) <= known:
            raise UserError(
                f"{' '.join(args.claims)}: expected claims of {', '.join(sorted(known))}"
            )
        if not 1 <= args.seeds <= 1000:
            raise UserError(f"--seeds {args.seeds}: must be from 1 to 1000")
        check_folder(Path(args.out))
        Path(args.out).mkdir(parents=True, exist_ok=True)
        for claims, run, line in RUNS:
            for seed in range(args.seeds):
                if set(claims.split()) & set(args.claims) and not done(
                    Path(args.out), run, line, seed
                ):
                    try:
                        execute(Path(args.out), run, line, seed, shlex.split(args.extra or ""))
                    except subprocess.CalledProcessError as error:
                        raise UserError(
                            f"{line}: failed with exit code {error.returncode}"
                        ) from error
        return 0

    return command("claims", call)


if __name__ == "__main__":
    sys.exit(main())
