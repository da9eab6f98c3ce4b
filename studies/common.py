"""What the studies share: reading a CSV, and how a program ends."""

import csv
from collections.abc import Callable
from pathlib import Path

from arcopo import Parser, exit_code

HERE = Path(__file__).resolve().parent


def read(file: Path) -> list[dict]:
    """The rows of a CSV file; none if there is no such file."""
    text = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return list(csv.DictReader(text))


def program(study: Callable, parser: Parser, arguments: list | None) -> int:
    """study(args) -> exit code. Bad input ends in one line, as in arcopo.py."""
    try:
        study(parser.parse_args(arguments and [str(a) for a in arguments]))
        return 0
    except (Exception, KeyboardInterrupt) as error:
        return exit_code(error)
