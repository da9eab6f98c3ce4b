"""The recipe with a control (C6): python -m studies.merging --seed 0 --sweep 0.4,1,1.5,2

Runs the recipe of arcopo.py. Then judges the on-policy adapter alone, scaled by each s of the
sweep, beside the merged models, and appends these rows to judged.csv.
"""

import sys
from dataclasses import fields
from pathlib import Path

from arcopo import (Adapter, Settings, command, judge_model, judged_rows, load, merge_adapters,
                    read_record, run, write_csv)
from reward import UserError

USED = {f.name for f in fields(Settings)} - {"method", "sample", "samples", "adapter"}


def study(settings: Settings) -> None:
    if settings.method != "recipe":
        raise UserError(f"--resume {settings.resume}: is no run of the whole recipe")
    run(settings)
    folder = Path(settings.out)
    model, reward, _ = load(settings, read_record(folder)["reward_scales"])
    on = Adapter.load(folder / "on-policy", model)
    models = {f"on-policy x {s:g}": merge_adapters((on, s)) for s in settings.sweep if s != 1}
    scores = {name: judge_model(own, model, reward, settings, settings.judge_samples, "judging")[1]
              for name, own in ({"base": None} | models).items()}
    write_csv(folder / "judged.csv", judged_rows(scores)[1:], "a")


def main(arguments: list | None = None) -> int:
    return command(study, arguments, only=USED, description=__doc__)


if __name__ == "__main__":
    sys.exit(main())
