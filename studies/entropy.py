"""Fig. 6: which noise decides a chunk. python -m studies.entropy (settings of arcopo.py)

All noise is shared but one source of the pivot chunk, which is redrawn for each branch. Writes
entropy.csv: per source and pivot the deviation between branches of the pixels in [0, 1] (root mean
square over prompts and pixels, of the pivot chunk, and of all chunks from it on) and of the reward.
"""

import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from arcopo import draw_noise, fork, load, neighbor_noise, parse, seeded
from reward import HELD_OUT_PROMPTS, append_row, check_folder, check_unused, command

GROUP = 4


def study(settings) -> int:
    used = "out base timesteps seed device precision reward clip"
    check_unused(settings, vars(settings).keys() - {*used.split()}, "this study")
    folder = Path(settings.out or time.strftime("runs/entropy-%Y%m%d-%H%M%S"))
    check_folder(folder, new=True)
    model, reward, _ = load(settings)
    folder.mkdir(parents=True, exist_ok=bool(settings.out))
    prompts = [prompt for prompt in HELD_OUT_PROMPTS for _ in range(GROUP)]
    sources = ["nothing", "initial noise"] + [
        f"solver noise {i + 1}" for i in range(model.solver_steps)]
    lines = [f"{'deviation of the pivot chunk':<28}{'pivot':>6}{'pixels':>9}{'reward':>9}"]
    for pivot in tqdm(range(model.chunks), desc="entropy", unit="pivot"):
        for i, source in enumerate(sources):
            noise = draw_noise(model, len(HELD_OUT_PROMPTS), seeded(settings.seed, "study"))
            generator = seeded(settings.seed, "study", i)
            base = [noise.initial[:, pivot], *noise.solver[:, pivot].unbind(1)]
            own = [
                neighbor_noise(x, float(k + 1 == i), GROUP, generator).transpose(0, 1)
                for k, x in enumerate(base)]
            solver = (torch.stack(own[1:], 2) if own[1:] else noise.solver[:, pivot, None].expand(
                -1, GROUP, *[-1] * (noise.solver.ndim - 2)))
            clips = fork(model, HELD_OUT_PROMPTS, pivot, noise, own[0], solver)[1]
            scores = reward(clips.flatten(0, 1), prompts)["reward"].view(-1, GROUP)
            variance = (clips - clips[:, :1]).var(1, correction=0).unflatten(1, (model.chunks, -1))
            row = {
                "source": source, "pivot": pivot + 1,
                "pivot_chunk": variance[:, pivot].mean().sqrt().item(),
                "from_pivot_on": variance[:, pivot:].mean().sqrt().item(),
                "reward": scores.std(1, correction=0).mean().item()}
            append_row(folder / "entropy.csv", row)
            lines.append(
                f"{source:<28}{pivot + 1:>6}{row['pivot_chunk']:>9.4f}{row['reward']:>9.4f}")
    print("\n".join(lines) + f"\nwrote {folder}/entropy.csv")
    return 0


def main(arguments: list | None = None) -> int:
    return command("entropy", lambda: study(parse(arguments, __doc__.split("\n\n")[0])))


if __name__ == "__main__":
    sys.exit(main())
