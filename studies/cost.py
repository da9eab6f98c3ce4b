"""What an iteration costs (C8), part by part: python -m studies.cost

Medians over rounds, side by side in one run. "counted" is what counting predicts: predictions of a
chunk by a row, times 3 where a gradient follows; where the width changes, operations. Writes
cost.csv: seconds, count, operations, and peak memory of the tensors that each part makes, and the
device. Run it with nothing else running.
"""

import sys
import time
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from tqdm import tqdm

from arcopo import (Adapter, Fork, Generator, Method, Noise, branch_noise, draw_noise, exit_code,
                    fork, load, parse, rollout, seeded, update, write_csv)
from reward import TRAIN_PROMPTS, UserError
from studies import sde_grpo

ROUNDS = 3
SCALES = [("group", 6), ("group", 24), ("chunks", 2), ("chunks", 8), ("width", 128),
          ("width", 512)]


class Products(TorchDispatchMode):
    """Counts the matrix products inside, by the shapes of their two factors."""

    def __init__(self):
        super().__init__()
        self.shapes = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        factors = {"addmm": args[1:3], "mm": args[:2], "bmm": args[:2]}
        name = function.overloadpacket.__name__
        if name in factors:
            self.shapes[tuple(tuple(x.shape) for x in factors[name])] += 1
        return function(*args, **(kwargs or {}))


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(call: Callable) -> tuple[float, object]:
    synchronize()
    began, result = time.perf_counter(), call()
    synchronize()
    return time.perf_counter() - began, result


