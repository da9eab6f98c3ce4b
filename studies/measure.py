"""Measurements that need no training: python -m studies.measure --what entropy

base, entropy, cost and durations write a CSV of their name each. Run cost and durations with
nothing else running.
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from tqdm import tqdm

from arcopo import (Adapter, Generator, Settings, branch_noise, choose_device, command, draw_noise,
                    fork, load, load_generator, neighbor_noise, option, sample, sample_batches,
                    seeded, update, write_csv)
from reward import (BACKGROUND, COLOURS, HELD_OUT_PROMPTS, SHAPES, TRAIN_PROMPTS, UserError,
                    attributes, judge, prompt_of)
from studies import sde_grpo
from studies.common import HERE

USED = set("what out base timesteps seed device group anchors updates prompts rank".split())
REDRAWN, ROUNDS = 4, 3      # branches of entropy, rounds of cost
COMMANDS = {"the smoke test": "arcopo.py --steps 2 --judge-samples 1 --buffer-groups 4",
            "the recipe": "arcopo.py --steps 100"}                      # of the README


@dataclass
class Measurement(Settings):
    what: str = option("base", "what to measure",
                       choices=("base", "entropy", "cost", "durations"))


def correlation(x: Tensor, y: Tensor) -> float:
    """Between branches of a group, [P, G] each, pooled over groups."""
    x, y = (z - z.mean(1, keepdim=True) for z in (x.double(), y.double()))
    return ((x * y).sum() / (x.square().sum() * y.square().sum()).sqrt()).item()


def brightness(clips: Tensor) -> Tensor:
    """Mean over frames of the 24 brightest pixels: [N, F, 3, H, W] -> [N]."""
    signal = (clips.cpu() - BACKGROUND[:, None, None]).amax(2).flatten(2)
    return signal.topk(24).values.mean((1, 2))


def errors(model: Generator, reward: Callable, settings: Measurement) -> dict[str, Tensor]:
    """Of clips of held-out prompts: the share that is empty; the share whose colour or shape is
    wrong for the judge and, by the TA of all colours and shapes, for the CLIP too; the quality of
    the right clips, and the AUC with which TA tells these from clips with one attribute wrong."""
    prompts = [prompt for prompt in HELD_OUT_PROMPTS for _ in range(settings.judge_samples)]
    clips = sample_batches(model, prompts, seeded(settings.seed, "judging"), settings.micro)
    scores, ta = judge(clips, prompts), reward(clips, prompts)["ta"]
    parts = "colour", "shape", "direction"
    count, right = sum(scores[name] for name in parts), scores["all_right"] == 1
    named = attributes(prompts)
    others = [[prompt_of(colour, shape, motion) for motion in named[:, 2]]
              for colour in range(len(COLOURS)) for shape in range(len(SHAPES))]
    closest = torch.stack([reward(clips, texts)["ta"] for texts in others]).argmax(0).cpu()
    doubted = (closest != named[:, 0] * len(SHAPES) + named[:, 1]).to(ta.device)
    wrong = (scores["colour"] * scores["shape"] == 0) & (count > 0)
    found = {"empty": (count == 0).float().mean(),
             "wrong for judge and CLIP": (wrong & doubted).float().mean()}
    wrong_shapes = named[(scores["shape"] == 0).cpu(), 1]
    found["crosses of wrong shapes"] = (wrong_shapes == SHAPES.index("cross")).float().mean()
    for name in ("visual", "motion_quality"):
        found[f"{name} if right"] = scores[name][right].mean()
    for name in parts:
        alone = (scores[name] == 0) & (count == 2)
        found[f"AUC, {name}"] = (ta[right][:, None] > ta[alone]).float().mean()
    return found


def base(settings: Measurement) -> list[dict]:
    """Before alignment: the errors of clips, and groups of branches of each held-out prompt."""
    model, reward, _ = load(replace(settings, reward="ta=1,mq=1"))
    P, G = len(HELD_OUT_PROMPTS), settings.group
    rows = [{"subject": "clips", "measure": name, "value": value.item()}
            for name, value in errors(model, reward, settings).items()]
    prompts = [prompt for prompt in HELD_OUT_PROMPTS for _ in range(G)]
    for pivot in tqdm(range(model.chunks), "base", unit="pivot"):
        rng = seeded(settings.seed, "study", pivot)
        noise = draw_noise(model, P, rng)
        own = branch_noise(noise, pivot, settings.sigma, G, rng)
        clips = fork(model, HELD_OUT_PROMPTS, pivot, noise, *own)[1].flatten(0, 1)
        values = reward(clips, prompts) | judge(clips, prompts) | {"light": brightness(clips)}
        values = {name: x.view(P, G).cpu() for name, x in values.items()}
        matching = values["colour"] * values["shape"]
        mixed = (matching.amin(1) == 0) & (matching.amax(1) == 1)
        found = {"groups with right and wrong colour or shape": mixed.float().mean().item(),
                 "deviation of ta": values["ta"].std(1, correction=0).mean().item(),
                 "area and light": correlation(values["area"], values["light"]),
                 "mq and light": correlation(values["mq"], values["light"])}
        rows += [{"subject": f"pivot {pivot + 1}", "measure": name, "value": value}
                 for name, value in found.items()]
    return rows


def entropy(settings: Measurement) -> list[dict]:
    """Fig. 6, which noise decides a chunk: all noise is shared but one source of the pivot chunk,
    which is redrawn for each branch. The deviation between branches of the pixels of the pivot
    chunk, in [0, 1], root mean square over prompts and pixels."""
    model = load_generator(settings.base, choose_device(settings.device), settings.timesteps)
    noise = draw_noise(model, len(HELD_OUT_PROMPTS), seeded(settings.seed, "study"))
    rows = []
    for pivot in tqdm(range(model.chunks), desc="entropy", unit="pivot"):
        for i in range(1 + noise.solver.shape[2]):
            rng = seeded(settings.seed, "study", i + 1)
            own = neighbor_noise(noise.initial[:, pivot], 1.0, REDRAWN, rng).transpose(0, 1)
            initial, solver = branch_noise(noise, pivot, 0.0, REDRAWN, rng)     # all is shared
            if i == 0:
                source, initial = "initial noise", own
            else:
                source, solver = f"solver noise {i}", solver.clone()
                solver[:, :, i - 1] = own
            clips = fork(model, HELD_OUT_PROMPTS, pivot, noise, initial, solver)[1]
            variance = (clips - clips[:, :1]).var(1, correction=0).unflatten(1, (model.chunks, -1))
            rows.append({"source": source, "pivot": pivot + 1,
                         "deviation": variance[:, pivot].mean().sqrt().item()})
    return rows


def device_name(device: str) -> str:
    """For a CSV: cpu or cuda -> which one."""
    cores = f"{torch.get_num_threads()} CPU cores"
    return torch.cuda.get_device_name() if device == "cuda" else cores


def parts(model: Generator, settings: Measurement) -> dict[str, tuple[Callable, int]]:
    """{part of an iteration: (what runs it, predictions of a chunk by a row that counting gives)}.
    A gradient counts as two more. An update needs its fork."""
    T, L, P, G = len(model.timesteps), model.chunks, settings.prompts, settings.group
    prompts, forks = TRAIN_PROMPTS[:P], {}
    adapter = Adapter.new(model, settings.rank, settings.alpha, seeded(0, "adapter"))
    optimizer = torch.optim.AdamW(adapter.parameters(), settings.lr, weight_decay=0)
    rewards = torch.randn(P, G, generator=seeded(0)).to(model.device)
    noise = draw_noise(model, P, seeded(settings.seed, "noise"))
    own = [branch_noise(noise, pivot, settings.sigma, G, seeded(1)) for pivot in range(L)]

    def explore(pivot: int) -> None:
        with torch.no_grad(), adapter.on(model):
            forks[pivot] = fork(model, prompts, pivot, noise, *own[pivot])[0]

    def improve(pivots: list[int], anchors: int) -> None:
        method = replace(settings, anchors=anchors)
        for pivot in pivots:
            update(model, adapter, optimizer, forks[pivot], rewards, method, seeded(2))

    def independent() -> None:
        """G rollouts of each prompt that share nothing."""
        with torch.no_grad(), adapter.on(model):
            sample(model, [prompt for prompt in prompts for _ in range(G)], noise.repeat(G))

    def improve_sde() -> None:
        sde_grpo.update(model, adapter, optimizer, forks[0], rewards, settings)

    chunk = T + 1                                   # its steps, and extend, but for the last chunk
    passes = 1 + 3 * settings.updates               # π_old, then updates with gradient
    found = {}
    for p in range(L):
        count = P * chunk * p + P * G * (chunk * (L - p) - 1)
        found[f"fork {p + 1}"] = partial(explore, p), count
        found[f"update {p + 1}"] = (partial(improve, [p], settings.anchors),
                                    passes * P * settings.anchors * T)
    found["independent rollouts"] = independent, P * G * (chunk * L - 1)
    found["update, all anchors"] = partial(improve, [0], G), passes * P * G * T
    found["update, all anchors and chunks"] = partial(improve, range(L), G), passes * P * G * T * L
    if T > 1 and not model.flow:                    # a sampler that adds noise T - 1 times
        found["SDE-GRPO, update"] = improve_sde, passes * P * G * (T - 1)
    return found


def cost(settings: Measurement) -> list[dict]:
    """C8, what an iteration costs: seconds, the median of rounds side by side in one run."""
    model = load_generator(settings.base, choose_device(settings.device), settings.timesteps)
    timings = parts(model, settings)
    seconds = {name: [] for name in timings}
    wait = torch.cuda.synchronize if model.device.type == "cuda" else lambda: None
    for _ in tqdm(range(1 + ROUNDS), "cost", unit="round"):     # the first is a warm-up
        for name, (call, _) in timings.items():
            began = time.perf_counter()
            call()
            wait()
            seconds[name].append(time.perf_counter() - began)
    return [{"part": name, "seconds": median(seconds[name][1:]), "counted": counted,
             "prompts": settings.prompts, "device": device_name(model.device.type)}
            for name, (_, counted) in timings.items()]


def durations(settings: Measurement) -> list[dict]:
    """What the README's commands take: minutes, and the peak of the main memory."""
    import resource             # Windows has none

    device, rows = device_name(choose_device("auto")), []
    for what, line in COMMANDS.items():
        with tempfile.TemporaryDirectory() as folder:
            words = [sys.executable, *line.split(), "--out", f"{folder}/run"]
            began = time.perf_counter()
            if subprocess.run(words, cwd=HERE.parent).returncode:
                raise UserError(f"{line}: failed")
            minutes = (time.perf_counter() - began) / 60
        rows.append({"what": what, "value": minutes, "unit": "minutes", "device": device})
    memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e3       # kB on Linux
    return [*rows, {"what": "main memory", "value": memory, "unit": "MB", "device": device}]


def study(settings: Measurement) -> None:
    file = Path(settings.out) / f"{settings.what}.csv"
    file.parent.mkdir(parents=True, exist_ok=True)
    measure = {"base": base, "entropy": entropy, "cost": cost, "durations": durations}
    write_csv(file, measure[settings.what](settings))
    print(f"wrote {file}")


def main(arguments: list | None = None) -> int:
    return command(study, arguments, cls=Measurement, only=USED, description=__doc__)


if __name__ == "__main__":
    sys.exit(main())
