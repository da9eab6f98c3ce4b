"""Seconds of an iteration without the reward (Sec. 3.2): python -m studies.cost

The fork at each chunk and its update, beside sequence-level GRPO with the same G: each rollout runs
all L chunks, and the gradient goes through all re-noising steps of all chunks of all G. Writes
cost.csv, one row per round.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean

import torch
from tqdm import tqdm

from arcopo import (
    Adapter,
    draw_noise,
    fork,
    load_generator,
    methods,
    parse,
    seeded,
    update,
)
from reward import TRAIN_PROMPTS, UserError, append_row, check_folder, choose_device, command
from studies.sde_grpo import sde_grpo

ROUNDS = 3


def study(settings) -> int:
    folder = Path(settings.out or time.strftime("runs/cost-%Y%m%d-%H%M%S"))
    check_folder(folder, new=True)
    model = load_generator(
        settings.base,
        choose_device(settings.device),
        settings.precision == "bf16",
        settings.timesteps,
    )
    if not model.solver_steps:
        raise UserError("--base, --timesteps: sequence-level GRPO needs a sampler that adds noise")
    P, G = settings.prompts, settings.group
    adapter = Adapter.new(model, settings.rank, settings.alpha, seeded(settings.seed, "adapter"))
    optimizer = torch.optim.AdamW(adapter.parameters(), settings.lr, weight_decay=0)
    rewards = torch.randn(P, G, generator=seeded(settings.seed, "study")).to(model.device)
    method, sde = methods(settings)["on-policy"], sde_grpo(settings)

    def seconds(call: Callable) -> tuple[float, object]:
        began = time.perf_counter()
        result = call()
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)
        return time.perf_counter() - began, result

    folder.mkdir(parents=True, exist_ok=bool(settings.out))
    rows = []
    for step in tqdm(range(ROUNDS + 1), desc="cost", unit="round"):
        row, whole = {}, 0.0
        for p in range(model.chunks):
            generator = seeded(settings.seed, "study", step)
            noise = draw_noise(model, P, generator)
            own = method.branch_noise(noise, p, generator)
            train = lambda m: update(
                model, adapter, branches, rewards, m, optimizer, settings.updates, generator
            )
            with adapter.on(model):
                row[f"fork_{p + 1}"], (branches, _) = seconds(
                    lambda: fork(model, TRAIN_PROMPTS[:P], p, noise, *own)
                )
            row[f"update_{p + 1}"], _ = seconds(lambda: train(method))
            whole += seconds(lambda: train(sde))[0]
        if step > 0:  # the first round is a warm-up
            rows.append(row | {"sequence_rollouts": row["fork_1"], "sequence_update": whole})
            append_row(folder / "cost.csv", rows[-1])
    print(f"{'seconds of an iteration':<24}{'rollouts':>10}{'update':>10}{'together':>10}")
    parts = {
        f"fork at chunk {p + 1}": (f"fork_{p + 1}", f"update_{p + 1}") for p in range(model.chunks)
    }
    parts["sequence-level GRPO"] = "sequence_rollouts", "sequence_update"
    for name, pair in parts.items():
        a, b = (mean(row[column] for row in rows) for column in pair)
        print(f"{name:<24}{a:>10.2f}{b:>10.2f}{a + b:>10.2f}")
    return 0


def main(arguments: list | None = None) -> int:
    return command("cost", lambda: study(parse(arguments, __doc__.split("\n\n")[0])))


if __name__ == "__main__":
    sys.exit(main())
