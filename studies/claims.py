"""Run what each claim of the paper needs, over seeds: python -m studies.claims C2 --seeds 5

Appends to results.csv (the final table of each run), curves.csv (scores along training),
training.csv (a summary of the training metrics), base.csv, entropy.csv, cost.csv and durations.csv
in --out, by default this folder. What is there already is not run again. "base" is what EVIDENCE.md
says of the world and the base, "tuning" the search for settings, "factors" changes one setting at a
time, "durations" times the commands of the README.
"""

import csv
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import mean, median

from arcopo import Parser, exit_code
from reward import UserError

HERE = Path(__file__).resolve().parent
SECOND = "runs/second-base"
PRETRAIN = ("python -m studies.pretrain --seed 1 --teacher-steps 1300 --student-steps 320 "
            f"--out {SECOND}")
ONE = "python arcopo.py --method {} --seed S --steps {}"
TA = ONE + " --reward ta=1 --judge-every 10"
SDE = {"contrastive": ONE.format("on-policy", 60) + " --anchors 12",
       "gaussian": "python -m studies.sde_grpo --seed S --steps 60"}
DISTILLED = "1,0.5,0.25,0.1"            # the times at which the student was distilled
TUNING = "--judge-prompts training"     # no reported score of a model has these prompts
NOISY = " --reward ta=1,vq=1,mq=1,studies.base:random_reward=0.9"
CLOSE = 10, 11, 12                      # or these seeds; all three where one cannot decide
POLICIES = "contrastive", "gaussian"
RECIPE = "python arcopo.py --seed S --steps 100 --sweep 0.2,0.4,0.6,0.8,1,1.5,2"
FACTORS = ("", "--sigma 0.25", "--sigma 1", "--group 6", "--group 24", "--anchors 1",
           "--anchors 12", "--clip-range 1e-5", "--clip-range 1e-3", "--clip-range inf",
           "--updates 1", "--updates 4")
SEARCHED = ((60, ""), (60, "--tau 0.01"), (60, "--tau 0.1"), (60, "--floor 0.005"),
            (60, "--floor 0.1"), (60, "--rank 4 --alpha 8"), (60, "--rank 64 --alpha 128"),
            (120, "--prompts 2"), (30, "--prompts 8"), (60, "--timesteps 1,0.3,0.15,0.07"),
            (60, f"--timesteps {DISTILLED}"))      # iterations, setting: rollouts are equal
