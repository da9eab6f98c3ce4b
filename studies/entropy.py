"""Fig. 6: which noise decides a chunk. python -m studies.entropy

All noise is shared but one source of the pivot chunk, which is redrawn for each branch. Writes
entropy.csv: per source and pivot the deviation between branches of the pixels of the pivot chunk,
in [0, 1], root mean square over prompts and pixels.
"""

import sys
from pathlib import Path

import torch
from tqdm import tqdm

from arcopo import (choose_device, command, draw_noise, fork, load_generator, neighbor_noise,
                    seeded, write_csv)
from reward import HELD_OUT_PROMPTS

USED = {"out", "base", "timesteps", "seed", "device"}
GROUP = 4


def study(settings) -> int:
    folder = Path(settings.out)
    model = load_generator(settings.base, choose_device(settings.device), settings.timesteps)
    folder.mkdir(parents=True, exist_ok=True)
    solver_steps = draw_noise(model, 1, seeded(0)).solver.shape[2]
    sources = ["nothing", "initial noise", *(f"solver noise {i + 1}" for i in range(solver_steps))]
    rows = []
    for pivot in tqdm(range(model.chunks), desc="entropy", unit="pivot"):
        for i, source in enumerate(sources):
            noise = draw_noise(model, len(HELD_OUT_PROMPTS), seeded(settings.seed, "study"))
            rng = seeded(settings.seed, "study", i)
            redrawn = [noise.initial[:, pivot], *noise.solver[:, pivot].unbind(1)]
            redrawn = [x[:, None].expand(-1, GROUP, *model.chunk_shape) for x in redrawn]
            if i > 0:
                own = neighbor_noise(redrawn[i - 1][:, 0], 1.0, GROUP, rng)
                redrawn[i - 1] = own.transpose(0, 1)
            solver = noise.solver[:, pivot, None].expand(-1, GROUP, *noise.solver.shape[2:])
            if solver_steps:
                solver = torch.stack(redrawn[1:], 2)
            clips = fork(model, HELD_OUT_PROMPTS, pivot, noise, redrawn[0], solver)[1]
            variance = (clips - clips[:, :1]).var(1, correction=0).unflatten(1, (model.chunks, -1))
            rows.append({"source": source, "pivot": pivot + 1,
                         "deviation": variance[:, pivot].mean().sqrt().item()})
    write_csv(folder / "entropy.csv", rows)
    for row in rows:
        print(f"{row['source']:<16} pivot {row['pivot']}{row['deviation']:>9.4f}")
    print(f"wrote {folder}/entropy.csv")
    return 0


def main(arguments: list | None = None) -> int:
    return command(study, arguments, only=USED, description=__doc__)


if __name__ == "__main__":
    sys.exit(main())