class Memory(TorchDispatchMode):
    """The largest number of bytes that tensors made inside hold at one time."""

    def __init__(self):
        super().__init__()
        self.live, self.peak, self.known = 0, 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in (out if isinstance(out, (tuple, list)) else [out]):
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in self.known:
                storage = x.untyped_storage()
                self.known.add(storage._cdata)
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self.free, storage._cdata, storage.nbytes())
        return out

    def free(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size


def limit(shapes: Counter, device: torch.device) -> float:
    """Operations per second that the matrix products reach by themselves."""
    operations = seconds = 0.0
    for (a, b), count in shapes.items():
        x, y = torch.randn(a, device=device), torch.randn(b, device=device)
        seconds += count * median(timed(lambda: x @ y)[0] for _ in range(5))
        operations += count * 2 * x.numel() * b[-1]
    return operations / seconds


class Iteration:
    """The parts of an iteration of a model at each pivot, without and with a gradient."""

    def __init__(self, model: Generator, settings, **changes):
        method = replace(settings, **changes)
        self.model, self.method, self.seed = model, method, settings.seed
        self.adapter = Adapter.new(model, method.rank, method.alpha, seeded(self.seed, "adapter"))
        self.optimizer = torch.optim.AdamW(self.adapter.parameters(), method.lr, weight_decay=0)
        self.prompts = TRAIN_PROMPTS[: method.prompts]
        self.rewards = torch.randn(method.prompts, method.group, generator=seeded(self.seed))
        self.rewards = self.rewards.to(model.device)

    def noise(self, p: int, sde: bool = False) -> tuple[Noise, torch.Tensor, torch.Tensor]:
        """The noise, and the branches' own initial and solver noise at the pivot."""
        rng, G = seeded(self.seed, "study"), self.method.group
        noise = draw_noise(self.model, self.method.prompts, rng)
        if sde:
            return noise, *sde_grpo.branch_noise(noise, p, G, rng)
        return noise, *branch_noise(noise, p, self.method.sigma, G, rng)

    @torch.no_grad()
    def prefix(self, p: int) -> object:
        with self.adapter.on(self.model):
            return rollout(self.model, self.model.begin(self.prompts), self.noise(p)[0], 0, p)

    @torch.no_grad()
    def explore(self, p: int, sde: bool = False) -> tuple[Fork, torch.Tensor]:
        with self.adapter.on(self.model):
            return fork(self.model, self.prompts, p, *self.noise(p, sde))

    def update(self, branches: Fork, **changes) -> None:
        update(self.model, self.adapter, self.optimizer, branches, self.rewards,
               replace(self.method, **changes), seeded(0))

    def sde_update(self, branches: Fork) -> None:
        sde_grpo.update(self.model, self.adapter, self.optimizer, branches, self.rewards,
                        self.method)

    @torch.no_grad()
    def independent(self) -> None:
        """G rollouts of each prompt that share nothing."""
        noise = self.noise(0)[0].repeat(self.method.group)
        prompts = [prompt for prompt in self.prompts for _ in range(self.method.group)]
        with self.adapter.on(self.model):
            rollout(self.model, self.model.begin(prompts), noise, 0, self.model.chunks)

    @torch.no_grad()
    def uncached(self) -> None:
        """As independent, but each prediction runs over all chunks before it again."""
        noise = self.noise(0)[0].initial.repeat_interleave(self.method.group, 0)
        prompts = [prompt for prompt in self.prompts for _ in range(self.method.group)]
        with self.adapter.on(self.model):
            for p in range(self.model.chunks):
                for t in self.model.timesteps:
                    context = self.model.begin(prompts)
                    for q in range(p):
                        context = self.model.extend(context, noise[:, q])
                    self.model.predict(noise[:, p], t, context)


def counts(model: Generator, m: Method) -> dict:
    """Predictions of a chunk by a row in each part, by counting."""
    T, L, P, G = len(model.timesteps), model.chunks, m.prompts, m.group
    chunks = lambda first, last: max(0, (last - first) * (T + 1) - (last == L))     # none after L
    row = {f"prefix {p + 1}": P * chunks(0, p) for p in range(L)}
    row |= {f"fork {p + 1}": P * chunks(0, p) + P * G * chunks(p, L) for p in range(L)}
    passes = 1 + 3 * m.updates                              # π_old first
    row |= {f"update {p + 1}": passes * P * m.anchors * T for p in range(L)}
    return row | {"independent rollouts": P * G * chunks(0, L),
                  "all branches, whole clip": passes * P * G * T * L,
                  "uncached rollouts": P * G * T * L * (L + 1) / 2,
                  "update, all anchors": passes * P * G * T,
                  "SDE-GRPO, fork": row[f"fork {L // 2 + 1}"],
                  "SDE-GRPO, update": passes * P * G * (T - 1)}


def measure(it: Iteration, reward: Callable) -> dict[str, Callable]:
    """{part: what runs it}, in the order of an iteration; a part may use the ones before it."""
    L, m, parts, forks = it.model.chunks, it.method, {}, {}
    names = [prompt for prompt in it.prompts for _ in range(m.group)]
    for p in range(L):
        parts[f"prefix {p + 1}"] = lambda p=p: it.prefix(p)
        parts[f"fork {p + 1}"] = lambda p=p: forks.update({p: it.explore(p)})
        parts[f"update {p + 1}"] = lambda p=p: it.update(forks[p][0])
    parts["reward"] = lambda: reward(forks[0][1].flatten(0, 1).clone(), names)
    parts["independent rollouts"] = it.independent
    parts["uncached rollouts"] = it.uncached
    parts["all branches, whole clip"] = lambda: [it.update(forks[p][0], anchors=m.group)
                                                 for p in range(L)]
    parts["update, all anchors"] = lambda: it.update(forks[L // 2][0], anchors=m.group)
    parts["SDE-GRPO, fork"] = lambda: forks.update(sde=it.explore(L // 2, True))
    parts["SDE-GRPO, update"] = lambda: it.sde_update(forks["sde"][0])
    return parts


def scaled(settings, base: Generator, width: int = 0, chunks: int = 0, **changes) -> Iteration:
    """An iteration of an untrained model of another width or number of chunks."""
    torch.manual_seed(0)
    model = Generator(width or base.width, base.layers, base.heads, base.timesteps, base.flow)
    model.chunks = chunks or base.chunks
    model.position = nn.Parameter(model.position[0].repeat(model.chunks, 1, 1))
    return Iteration(model.to(base.device).requires_grad_(False), settings, **changes)


def counted_in(call: Callable) -> dict[str, float]:
    """Operations and peak memory of a call."""
    with FlopCounterMode(display=False) as operations, Memory() as memory:
        call()
    return {"operations": operations.get_total_flops(), "megabytes": memory.peak / 1e6}


USED = set("""group sigma anchors updates prompts clip_range tau quasi_norm floor lr rank alpha out
           base timesteps seed device reward clip""".split())


def study(settings) -> int:
    folder = Path(settings.out or time.strftime("runs/cost-%Y%m%d-%H%M%S"))
    model, reward, _ = load(settings)
    if model.flow or len(model.timesteps) < 2:
        raise UserError("--base, --timesteps: SDE-GRPO needs a sampler that adds noise")
    folder.mkdir(parents=True, exist_ok=True)
    it = Iteration(model, settings)
    parts, counted, L = measure(it, reward), counts(model, it.method), model.chunks
    seconds = {name: [] for name in parts}
    for step in tqdm(range(ROUNDS + 1), "cost", unit="round"):
        for name, call in parts.items():
            took = timed(call)[0]
            if step > 0:                                    # the first round is a warm-up
                seconds[name].append(took)
    rows = [{"part": name, "seconds": median(seconds[name]), "counted": counted.get(name, "")}
            | counted_in(call) for name, call in parts.items()]
    time_of = {row["part"]: row["seconds"] for row in rows}
    with Products() as products:
        parts["fork 1"](), parts["update 1"]()
    work = sum(row["operations"] for row in rows if row["part"] in ("fork 1", "update 1"))
    reached = work / (time_of["fork 1"] + time_of["update 1"])
    top = limit(products.shapes, model.device)
    rows += [{"part": "operations per second, fork 1 and update 1", "seconds": "", "counted": "",
              "operations": reached, "megabytes": ""},
             {"part": "operations per second, their matrix products alone", "seconds": "",
              "counted": "", "operations": top, "megabytes": ""}]
    for name, value in [("", 0), *SCALES]:
        other = scaled(settings, model, **({name: value} if name else {}))
        ends = (0, other.model.chunks - 1)                  # a mean over pivots: linear in them
        whole = lambda: [other.update(other.explore(p)[0]) for p in ends]
        whole()
        took = median(timed(whole)[0] for _ in range(ROUNDS)) / 2
        every = counts(other.model, other.method)
        count = sum(every[f"fork {p + 1}"] + every[f"update {p + 1}"] for p in ends) / 2
        found = counted_in(whole)
        rows.append({"part": f"iteration, {name} {value}" if name else "iteration",
                     "seconds": took, "counted": count, "operations": found["operations"] / 2,
                     "megabytes": found["megabytes"]})
    cuda = model.device.type == "cuda"
    device = torch.cuda.get_device_name(model.device) if cuda else "CPU"
    write_csv(folder / "cost.csv", [row | {"device": device} for row in rows])
    print(report([rows], L) + f"\n\nwrote {folder}/cost.csv")
    return 0


def markdown(rows: list[list[str]]) -> str:
    """A Markdown table with aligned columns; the first row is the header."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows = [rows[0], ["-" * width for width in widths], *rows[1:]]
    return "\n".join("| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows)


def by_seed(rows: list[dict]) -> list[list[dict]]:
    """The runs in rows of studies/cost.csv."""
    runs = {}
    for row in rows:
        runs.setdefault(row["seed"], []).append(row)
    return [*runs.values()]


def column(runs: list[list[dict]], part: str, name: str = "seconds") -> np.ndarray:
    """What each run measured of a part: [runs]."""
    return np.array([float(row[name]) for rows in runs for row in rows if row["part"] == part])


def iterations(runs: list[list[dict]], L: int) -> dict[str, np.ndarray]:
    """Seconds of an iteration by method, [runs] each, from the rows of cost.csv: a fork (mean over
    pivots; that of SDE-GRPO is the same work), the reward and the updates."""
    seconds = lambda part: column(runs, part)
    every = lambda part: np.mean([seconds(f"{part} {p + 1}") for p in range(L)], 0)
    updates = {"AR-CoPO": every("update"), "AR-CoPO, all anchors": seconds("update, all anchors"),
               "SDE-GRPO": seconds("SDE-GRPO, update")}
    return {name: every("fork") + seconds("reward") + took for name, took in updates.items()}


def spread(values, digits: int, sign: str = "") -> str:
    """Mean ± standard deviation; a single value alone."""
    text = f"{np.mean(values):{sign}.{digits}f}"
    return text + f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else text


def report(runs: list[list[dict]], L: int) -> str:
    """Tables in Markdown from the rows of cost.csv of one or more runs."""
    parts = [row["part"] for row in runs[0]]
    number = lambda part, name="seconds": column(runs, part, name)
    average = lambda part, name: np.mean([number(f"{part} {p + 1}", name) for p in range(L)], 0)
    table = [["part", "seconds", "10⁹ operations", "peak MB"]]
    table += [[part, spread(number(part), 3), f"{number(part, 'operations')[0] / 1e9:.1f}",
               f"{number(part, 'megabytes')[0]:.0f}"]
              for part in parts if not part.startswith(("operations", "iteration"))]
    ratios = [["ratio", "measured", "counted", "by operations"]]
    for title, above, below in (
            ("fork (mean over pivots) / independent rollouts",
             lambda c: average("fork", c), lambda c: number("independent rollouts", c)),
            ("all branches, whole clip / update",
             lambda c: number("all branches, whole clip", c), lambda c: average("update", c)),
            ("uncached / cached rollouts",
             lambda c: number("uncached rollouts", c), lambda c: number("independent rollouts", c)),
            ("sequence-level, contrastive policy / fork and update",
             lambda c: number("independent rollouts", c) + number("all branches, whole clip", c),
             lambda c: average("fork", c) + average("update", c)),
            ("sequence-level, Gaussian policy / fork and update",
             lambda c: number("independent rollouts", c) + L * number("SDE-GRPO, update", c),
             lambda c: average("fork", c) + average("update", c))):
        measured, *others = (above(c) / below(c) for c in ("seconds", "counted", "operations"))
        ratios.append([title, spread(measured, 2), *(f"{ratio[0]:.2f}" for ratio in others)])
    by_method = [["iteration of", "seconds"]]
    by_method += [[name, spread(took, 2)] for name, took in iterations(runs, L).items()]
    scales = [["fork and update with", "seconds", "measured ratio", "counted ratio"]]
    for part in parts:
        if part.startswith("iteration"):
            name = "operations" if "width" in part else "counted"
            scales.append([part[11:] or "the defaults", spread(number(part), 2),
                           spread(number(part) / number("iteration"), 2),
                           f"{(number(part, name) / number('iteration', name))[0]:.2f}"])
    fast, top = (number(f"operations per second, {what}", "operations")
                 for what in ("fork 1 and update 1", "their matrix products alone"))
    speed = [["fork 1 and update 1", "10⁹ operations per second"],
             ["reached, with convolutions", spread(fast / 1e9, 0)],
             ["their matrix products alone", spread(top / 1e9, 0)],
             ["share reached", spread(fast / top, 2)]]
    return "\n\n".join(markdown(rows) for rows in (table, ratios, by_method, scales, speed))


def main(arguments: list | None = None) -> int:
    try:
        return study(parse(arguments, only=USED, description=__doc__.split("\n\n")[0]))
    except BaseException as error:
        return exit_code(error)


if __name__ == "__main__":
    sys.exit(main())