STUDIES = "base", "entropy", "cost", "durations"    # each has a CSV of its own, of this name
RUNS = [  # (claims, run in the CSVs, command; S is the seed, its seeds if they are fixed)
    ("base", "base", "python -m studies.base --seed S"),
    ("base", "area, VQ alone", ONE.format("on-policy", 40) + " --reward vq=1", (0, 1)),
    ("base", "area, random reward",
     ONE.format("on-policy", 40) + " --reward studies.base:random_reward=1", (0, 1)),
    ("C1", "entropy", "python -m studies.entropy --seed S"),
    ("C1", "entropy", "python -m studies.entropy --seed S --timesteps 1,0.3,0.15,0.07"),
    ("C1", "entropy", "python -m studies.entropy --seed S --timesteps " + DISTILLED),
    ("C8", "cost", "python -m studies.cost --seed S"),
    ("C3 C6", "recipe", RECIPE),
    *(("C2", "equal rows", SDE[policy]) for policy in POLICIES),
    *(("C2", f"36 rows{name}", ONE.format("on-policy", 60) + f" --anchors 9{rate}")
      for name, rate in (("", ""), (", best", " --lr 4e-4"))),
    *(("C2", f"equal rows, distilled times{name}",
       f"{SDE[policy]} --timesteps {DISTILLED}{rate}")
      for name, policy, rate in (("", "contrastive", ""), ("", "gaussian", ""),
                                 (", 4e-4", "contrastive", " --lr 4e-4"),
                                 (", 2e-4", "contrastive", " --lr 2e-4"),
                                 (", 2e-4", "gaussian", " --lr 2e-4"))),
    *(("C2", "equal rows, best", f"{SDE[policy]} {best}") for policy, best in
      zip(POLICIES, ("--lr 4e-4", "--lr 5e-4 --floor 1e-3"))),
    *(("C4", "ta", TA.format(method, 100)) for method in ("on-policy", "semi")),
    *(("C4 C5", "ta at 4e-4", f"{TA.format(method, 100)} {rate} 4e-4") for method, rate in
      (("on-policy", "--lr"), ("semi", "--buffer-lr"), ("off-policy", "--buffer-lr"))),
    ("C7", "flow", ONE.format("on-policy", 40) + " --base assets/teacher.safetensors"),
    ("C7", "second base",
     f"{PRETRAIN} && {ONE.format('on-policy', 60)} --base {SECOND}/base.safetensors"),
    *(("C2", "equal rows, noisy", SDE[policy] + NOISY)
      for policy in POLICIES),
    *(("factors", f"factors {change}".strip(), f"{ONE.format('on-policy', 40)} {change}".strip(),
       (0, 1)) for change in FACTORS),
    *(("tuning", f"tuning {lr}", f"{SDE['contrastive']} --lr {lr} {TUNING}", seeds)
      for lr, seeds in (("5e-5", CLOSE), ("1e-4", CLOSE), ("2e-4", CLOSE), ("4e-4", CLOSE),
                        ("1e-3", (10,)))),
    *(("tuning", f"tuning {change}", f"{SDE['gaussian']} {change} {TUNING}", seeds)
      for change, seeds in (("--lr 2e-4", (10,)), ("--lr 5e-4", (10,)),
                            ("--lr 1e-3", (10,)),
                            ("--lr 5e-4 --clip-range 4e-6", (10,)),
                            ("--lr 2e-4 --floor 1e-3", (10, 11)),
                            ("--lr 5e-4 --floor 1e-3", (10, 11)),
                            ("--lr 1e-3 --floor 1e-3", (10,)),
                            ("--lr 5e-4 --floor 1e-3 --clip-range 4e-5", (10, 11)),
                            ("--lr 5e-4 --floor 1e-3 --clip-range 1.2e-4", (10, 11)))),
    *(("tuning", f"tuning distilled {change}",
       f"{SDE[policy]} --timesteps {DISTILLED} {change} {TUNING}", (10, 11))
      for policy, change in (("contrastive", "--lr 1e-4"), ("contrastive", "--lr 2e-4"),
                             ("contrastive", "--lr 4e-4"), ("gaussian", "--lr 2e-4"),
                             ("gaussian", "--lr 5e-4"), ("gaussian", "--lr 1e-3"))),
    *(("tuning", f"tuning buffer {lr}", f"{ONE.format('semi', 100)} --buffer-lr {lr} {TUNING}",
       CLOSE) for lr in ("2e-4", "4e-4", "1e-3", "2e-3")),
    *(("tuning", f"tuning on-policy {change}".strip(),
       f"{ONE.format('on-policy', f'{steps} {change}'.strip())} {TUNING}", CLOSE)
      for steps, change in SEARCHED),
    ("durations", "durations", "python -m studies.durations", (0,)),
]


def read(file: Path) -> list[dict]:
    text = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return list(csv.DictReader(text))


