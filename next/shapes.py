"""shapes.py FILE SPLIT SEEDS TIMES(or -): all right etc, mixed groups at pivots 1-4"""
import sys
sys.path.insert(0, "/tmp/me/code")
import torch
from arcopo import *
from arcopo import sample_batches, branch_noise, fork
from reward import *
from reward import judge, SHAPES, attributes, JUDGE_PROMPTS
file, split, seeds = sys.argv[1], sys.argv[2], list(map(int, sys.argv[3].split(",")))
times = tuple(map(float, sys.argv[4].split(","))) if len(sys.argv) > 4 and sys.argv[4] != "-" else ()
model = load_generator(file, timesteps=times)
P = JUDGE_PROMPTS[split]
prompts = [p for p in P for _ in range(8)]
rows = []
with torch.no_grad():
  for seed in seeds:
    clips = sample_batches(model, prompts, seeded(seed, "judging"), 96)
    s = judge(clips, prompts)
    right = s["all_right"] == 1
    parts = s["colour"] + s["shape"] + s["direction"]
    row = {k: s[k].float().mean().item() for k in ("all_right", "colour", "shape", "direction", "visual", "motion_quality", "area")}
    row["vis|right"] = s["visual"][right].mean().item(); row["mq|right"] = s["motion_quality"][right].mean().item()
    row["empty"] = (parts == 0).float().mean().item()
    ws = attributes(prompts)[(s["shape"] == 0).cpu(), 1]
    row["cross"] = (ws == SHAPES.index("cross")).float().mean().item()
    for pivot in range(4):
        rng = seeded(seed, "study", pivot)
        noise = draw_noise(model, len(P), rng)
        own = branch_noise(noise, pivot, 0.5, 12, rng)
        c = fork(model, P, pivot, noise, *own)[1].flatten(0, 1)
        v = judge(c, [p for p in P for _ in range(12)])
        m = (v["colour"] * v["shape"]).view(len(P), 12)
        row[f"mixed{pivot+1}"] = ((m.amin(1) == 0) & (m.amax(1) == 1)).float().mean().item()
    rows.append(row)
for k in rows[0]:
    x = torch.tensor([r[k] for r in rows])
    print(f"{k:16} {x.mean():.3f} ± {x.std() if len(x) > 1 else 0:.3f}   " + " ".join(f"{y:.2f}" for y in x))
