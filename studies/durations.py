"""How long the commands of the README take and how much they write: python -m studies.durations

Runs each once, and a few steps of pre-training, and writes durations.csv, a row for each number.
Run it with nothing else running.
"""

import re
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch

from arcopo import Parser, exit_code, write_csv
from reward import UserError
from studies.claims import read
from studies.cost import markdown

ROOT = Path(__file__).resolve().parent.parent
STEPS = 6       # of pre-training, that are timed


def run(words: list[str]) -> float:
    """Minutes of a command, as in the README, with this Python. Raises UserError if it fails."""
    began = time.perf_counter()
    words = [sys.executable, *(words[1:] if words[0] == "python" else ["-m", *words])]
    print("$", shlex.join(words), flush=True)
    if subprocess.run(words, cwd=ROOT).returncode:
        raise UserError(f"{shlex.join(words)}: failed")
    return (time.perf_counter() - began) / 60


def commands() -> list[list[str]]:
    """The recipe, the tests and the smoke test, out of the README."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.findall(r"^pip install .* && (.*?) *#", text, re.MULTILINE)
    found += re.findall(r"^    (python arcopo.py --steps 2 .*?) --out", text, re.MULTILINE)
    if len(found) != 3:
        raise UserError("README.md: expected two commands after pip install and a smoke test")
    return [shlex.split(line) for line in found]


def megabytes(path: Path) -> float:
    files = [path] if path.is_file() else [f for f in path.rglob("*") if f.is_file()]
    return sum(f.stat().st_size for f in files) / 1e6


def pretraining(folder: Path) -> dict[str, tuple]:
    """Seconds of a step of each stage, by precision."""
    found = {}
    for precision in ("fp32", "bf16"):
        out = folder / precision
        run(["python", "-m", "studies.pretrain", "--precision", precision, "--teacher-steps",
             str(STEPS), "--student-steps", str(STEPS), "--out", str(out)])
        for stage in ("teacher", "student"):
            step = median(float(row["seconds"]) for row in read(out / f"{stage}.csv"))
            found[f"{stage}, {precision}"] = step, "seconds a step"
    return found


def study(args) -> int:
    folder, (recipe, tests, smoke) = Path(args.out), commands()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        out = Path(work)
        found = {
            "the recipe": (run([*recipe, "--out", str(out / "recipe")]), "minutes"),
            "the tests": (run(tests), "minutes"),
            "the smoke test": (run([*smoke, "--out", str(out / "smoke")]), "minutes"),
            "the recipe's buffer": (megabytes(out / "recipe" / "buffer.pt"), "MB"),
            "the packages": (megabytes(Path(torch.__file__).parent.parent), "MB"),
            "`assets/`": (megabytes(ROOT / "assets"), "MB"),
        } | pretraining(out)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    rows = [{"what": what, "value": value, "unit": unit, "device": device}
            for what, (value, unit) in found.items()]
    write_csv(folder / "durations.csv", rows)
    print(markdown([list(rows[0]), *([*map(str, row.values())] for row in rows)]))
    return 0


def main(arguments: list | None = None) -> int:
    try:
        parser = Parser(description=__doc__.split("\n\n")[0])
        parser.add_argument("--out", default="runs/durations", help="folder to write")
        return study(parser.parse_args(arguments and [str(a) for a in arguments]))
    except BaseException as error:
        return exit_code(error)


if __name__ == "__main__":
    sys.exit(main())