def append_row(file: Path, row: dict) -> None:
    """Append to a CSV file. Columns that it has not are added, empty in the rows before."""
    rows = [*read(file), row]
    with open(file, "w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, dict.fromkeys(name for row in rows for name in row))
        writer.writeheader()
        writer.writerows(rows)


def trained(line: str) -> str:
    """The model that a command adds to results.csv last."""
    words = line.split()
    method = words[words.index("--method") + 1] if "--method" in words else "on-policy"
    return "sde-grpo" if "studies.sde_grpo" in words else method


def done(out: Path, run: str, line: str, seed: int) -> bool:
    if run in STUDIES:
        return any((row["command"], row["seed"]) == (line, str(seed))
                   for row in read(out / f"{run}.csv"))
    wanted = run, line, trained(line), str(seed)
    return any((row["run"], row["command"], row["model"], row["seed"]) == wanted
               for row in read(out / "results.csv"))


def summary(rows: list[dict]) -> dict:
    """Of the rows of iterate: means over all iterations, and the reward of the last 20."""
    values = lambda name: [float(row[name]) for row in rows]
    return {"iterations": len(rows), "last_reward": mean(values("reward")[-20:]),
            "clip_fraction": mean(values("clip_fraction")), "deviation": mean(values("deviation")),
            "flat_groups": mean(values("flat_groups")), "seconds": median(values("seconds"))}


def execute(out: Path, run: str, line: str, seed: int, extra: list[str]) -> None:
    """Run one command in a fresh folder, then copy its CSVs to the shared ones."""
    *before, last = line.split(" && ")
    for part in before:
        if not (HERE.parent / SECOND / "base.safetensors").exists():
            subprocess.run([sys.executable, *shlex.split(part)[1:]], cwd=HERE.parent, check=True)
    name = "".join(c if c.isalnum() or c in ".-" else "-" for c in f"{run}-{trained(line)}-{seed}")
    folder = out / "runs" / name
    shutil.rmtree(folder, ignore_errors=True)       # what an interrupted run wrote
    words = [str(seed) if word == "S" else word for word in shlex.split(last)[1:]]
    words = [sys.executable, *words, "--out", str(folder.absolute()), *extra]
    print("$", shlex.join(words), flush=True)
    subprocess.run(words, cwd=HERE.parent, check=True)
    about = {"run": run, "command": line, "seed": seed}
    if run in STUDIES:
        for row in read(folder / f"{run}.csv"):
            append_row(out / f"{run}.csv", {"command": line, "seed": seed} | row)
        return
    judged = read(folder / "judged.csv")
    columns = [name for name in judged[0] if name != "model" and name[0] not in "Δ±"]
    for file in sorted(folder.glob("*-curve.csv")):
        training = file.name.removesuffix("-curve.csv")
        rows = summary(read(folder / f"{training}.csv"))
        append_row(out / "training.csv", about | {"training": training} | rows)
        for row in read(file):
            point = {name: row[name] for name in columns if name in row}
            append_row(out / "curves.csv",
                       about | {"training": training, "step": row["step"]} | point)
    for row in judged:                              # last: done() looks here
        scores = {name: row[name] for name in columns}
        append_row(out / "results.csv", about | {"model": row["model"]} | scores)


def main(arguments: list | None = None) -> int:
    try:
        parser = Parser(description=__doc__.split("\n\n")[0])
        parser.add_argument("claims", nargs="+", metavar="CLAIM",
                            help="base, C1 ... C8, factors, tuning, durations")
        parser.add_argument("--seeds", type=int, default=5, help="seeds 0 to N - 1 [5]")
        parser.add_argument("--out", default=str(HERE), help="folder of the CSVs [studies]")
        parser.add_argument("--extra", type=shlex.split, default=[],
                            help="settings added to each command")
        args = parser.parse_args(arguments and [str(a) for a in arguments])
        known = {claim for claims, *_ in RUNS for claim in claims.split()}
        if not set(args.claims) <= known:
            raise UserError(f"{' '.join(args.claims)}: expected claims of "
                            f"{', '.join(sorted(known))}")
        out = Path(args.out)
        out.mkdir(parents=True, exist_ok=True)
        for claims, run, line, *fixed in RUNS:
            for seed in fixed[0] if fixed else range(args.seeds):
                if set(claims.split()) & set(args.claims) and not done(out, run, line, seed):
                    execute(out, run, line, seed, args.extra)
        return 0
    except subprocess.CalledProcessError as error:
        return exit_code(UserError(f"{error.cmd}: failed with exit code {error.returncode}"))
    except BaseException as error:
        return exit_code(error)


if __name__ == "__main__":
    sys.exit(main())
