"""What the README's commands take: python -m studies.durations

Runs the recipe and the smoke test once and writes durations.csv: minutes, and the peak of the main
memory. Run it with nothing else running.
"""

import re
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from arcopo import Parser, exit_code, write_csv
from reward import UserError

ROOT = Path(__file__).resolve().parent.parent


def commands() -> dict[str, list[str]]:
    """Out of the README: {what: words}."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    recipe = re.findall(r"&& python (arcopo.py --steps \d+)", text)
    smoke = re.findall(r"^ *python (arcopo.py --steps 2 .*?) --out", text, re.MULTILINE)
    if not (recipe and smoke):
        raise UserError("README.md: expected the recipe and the smoke test")
    return {"the smoke test": shlex.split(smoke[0]), "the recipe": shlex.split(recipe[0])}


def main(arguments: list | None = None) -> int:
    try:
        parser = Parser(description=__doc__.split("\n\n")[0])
        parser.add_argument("--out", default="runs/durations", help="folder to write")
        folder = Path(parser.parse_args(arguments and [str(a) for a in arguments]).out)
        cuda, rows = torch.cuda.is_available(), []
        device = torch.cuda.get_device_name() if cuda else f"{torch.get_num_threads()} CPU cores"
        with tempfile.TemporaryDirectory() as work:
            for what, words in commands().items():
                began = time.perf_counter()
                subprocess.run([sys.executable, *words, "--out", f"{work}/{what}"], cwd=ROOT,
                               check=True)
                minutes = (time.perf_counter() - began) / 60
                rows.append({"what": what, "value": minutes, "unit": "minutes", "device": device})
        memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e3       # kB on Linux
        rows.append({"what": "main memory", "value": memory, "unit": "MB", "device": device})
        folder.mkdir(parents=True, exist_ok=True)
        write_csv(folder / "durations.csv", rows)
        for row in rows:
            print(f"{row['what']:<20}{row['value']:>10.2f} {row['unit']}, {row['device']}")
        return 0
    except BaseException as error:
        return exit_code(error)


if __name__ == "__main__":
    sys.exit(main())
