"""AR-CoPO: align a streaming, few-step, autoregressive video generator with rewards.

    python arcopo.py --steps 100                        the recipe: train two adapters, merge, judge
    python arcopo.py --method on-policy --steps 100     one training; also semi, off-policy
    python arcopo.py --sample "a red circle moving right" --adapter runs/NAME/merged

He et al., AR-CoPO: Align Autoregressive Video Generation with Contrastive Policy Optimization,
arXiv 2603.17461 ("the paper"), built on He et al., Neighbor GRPO, arXiv 2511.16955. The generator
is a miniature of the one in Self-Forcing, arXiv 2506.08009. The word "Departure" marks each place
where this file differs from the paper; --help shows the paper's value of a setting.

Symbol          in the paper      here
L, p            Sec. 3.2          model.chunks; pivot, counted from 0 (from 1 in all output)
T, t            Sec. 3.2          model.timesteps, and one of them; t_next: 0 after the last
F_θ(x_t, h, t)  Eq. 4             model.predict(x_t, t, context)
h_{p-1}         Alg. 1            Context
ε*, ε⁽ⁱ⁾, σ, G  Eq. 1             noise.initial, neighbor_noise, sigma, group
x_t⁽ⁱ⁾, x̂₀⁽ⁱ⁾   Eq. 2, 4          Fork.states, Fork.candidates
x̂₀^(θ), B       Eq. 4, Sec. 3.1   replay, anchors
d⁽ⁱ⁾, τ, π_θ(i) Eq. 2, 5          surrogate_log_policy, tau (τ₀)
r⁽ⁱ⁾, A⁽ⁱ⁾      Eq. 3             reward, group_advantages
ρ⁽ⁱ⁾, ε (clip)  Eq. 3             exp(log_ratio), clip_range
J(θ)            Eq. 3             clipped_objective
the buffer      Sec. 3.3          collect_buffer, draw_from
Δ, s            Sec. 3.3, 4.4     Adapter, merge_adapters, choose_strength

Shapes: P prompts, T steps, L chunks, G branches, B anchors, K pairs of a step and an anchor, N rows
of a batch, D elements of a chunk x_t [N, *chunk_shape], here [N, frames, 3, height, width].
"""

import math
import re
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from reward import (ASSETS, CHUNKS, CHUNK_FRAMES, COLOURS, HALVES, JUDGED, JUDGE_PROMPTS,
                    MOTIONS, RANK, SHAPES, SIZE, TRAIN_PROMPTS, TrainingLog, UserError,
                    WeightedReward, attributes, check_gif, check_settings, checksum, choose_device,
                    command, deferred_interrupt, device_name, evaluate, load_buffer, load_reward,
                    open_run, option, parse_options, parse_rewards, parse_sweep, parse_times,
                    progress, read_adapter, read_model, read_prompts, report_not_finite,
                    reward_metrics, run_folder, save_buffer, save_gif, seeded, write_adapter,
                    write_report)


# ------------------------------------------------------------------ settings

METHODS = ("on-policy", "semi", "off-policy")
SECTIONS = {"steps": "training", "buffer_groups": "semi-on-policy and merging", "method": "run",
            "reward": "reward and evaluation"}               # the first setting of each section


@dataclass
class Training:
    """Settings of one training: default, meaning, allowed values, the paper's value."""
    steps: int = option(100, "iterations", "[1, 1e6]", "100")
    group: int = option(12, "branches G of a fork", "[2, 1024]", "12")
    sigma: float = option(0.5, "radius σ of the neighbours in noise (Eq. 1)", "(0, 1]", "0.5")
    anchors: int = option(4, "anchors B of the G candidates (symmetric sampling)", "[1, 1024]", "4")
    updates: int = option(2, "policy updates per iteration", "[1, 100]", "2")
    prompts: int = option(4, "prompts P per iteration", "[1, 1000]", "1 on each of 24 GPUs")
    clip_range: float = option(1e-4, "ε of the ratio clip (Eq. 3); inf: none", "(0, inf]", "1e-4")
    tau: float = option(0.03, "temperature τ₀ (Eq. 5) of squared distances averaged over a chunk's "
                        "D elements; the paper's, of their sum, is D times this", "(0, 1e6]")
    quasi_norm: float = option(0.0, "p of the quasi-norm of the advantages; 0: standard deviation",
                               "[0.1, 2]", "0.8 in Neighbor GRPO")
    floor: float = option(0.02, "lower bound of σ_r (Eq. 3), in the reward's unit", "(0, 1e6]")
    lr: float = option(1e-4, "learning rate of AdamW", "(0, 1e6]", "1e-5")
    rank: int = option(16, "rank r of the LoRA adapter", "[1, 4096]", "64")
    alpha: float = option(32.0, "α of the LoRA adapter, scaled by α/r", "(0, 1e6]", "128")
    targets: str = option(".*", "regular expression of the linear layers that get LoRA", "regex")
    micro: int = option(0, "most rows in a batch of the generator; 0: all, but 48 in judging",
                       "[0, 1e6]")


@dataclass
class Settings(Training):
    """Every setting of the command line. Raises UserError."""
    buffer_groups: int = option(100, "rollout groups in the buffer", "[1, 1e4]", "100")
    buffer: str = option("", "buffer.safetensors of an earlier run instead of collecting one")
    buffer_lr: float = option(1e-3, "learning rate of AdamW with the buffer", "(0, 1e6]", "1e-5")
    buffer_reward: str = option("ta=1", "rewards of the buffer, as --reward", paper="TA")
    sweep: str = option("0.4,0.6,0.8,1", "strengths s of the on-policy adapter", paper="0.4 to 1")

    method: str = option("", "train one adapter instead of the whole recipe", " | ".join(METHODS))
    sample: str = option("", "stream one clip of this prompt to --out (a .gif) instead")
    adapter: str = option("", "with --sample: the folder of the adapter to apply")
    out: str = option("", "run folder [runs/DATE-TIME]; with --sample the GIF [clip.gif]")
    resume: str = option("", "resume the run in this folder, with its settings")
    save_every: int = option(20, "iterations between checkpoints", "[1, 1e6]")
    base: str = option("", "weights of the base generator [assets/base.safetensors]")
    timesteps: str = option("", "sampler times, falling from 1, as 1,0.5,0.25,0.1 [the base's]")
    prompts_file: str = option("", "training prompts, one per line [the world's 96]")
    seed: int = option(0, "seed of training, sampling and judging", "[0, 9e18]")
    device: str = option("auto", "cpu, cuda, cuda:1 ...; auto is cuda if there is one")
    precision: str = option("fp32", "or bf16: autocast; its rounding exceeds the clip range",
                            "fp32 | bf16")

    reward: str = option("ta=1,vq=1,mq=1", "weights of ta, vq, mq (text alignment, visual, motion "
                         "quality), hps, aesthetic, module:function", paper="VideoAlign's, 1 each")
    clip: str = option("", "open_clip model of ta, vq, mq: ARCH:TAG, ARCH:FILE or a folder, as "
                       "ViT-B-32:laion2b_s34b_b79k [assets/clip]")
    judge_prompts: str = option("held-out", "held-out, or training: 24 of the training prompts, to "
                                "choose settings on", " | ".join(JUDGE_PROMPTS))
    judge_samples: int = option(8, "clips per prompt in the final table", "[1, 100]")
    judge_every: int = option(20, "iterations between points of the curve", "[1, 1e6]")

    __post_init__ = check_settings


# ------------------------------------------------------------------ generator

PATCH = 8
TIMESTEPS = (1.0, 0.1, 0.05, 0.02)      # Departure: lower than the base was distilled at, so that
                                        # the solver noise decides little, as in the paper's Fig. 6


class Context(NamedTuple):
    """h_{p-1}: all that is fixed before chunk p. Immutable: extend returns a new one."""
    words: Tensor           # [N, width]                                  the prompt
    kv: Tensor              # [N, layers, 2, heads, tokens, head width]   finished chunks

    def repeat(self, times: int) -> "Context":
        return Context(*(x.repeat_interleave(times, 0) for x in self))


class Block(nn.Module):
    """Attention and MLP, modulated by time and prompt (adaLN with a table per block, as in Wan)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.table = nn.Parameter(torch.randn(6, width) / width**0.5)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor, modulation: Tensor, past: Tensor) -> tuple[Tensor, tuple]:
        """x [N, M, W], modulation [N, 6, W], past [N, 2, heads, tokens, W/heads] -> x, (k, v)."""
        N, M, W = x.shape                                               # rows, tokens, width
        table = (modulation + self.table)[:, :, None]
        shift1, scale1, gate1, shift2, scale2, gate2 = table.unbind(1)  # [N, 1, W]
        y = F.layer_norm(x, (W,)) * (1 + scale1) + shift1
        q, k, v = self.qkv(y).view(N, M, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k = (F.rms_norm(z, z.shape[-1:]).to(v.dtype) for z in (q, k))    # [N, heads, M, W/heads]
        new = k, v
        k, v = (torch.cat([old.to(z.dtype), z], 2) for old, z in zip(past.unbind(1), new))
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5           # [N, heads, M, past + M]
        y = (scores.softmax(-1).to(v.dtype) @ v).transpose(1, 2).reshape(N, M, W)
        x = x + gate1 * self.out(y)
        y = F.layer_norm(x, (W,)) * (1 + scale2) + shift2
        return x + gate2 * self.down(F.gelu(self.up(y))), new


class Generator(nn.Module):
    """A chunk-causal video transformer. The method needs only this contract, of any torch module:

    begin(prompts)           -> Context   the context before the first chunk, N rows
    predict(x_t, t, context) -> x̂₀        F_θ: the clean chunk, like x_t [N, *chunk_shape]
    extend(context, x0)      -> Context   the context with a finished chunk added
    decode(latents)          -> clips     [N, L, *chunk_shape] -> what the reward takes, batch first
    timesteps                             the T sampler times as floats, from 1 down, 0 excluded
    chunk_shape, chunks                   shape of a latent chunk (any number of axes), and L
    flow                                  False: consistency model; True: flow matching, Euler steps
    solver_steps                          re-noisings per chunk: T - 1, or 0 with flow
    device                                where its tensors are

    x_t = (1 - t) x₀ + t ε, so t = 1 is pure noise; `timesteps` include a scheduler's shift.
    t is a float or float32 [N]. x_t is float32; a prediction of any dtype is cast to float32.
    No guidance: the policy is one call of predict. predict has no side effect, extend changes
    neither argument, and a row's result does not depend on the other rows. A Context can be any
    object with repeat(times): row n * times + b is row n again. Nothing writes to a Context, so
    copies may share memory. An Adapter applies to the nn.Linear layers of the module. Optional:
    `fingerprint`, a hash of the weights, so that an adapter of other weights is refused.
    """

    chunk_shape, chunks, fingerprint = (CHUNK_FRAMES, 3, SIZE, SIZE), CHUNKS, ""

    def __init__(self, width: int = 256, layers: int = 5, heads: int = 4,
                 timesteps: tuple = TIMESTEPS, flow: bool = False, bf16: bool = False):
        super().__init__()
        self.width, self.layers, self.heads = width, layers, heads
        self.timesteps, self.flow, self.bf16 = tuple(timesteps), flow, bf16
        self.tokens = (SIZE // PATCH) ** 2      # of a chunk: a patch spans its frames
        channels = CHUNK_FRAMES * 3
        self.patch = nn.Linear(channels * PATCH**2, width)
        self.position = nn.Parameter(0.02 * torch.randn(CHUNKS, self.tokens, width))
        self.word = nn.Embedding(len(COLOURS) + len(SHAPES) + len(MOTIONS), width)
        self.time = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.table = nn.Parameter(torch.randn(2, width) / width**0.5)
        self.head = nn.Linear(width, channels * PATCH**2)
        self.smooth = nn.Sequential(nn.Conv2d(channels, 32, 3, padding=1), nn.GELU(),
                                    nn.Conv2d(32, channels, 3, padding=1))     # across patches
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.smooth[2].weight)
        nn.init.zeros_(self.smooth[2].bias)

    @property
    def device(self) -> torch.device:
        return self.position.device

    @property
    def solver_steps(self) -> int:
        return 0 if self.flow else len(self.timesteps) - 1

    def begin(self, prompts: list[str]) -> Context:
        ids = attributes(prompts) + torch.tensor([0, len(COLOURS), len(COLOURS) + len(SHAPES)])
        words, N = self.word(ids.to(self.device)).sum(1), len(prompts)
        empty = words.new_zeros(N, self.layers, 2, self.heads, 0, self.width // self.heads)
        return Context(words, empty)

    def predict(self, x_t: Tensor, t: float | Tensor, context: Context) -> Tensor:
        return self(x_t, t, context)[0]

    def extend(self, context: Context, x0: Tensor) -> Context:
        new = torch.stack([torch.stack(kv, 1) for kv in self(x0, 0.0, context)[1]], 1)
        return Context(context.words, torch.cat([context.kv.to(new.dtype), new], 4))

    @staticmethod
    def decode(latents: Tensor) -> Tensor:
        """Pixels [N, L, *chunk_shape] in [-1, 1] -> [N, FRAMES, 3, SIZE, SIZE] in [0, 1]."""
        return (latents.flatten(1, 2).float() / 2 + 0.5).clamp(0, 1)

    def forward(self, x: Tensor, t: float | Tensor, context: Context) -> tuple[Tensor, list]:
        """x [N, *chunk_shape] at times t, a float or [N] -> x̂₀ like x, and the layers' (k, v)."""
        N, side = len(x), SIZE // PATCH
        p = context.kv.shape[4] // self.tokens                          # which chunk x is
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            t = t if isinstance(t, Tensor) else x.new_full((N,), t, dtype=torch.float32)
            frequency = torch.exp(-math.log(1e4) / 128 * torch.arange(128, device=x.device))
            angle = 1000 * t[:, None] * frequency
            condition = self.time(torch.cat([angle.cos(), angle.sin()], -1)) + context.words
            modulation = self.modulation(condition).view(N, 6, self.width)
            y = x.reshape(N, -1, side, PATCH, side, PATCH).permute(0, 2, 4, 1, 3, 5)
            y = self.patch(y.reshape(N, self.tokens, -1))               # [N, M, W]
            y = y + self.position[p] + context.words[:, None]
            kv = []
            for block, past in zip(self.blocks, context.kv.unbind(1)):
                y, new = block(y, modulation, past)
                kv.append(new)
            shift, scale = (condition[:, None] + self.table)[:, :, None].unbind(1)
            y = self.head(F.layer_norm(y, (self.width,)) * (1 + scale) + shift).float()
        y = y.view(N, side, side, -1, PATCH, PATCH).permute(0, 3, 1, 4, 2, 5)
        y = y.reshape(N, -1, SIZE, SIZE)                                # the frames, from patches
        return (y + self.smooth(y)).view(x.shape), kv


def load_generator(file: str | Path = "", device: str | torch.device = "cpu", bf16: bool = False,
                   timesteps: str = "") -> Generator:
    """A frozen base, sampled at its own timesteps or at others. Raises UserError."""
    model = read_model(Generator, file or ASSETS / "base.safetensors", bf16=bf16)
    model.timesteps = parse_times(timesteps) if timesteps else model.timesteps
    return model.to(device).requires_grad_(False)


# ------------------------------------------------------------------ sampler

class Noise(NamedTuple):
    """All noise of a rollout, drawn before it starts."""
    initial: Tensor         # [N, L, *chunk_shape]                   ε_p, where chunk p starts
    solver: Tensor          # [N, L, solver_steps, *chunk_shape]     re-noises x̂₀ between steps

    def repeat(self, times: int) -> "Noise":
        return Noise(*(x.repeat_interleave(times, 0) for x in self))


def draw_noise(model: Generator, rows: int, rng: torch.Generator) -> Noise:
    shape = rows, model.chunks, 1 + model.solver_steps, *model.chunk_shape
    noise = torch.randn(shape, generator=rng).to(model.device)
    return Noise(noise[:, :, 0], noise[:, :, 1:])


def comparison_point(model: Generator, x_t: Tensor, x0: Tensor, t, t_next) -> Tensor:
    """The point whose distances are compared. Consistency model: the clean prediction x̂₀ (Eq. 4).
    Flow matching: x_t at t_next, an Euler step of the ODE (Eq. 2)."""
    return x0 + t_next / t * (x_t - x0) if model.flow else x0


def denoise(model: Generator, context: Context, initial: Tensor,
            solver: Tensor) -> tuple[Tensor, Tensor]:
    """One chunk from its noise in T steps. Consistency model, as Self-Forcing samples: predict x̂₀,
    re-noise it to the next time. Flow matching: Euler steps.

    initial [N, *chunk_shape], solver [N, solver_steps, *chunk_shape] -> states x_t and comparison
    points, both [N, T, *chunk_shape]; the last comparison point is the finished chunk.
    """
    x_t, states, points = initial, [], []
    for i, (t, t_next) in enumerate(zip(model.timesteps, (*model.timesteps[1:], 0.0))):
        states.append(x_t)
        x0 = model.predict(x_t, t, context).float()
        points.append(comparison_point(model, x_t, x0, t, t_next))
        if t_next > 0:
            x_t = points[-1] if model.flow else (1 - t_next) * points[-1] + t_next * solver[:, i]
    return torch.stack(states, 1), torch.stack(points, 1)


@torch.no_grad()
def rollout(model: Generator, context: Context, noise: Noise, start: int,
            stop: int) -> tuple[Tensor, Context]:
    """Stream chunks start..stop-1: [N, stop - start, *chunk_shape], and the context after them
    (without the clip's last chunk, as nothing follows it)."""
    chunks = torch.empty_like(noise.initial[:, start:stop])
    for p in range(start, stop):
        points = denoise(model, context, noise.initial[:, p], noise.solver[:, p])[1]
        chunks[:, p - start] = points[:, -1]
        if p + 1 < model.chunks:
            context = model.extend(context, points[:, -1])
    return chunks, context


@torch.no_grad()
def sample(model: Generator, prompts: list[str], noise: Noise) -> Tensor:
    """Whole clips in [0, 1], [N, FRAMES, 3, SIZE, SIZE]."""
    return model.decode(rollout(model, model.begin(prompts), noise, 0, model.chunks)[0])


# ------------------------------------------------------------------ fork

class Fork(NamedTuple):
    """P groups of G branches at the pivot chunk: what an update needs of them."""
    prompts: list[str]
    prefix: Tensor          # [P, pivot, *chunk_shape]    finished chunks before the pivot
    context: Context        # h_{p-1}, P rows
    states: Tensor          # [P, T, G, *chunk_shape]     x_t⁽ⁱ⁾; the first is ε_p⁽ⁱ⁾
    candidates: Tensor      # [P, T, G, *chunk_shape]     x̂₀,t⁽ⁱ⁾ (comparison_point); last: x_p⁽ⁱ⁾


@torch.no_grad()
def fork(model: Generator, prompts: list[str], pivot: int, noise: Noise, initial: Tensor,
         solver: Tensor, micro: int = 0) -> tuple[Fork, Tensor]:
    """Algorithm 1, lines 2, 3 and 5 -> the Fork, and the clips [P, G, FRAMES, 3, SIZE, SIZE].

    initial [P, G, *chunk_shape] and solver [P, G, solver_steps, *chunk_shape] are the branches'
    noise of the pivot chunk (Method.branch_noise): the only place where branches can differ. The
    noise of all other chunks is shared (`noise`, P rows): controlled noise sharing. AR-CoPO
    perturbs initial and shares solver too. micro: at most this many rows at a time; 0: all.
    """
    P, parts = len(initial), []
    prefix, context = rollout(model, model.begin(prompts), noise, 0, pivot)         # line 2, P rows
    size = max(1, micro // P) if micro else initial.shape[1]
    for some, own_solver in zip(initial.split(size, 1), solver.split(size, 1)):
        n = some.shape[1]
        branch = context.repeat(n)                                                  # line 3
        states, points = denoise(model, branch, some.flatten(0, 1), own_solver.flatten(0, 1))
        chunks = [prefix.repeat_interleave(n, 0), points[:, -1:]]
        if pivot + 1 < model.chunks:                                                # line 5
            branch = model.extend(branch, points[:, -1])
            chunks += rollout(model, branch, noise.repeat(n), pivot + 1, model.chunks)[:1]
        latents = torch.cat(chunks, 1)
        broken = ~torch.cat([latents, points], 1).isfinite().flatten(1).all(1)
        latents[broken], states[broken], points[broken] = math.nan, 0.0, 0.0
        parts.append([x.unflatten(0, (P, n)) for x in (states, points, model.decode(latents))])
    # A branch that is not finite has no reward (explore). Its zeros keep the distances of its group
    # finite. It may still be drawn as an anchor.
    states, points, clips = (torch.cat(part, 1) for part in zip(*parts))
    return Fork(prompts, prefix, context, states.transpose(1, 2), points.transpose(1, 2)), clips


# ------------------------------------------------------------------ objective (pure functions)

def neighbor_noise(base: Tensor, sigma: float, group: int,
                   rng: torch.Generator | None = None) -> Tensor:
    """ε⁽ⁱ⁾ = √(1-σ²) ε* + σ δ⁽ⁱ⁾ with δ⁽ⁱ⁾ ~ N(0, I) (Eq. 1): the same expected squared norm.

    base: any shape -> [group, *base.shape]. sigma in [0, 1], else ValueError: 0 repeats the base,
    1 draws independent noise.
    """
    if not 0 <= sigma <= 1:
        raise ValueError(f"sigma must be in [0, 1], got {sigma}")
    if sigma == 0:
        return base.expand(group, *base.shape)
    device = rng.device if rng else base.device
    delta = torch.randn(group, *base.shape, generator=rng, device=device).to(base)
    return (1 - sigma**2) ** 0.5 * base + sigma * delta


def group_advantages(rewards: Tensor, power: float = 0.0, floor: float = 1e-6) -> Tensor:
    """A⁽ⁱ⁾ = (r⁽ⁱ⁾ - r̄) / σ_r over the last axis (Eq. 3), σ_r without Bessel's correction.

    rewards [..., G] -> [..., G]. With power p in (0, 2]: the quasi-norm A / (Σ|A|^p)^{1/p}
    (Neighbor GRPO Eq. 11, p = 0.8); p = 2 is A / √G. Departure: below `floor`, σ_r is replaced by
    it (the quasi-norm's result is scaled by σ_r / floor), so that a nearly flat group counts
    little. A reward that is not finite is left out of r̄ and σ_r, and its advantage is 0.
    """
    finite = rewards.isfinite()
    count = finite.sum(-1, keepdim=True).clamp_min(1)
    least = rewards.where(finite, math.inf).amin(-1, keepdim=True)
    centred = (rewards - least).where(finite, 0)    # equal rewards: exact zeros
    centred = (centred - centred.sum(-1, keepdim=True) / count).where(finite, 0)
    deviation = (centred.square().sum(-1, keepdim=True) / count).sqrt()
    if power == 0:
        return centred / deviation.clamp_min(floor)
    norm = centred.abs().pow(power).sum(-1, keepdim=True).pow(1 / power)
    return centred / norm.clamp_min(1e-30) * (deviation / floor).clamp_max(1)


def surrogate_log_policy(candidates: Tensor, anchor: Tensor, tau: float) -> Tensor:
    """log π_θ(i) = log softmax_i(-d⁽ⁱ⁾/τ), d⁽ⁱ⁾ = ‖x⁽ⁱ⁾ - x^(θ)‖² / D (Eq. 2; Eq. 5 with x̂₀).

    candidates [..., G, D] are constants, anchor [..., D] carries the gradient; leading axes
    broadcast -> [..., G], in float32 at least. Departure: d is the mean over the D elements, not
    the sum, so that one τ serves chunks of any size (the paper's τ is τ D).
    """
    dtype = torch.promote_types(anchor.dtype, torch.float32)
    d = (candidates.to(dtype) - anchor.to(dtype).unsqueeze(-2)).square().mean(-1)
    return F.log_softmax(-d / tau, -1)


def clipped_objective(log_ratio: Tensor, advantages: Tensor, clip_range: float) -> Tensor:
    """J = 1/G Σ_i min(ρ⁽ⁱ⁾ A⁽ⁱ⁾, clip(ρ⁽ⁱ⁾, 1-ε, 1+ε) A⁽ⁱ⁾) (Eq. 3), a scalar to be MAXIMISED.

    log_ratio [..., G] = log π_θ - log π_old; advantages broadcast to it; leading axes (prompts,
    steps, anchors) are averaged. clip_range ε = inf: no clip (the paper's off-policy baseline).
    For one anchor and θ = θ_old, ∂J/∂x^(θ) = 2/(GτD) Σ_i A⁽ⁱ⁾ x⁽ⁱ⁾, with or without the clip.
    """
    ratio = log_ratio.clamp_max(80).exp()       # finite, as inf · 0 is NaN
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    return torch.minimum(ratio * advantages, clipped * advantages).mean()


# ------------------------------------------------------------------ adapter

class Adapter:
    """LoRA next to linear layers: y = W x + (α/r) B A x (Hu et al. 2021); B starts at zero.

    The model is never changed: `with adapter.on(model):` adds the low-rank terms inside the block,
    and several adapters add up. weights: {layer: (A [r, in], B [out, r])}, float32 whatever the
    layer's dtype. Convolutions, embeddings and norms get no LoRA.
    """

    def __init__(self, weights: dict[str, tuple[Tensor, Tensor]], alpha: float):
        self.weights, self.alpha = weights, alpha
        self.rank = next(iter(weights.values()))[0].shape[0]

    @classmethod
    def new(cls, model: nn.Module, rank: int, alpha: float,
            rng: torch.Generator | None = None, targets: str = ".*") -> "Adapter":
        """targets: regular expression of whole layer names. Raises UserError if none matches."""
        weights = {}
        for name, layer in model.named_modules():
            if isinstance(layer, nn.Linear) and re.fullmatch(targets, name):
                A = torch.rand(rank, layer.in_features, generator=rng) * 2 - 1
                A, B = A / layer.in_features**0.5, torch.zeros(layer.out_features, rank)
                weights[name] = tuple(z.to(layer.weight.device).requires_grad_() for z in (A, B))
        if not weights:
            raise UserError(f"--targets {targets}: no nn.Linear layer of the model has such a name")
        return cls(weights, alpha)

    def parameters(self) -> list[Tensor]:
        return [z for pair in self.weights.values() for z in pair]

    @contextmanager
    def on(self, model: nn.Module):
        scale = self.alpha / self.rank

        def add(A: Tensor, B: Tensor, layer: nn.Module, x: tuple, y: Tensor) -> Tensor:
            with torch.autocast(y.device.type, enabled=False):          # in float32
                return y + F.linear(scale * F.linear(x[0].float(), A), B).to(y.dtype)

        with ExitStack() as hooks:
            for name, pair in self.weights.items():
                layer = model.get_submodule(name)
                hooks.enter_context(layer.register_forward_hook(partial(add, *pair)))
            yield model

    def save(self, folder: str | Path, record: dict) -> None:
        """In peft's format; the record, of which load checks base and timesteps, in the header."""
        write_adapter(Path(folder), self.weights, self.rank, self.alpha, record)

    @classmethod
    def load(cls, folder: str | Path, model: nn.Module) -> "Adapter":
        """Raises UserError: missing, broken, or made for another base or other times."""
        return cls(*read_adapter(Path(folder), model))


# ------------------------------------------------------------------ replay and update

def replay(model: Generator, branches: Fork, step: Tensor, anchor: Tensor) -> Tensor:
    """Eq. 4: predict again from the states of K pairs of a step and an anchor, indices [K] each, as
    one batch -> x^(θ) [P, K, *chunk_shape]. The only forward pass that is differentiated."""
    x_t = branches.states[:, step, anchor]
    P, K = x_t.shape[:2]
    x_t = x_t.flatten(0, 1)
    times = torch.stack([x_t.new_full((), t) for t in (*model.timesteps, 0.0)])     # on device
    t, t_next = times[step].repeat(P), times[step + 1].repeat(P)
    x0 = model.predict(x_t, t, branches.context.repeat(K)).float()
    column = lambda z: z.view(-1, *[1] * (x_t.ndim - 1))
    return comparison_point(model, x_t, x0, column(t), column(t_next)).unflatten(0, (P, K))


def recorded(model: Generator, branches: Fork, step: Tensor, anchor: Tensor) -> Tensor:
    """As replay, what the rollout itself predicted from these states."""
    return branches.candidates[:, step, anchor]


@dataclass
class Method(Training):
    """One training. On-policy AR-CoPO (Sec. 3.2); semi-on-policy: buffered; off-policy: buffered,
    clip_range inf. A subclass can explore in another way, or define another policy."""
    buffered: bool = False      # groups from the fixed buffer, π_old is the reference (Sec. 3.3)

    def branch_noise(self, noise: Noise, pivot: int,
                     rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Algorithm 1, line 4: the pivot's noise of each branch, [P, G, *chunk_shape] initial and
        [P, G, solver_steps, *chunk_shape] solver. Only the initial noise differs."""
        initial = neighbor_noise(noise.initial[:, pivot], self.sigma, self.group, rng)
        solver = neighbor_noise(noise.solver[:, pivot], 0.0, self.group)    # σ = 0: shared
        return initial.transpose(0, 1), solver.transpose(0, 1)

    def draw_pairs(self, T: int, rng: torch.Generator) -> Tensor:
        """Symmetric anchor sampling: B of the G candidates -> the K = T B pairs of a step and an
        anchor, [K, 2]. Departure: all prompts of a fork use the same pairs, and so do all updates
        with it."""
        anchors = torch.randperm(self.group, generator=rng)[: self.anchors]
        return torch.cartesian_prod(torch.arange(T), anchors)

    def log_policies(self, model: Generator, branches: Fork, step: Tensor, anchor: Tensor,
                     predict: Callable = replay) -> Tensor:
        """Algorithm 1, line 8: replay the pivot chunk -> log π_θ(i | s_t) [P, K, G]."""
        x = predict(model, branches, step, anchor).flatten(2)           # [P, K, D]
        candidates = branches.candidates[:, step].flatten(3)            # [P, K, G, D]
        return surrogate_log_policy(candidates, x, self.tau)


def average_(x: Tensor) -> Tensor:
    """The mean over the processes of torchrun, in place; x as it is in a single process."""
    if dist.is_initialized():
        dist.all_reduce(x)
        x /= dist.get_world_size()
    return x


def update(model: Generator, adapter: Adapter, branches: Fork, rewards: Tensor, method: Method,
           optimizer: torch.optim.Optimizer, updates: int, rng: torch.Generator) -> dict:
    """Algorithm 1, lines 7 to 9: `updates` steps of ascent on J, on the pivot chunk only.

    rewards [P, G] -> tensors replay_error (mean |log π_old - log π of the rollout|: rounding, if
    replay and rollout agree), ratio_first (mean ρ at the first update; on-policy 1 by definition),
    clip_fraction (share of terms whose gradient the clip sets to zero, at the last update),
    grad_norm (mean), skipped (updates that were not finite). No adapter may be on. J is a mean over
    pairs, so its gradient is summed over slices of method.micro rows, and averaged over processes,
    which have other groups.
    """
    advantages = group_advantages(rewards, method.quasi_norm, method.floor)[:, None]
    pairs = method.draw_pairs(len(model.timesteps), rng).to(model.device)
    slices = pairs.split(max(1, method.micro // len(rewards)) if method.micro else len(pairs))
    norms, ratios, skipped, old = [], [], 0, [None] * len(slices)       # old: log π_old
    if method.buffered:
        with torch.no_grad():       # the adapter is off: π_old is π_ref, the clip's trust region
            old = [method.log_policies(model, branches, *part.T) for part in slices]
    for _ in range(updates):
        optimizer.zero_grad()
        log_ratios = []
        with adapter.on(model):     # backward too: activation checkpointing runs the model again
            for i, part in enumerate(slices):
                log_policy = method.log_policies(model, branches, *part.T)          # line 8
                if old[i] is None:      # Departure: π_old is of a replay, on-policy of the first,
                    old[i] = log_policy.detach()        # as a rollout may round differently
                log_ratio = log_policy - old[i]
                term = clipped_objective(log_ratio, advantages, method.clip_range)
                term = term * len(part) / len(pairs)
                (-term).backward()                                                  # line 9
                log_ratios.append(log_ratio.detach())
        ratios.append(torch.cat(log_ratios, 1).exp())
        gradients = [average_(p.grad) for p in adapter.parameters() if p.grad is not None]
        norms.append(nn.utils.get_total_norm(gradients))
        if torch.isfinite(norms[-1]):
            optimizer.step()
        else:
            skipped += 1
    clipped = ((ratios[-1] - 1) * advantages.sign() > method.clip_range).float()
    rollouts = [method.log_policies(model, branches, *part.T, recorded) for part in slices]
    error = (torch.cat(old, 1) - torch.cat(rollouts, 1)).abs().mean()
    return {"replay_error": error, "ratio_first": ratios[0].mean(), "clip_fraction": clipped.mean(),
            "grad_norm": torch.stack(norms).mean(), "skipped": rewards.new_full((), skipped)}


# ------------------------------------------------------------------ groups

@torch.no_grad()
def context_after(model: Generator, prompts: list[str], prefix: Tensor) -> Context:
    """h_{p-1}, recomputed from the finished chunks [P, pivot, *chunk_shape]."""
    context = model.begin(prompts)
    for x0 in prefix.unbind(1):
        context = model.extend(context, x0)
    return context


def explore(model: Generator, method: Method, prompts: list[str], reward: Callable, P: int,
            rng: torch.Generator) -> tuple[Fork, dict[str, Tensor]]:
    """Algorithm 1, lines 1 to 5, for P of the prompts -> Fork, {"reward", ...: [P, G]}.

    reward(clips [N, ...] as model.decode gives them, prompts) -> {"reward": [N], others: [N]}.
    Departure: the P prompts share the pivot, so that they run as one batch.
    """
    chosen = [prompts[i] for i in torch.randperm(len(prompts), generator=rng)[:P]]
    pivot = int(torch.randint(model.chunks, (), generator=rng))                     # line 1
    noise = draw_noise(model, P, rng)
    initial, solver = method.branch_noise(noise, pivot, rng)                        # line 4
    branches, clips = fork(model, chosen, pivot, noise, initial, solver, method.micro)  # 2, 3, 5
    scores = reward(clips.flatten(0, 1), [prompt for prompt in chosen for _ in range(method.group)])
    finite = clips.reshape(P, method.group, -1).isfinite().all(2).cpu()   # else: no advantage
    scores = {name: x.view(P, -1).to(model.device) for name, x in scores.items()}
    scores = {name: x.where(finite.to(x.device), math.nan) for name, x in scores.items()}
    return (branches if finite.any(1).all() else repaired(model, branches, finite)), scores


def repaired(model: Generator, branches: Fork, finite: Tensor) -> Fork:
    """finite [P, G]: which branches are. A prompt with none may have a context of NaN, which would
    skip the update of all P: it gets the prompt and prefix of another."""
    rows = torch.where(finite.any(1), torch.arange(len(finite)), finite.sum(1).argmax()).tolist()
    prompts, prefix = [branches.prompts[i] for i in rows], branches.prefix[rows]
    context = context_after(model, prompts, prefix)
    return branches._replace(prompts=prompts, prefix=prefix, context=context)


Buffer = list[dict]
"""Groups of semi-on-policy training (Sec. 3.3), made once by the reference policy and never
changed: {"prompt": str, "reward" and its components: [G] and, in half precision, "prefix": [pivot,
*chunk_shape], "states", "candidates": [T, G, *chunk_shape]}. draw_from recomputes the context."""


def collect_buffer(model: Generator, method: Method, prompts: list[str], reward: Callable,
                   size: int, seed: int) -> Buffer:
    """`size` groups of the reference policy (no adapter may be on), in CPU memory."""
    buffer = []
    for first in progress(range(0, size, method.prompts), "buffer", unit="batch"):
        P = min(method.prompts, size - first)
        branches, scores = explore(model, method, prompts, reward, P, seeded(seed, "buffer", first))
        for i, prompt in enumerate(branches.prompts):
            group = {name: getattr(branches, name)[i].half().cpu() for name in HALVES}
            rewards = {name: x[i].clone().cpu() for name, x in scores.items()}
            buffer.append({"prompt": prompt} | group | rewards)
    return buffer


def draw_from(buffer: Buffer, model: Generator, P: int,
              rng: torch.Generator) -> tuple[Fork, dict[str, Tensor]]:
    """Up to P random groups, as explore returns them; no adapter may be on.

    Departures: all have the pivot of the first one drawn; tensors were stored in half precision;
    h_{p-1} is not stored but recomputed from the prefix.
    """
    shuffled = [buffer[i] for i in torch.randperm(len(buffer), generator=rng)]
    pivot = len(shuffled[0]["prefix"])
    groups = [group for group in shuffled if len(group["prefix"]) == pivot][:P]
    tensors = {name: torch.stack([group[name] for group in groups]).to(model.device).float()
               for name in groups[0] if name != "prompt"}
    prefix, states, candidates = (tensors.pop(x) for x in ("prefix", "states", "candidates"))
    prompts = [group["prompt"] for group in groups]
    context = context_after(model, prompts, prefix)
    return Fork(prompts, prefix, context, states, candidates), tensors      # the rest: rewards


# ------------------------------------------------------------------ training

def iterate(model: Generator, adapter: Adapter, optimizer: torch.optim.Optimizer, method: Method,
            groups: Callable, rng: torch.Generator) -> dict:
    """One iteration -> a row of metrics. groups(rng) gives what explore returns.

    pivot (from 1), what reward_metrics and update return, and seconds. On-policy, one batch of
    groups serves all updates (Algorithm 1); from the buffer each update draws its own, and the row
    has their means; not_finite and skipped are sums over draws. Metrics are means over processes.
    """
    began, rows, pivots = time.perf_counter(), [], []
    draws, updates = (method.updates, 1) if method.buffered else (1, method.updates)
    for _ in range(draws):
        with nullcontext() if method.buffered else adapter.on(model):
            branches, scores = groups(rng)                                          # lines 1 to 5
        rows.append(reward_metrics(scores, method.floor)
                    | update(model, adapter, branches, scores["reward"], method, optimizer,
                             updates, rng))                                         # lines 7 to 9
        pivots.append(str(branches.prefix.shape[1] + 1))
    table = torch.stack([torch.stack(list(row.values())) for row in rows])      # [draws, metrics]
    row = dict(zip(rows[0], average_(table.mean(0)).tolist()))
    row |= {name: row[name] * draws for name in ("skipped", "not_finite")}      # sums over draws
    return {"pivot": " ".join(pivots)} | row | {"seconds": time.perf_counter() - began}


def align(name: str, model: Generator, method: Method, groups: Callable, point: Callable,
          judge_every: int, save_every: int, seed: int, folder: Path,
          record: dict) -> tuple[Adapter, list[dict]]:
    """Train one adapter, from its checkpoint if there is one -> the adapter, the rows of iterate.

    point() gives the scores of a point of the curve. Writes the adapter with the record to
    folder/NAME, and the files of TrainingLog.
    """
    kind = "buffered" if method.buffered else "explored"    # each kind has its own random numbers
    adapter = Adapter.new(model, method.rank, method.alpha, seeded(seed, kind, "adapter"),
                          method.targets)
    optimizer = torch.optim.AdamW(adapter.parameters(), method.lr, weight_decay=0)
    log = TrainingLog(folder, name, adapter.parameters(), optimizer)
    process = (RANK,) if RANK else ()                       # each draws its own groups
    with deferred_interrupt() as interrupted:
        for step in log.steps(method.steps):                # step 0 only judges
            if step > 0:
                log.add_row(step, iterate(model, adapter, optimizer, method, groups,
                                          seeded(seed, kind, step, *process)))
            if step % judge_every == 0 or step == method.steps:
                with adapter.on(model):
                    log.add_point(step, point())
            stop = average_(torch.tensor(float(interrupted()), device=model.device)) > 0
            if step % save_every == 0 or step == method.steps or stop:
                adapter.save(folder / name, record | {"method": name, "step": step, "seed": seed,
                                                      "steps": method.steps})
                log.save()
            if stop:
                raise KeyboardInterrupt
    return adapter, log.rows


# ------------------------------------------------------------------ merging and the choice of s

def merge_adapters(*terms: tuple[Adapter, float]) -> Adapter:
    """Σ s_k Δ_k as one adapter, exactly: the ranks add up (Sec. 3.3: θ_ref + Δ_semi + s · Δ_on).
    Raises ValueError if the adapters have other layers."""
    if any(adapter.weights.keys() != terms[0][0].weights.keys() for adapter, s in terms):
        raise ValueError("the adapters must have the same layers")
    weights = {}
    for name in terms[0][0].weights:
        A = torch.cat([adapter.weights[name][0] for adapter, s in terms])
        B = torch.cat([adapter.weights[name][1] * (s * adapter.alpha / adapter.rank)
                       for adapter, s in terms], 1)
        weights[name] = A.detach(), B.detach()
    return Adapter(weights, alpha=float(A.shape[0]))                # α = r: the scales are in B


def choose_strength(scores: dict[float, tuple[float, float]],
                    base: tuple[float, float]) -> float | None:
    """Sec. 4.4: the largest s that improves both (reward, independent judge) over the base.

    None if none does. Departure: then the semi-on-policy adapter alone (s = 0) is used, which the
    paper's rule does not cover. Equal or NaN is no improvement.
    """
    return max((s for s, (reward, score) in scores.items()
                if reward > base[0] and score > base[1]), default=None)


# ------------------------------------------------------------------ evaluation

@torch.no_grad()
def sample_batches(model: Generator, prompts: list[str], rng: torch.Generator,
                   size: int) -> Tensor:
    """sample in batches (size 0: 48 prompts); the noise depends on rng, not on the weights."""
    size = size or 48
    parts = [prompts[i : i + size] for i in range(0, len(prompts), size)]
    return torch.cat([sample(model, part, draw_noise(model, len(part), rng))
                      for part in parts])


def judged(model: Generator, reward: Callable, prompts: list[str], size: int, samples: int,
           *stream: int | str) -> tuple[Tensor, dict[str, Tensor]]:
    """`samples` clips of each prompt, in batches of size, and their evaluation."""
    prompts = [prompt for prompt in prompts for _ in range(samples)]
    clips = sample_batches(model, prompts, seeded(*stream), size)
    return clips, evaluate(clips, prompts, reward)


def compare(model: Generator, adapters: dict[str, Adapter], sweep: list[float],
            judge_model: Callable) -> tuple[str, dict[str, Adapter], dict, dict]:
    """Judge the base, the adapters and, if the recipe's two are there, their merges (the rows of
    Tables 1 and 3). judge_model() -> clips and scores of the model as it is, on the same noise.
    Returns the name of the chosen model ("" if nothing was merged) and, by name, the adapters
    (None for the base), clips and scores."""
    models, strengths, clips, results = {"base": None} | adapters, {}, {}, {}
    if {"on-policy", "semi"} <= set(adapters):
        on, semi = adapters["on-policy"], adapters["semi"]
        strengths = {f"s = {s:g}": s for s in sweep}
        merged = {name: merge_adapters((semi, 1.0), (on, s)) for name, s in strengths.items()}
        models = {"base": None, "semi": semi} | merged | adapters
    for name, adapter in progress(models.items(), desc="judging", unit="model"):
        with adapter.on(model) if adapter else nullcontext():
            clips[name], results[name] = judge_model()
    both = {name: (scores["reward"].mean().item(), scores["judge"].mean().item())
            for name, scores in results.items()}
    s = choose_strength({s: both[name] for name, s in strengths.items()}, both["base"])
    chosen = f"s = {s:g}" if s is not None else "semi" if strengths else ""
    return chosen, models, clips, results


# ------------------------------------------------------------------ command line

def load(settings: Settings) -> tuple[Generator, WeightedReward, WeightedReward]:
    """The base, the reward and the buffer's reward.

    Departure: each reward is standardised on the base's clips before the weighted mean is taken.
    These clips do not depend on the seed.
    """
    device, clip = choose_device(settings.device), settings.clip or str(ASSETS / "clip")
    weights = parse_rewards(settings.reward, "reward")
    buffered = parse_rewards(settings.buffer_reward, "buffer-reward")
    model = load_generator(settings.base, device, settings.precision == "bf16", settings.timesteps)
    functions = {name: load_reward(name, device, clip) for name in weights | buffered}
    clips = sample_batches(model, TRAIN_PROMPTS, seeded(0, "calibration"), settings.micro)
    reward = WeightedReward(functions, weights, clips, TRAIN_PROMPTS)
    return model, reward, reward.reweighted(buffered)


def methods(settings: Settings) -> dict[str, Method]:
    on = Method(**{f.name: getattr(settings, f.name) for f in fields(Training)})    # Sec. 3.2
    semi = replace(on, lr=settings.buffer_lr, buffered=True)                        # Sec. 3.3
    return {"on-policy": on, "semi": semi, "off-policy": replace(semi, clip_range=math.inf)}


def run(settings: Settings, own: dict[str, Method] | None = None,
        wrap: Callable = lambda reward: reward) -> int:
    """Train the recipe's two adapters, or one by settings.method, or by the methods in `own`;
    judge them, and write all outputs to a run folder. Returns 0, or 1 if numbers were not finite.

    wrap: makes the reward of on-policy training from the plain reward, which all reports use.
    """
    began = time.perf_counter()
    settings, folder = open_run(settings)
    device = choose_device(settings.device)
    if dist.is_torchelastic_launched() and not dist.is_initialized():           # by torchrun
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    names = [settings.method] if settings.method else ["on-policy", "semi"]
    trainings = own or {name: methods(settings)[name] for name in names}
    sweep = parse_sweep(settings.sweep)
    prompts = read_prompts(settings.prompts_file, settings.prompts)
    model, reward, buffer_reward = load(settings)
    trained_on, file = wrap(reward), Path(settings.buffer or folder / "buffer.safetensors")
    record = {"base": model.fingerprint, "timesteps": list(model.timesteps)}
    hashed = checksum({}, {"prompts": prompts})
    about = record | {"group": settings.group, "sigma": settings.sigma, "flow": model.flow,
                      "reward": buffer_reward.weights, "reward models": buffer_reward.hashes(),
                      "training prompts": hashed}
    buffer = load_buffer(file, model, about) if settings.buffer or file.exists() else None
    Adapter.new(model, settings.rank, settings.alpha, targets=settings.targets)  # checks --targets
    judge_model = partial(judged, model, reward, JUDGE_PROMPTS[settings.judge_prompts],
                          settings.micro)
    point = lambda: judge_model(min(2, settings.judge_samples), settings.seed, "curve")[1]
    with run_folder(folder, settings, record | {"device": device_name(model.device),
                                                "prompts": hashed,
                                                "reward_scales": reward.scales}):
        adapters, rows = {}, []
        for name, method in trainings.items():
            if method.buffered and buffer is None:
                buffer = collect_buffer(model, method, prompts, buffer_reward,
                                        settings.buffer_groups, settings.seed)
                save_buffer(buffer, file, about)
            groups = (partial(draw_from, buffer, model, method.prompts) if method.buffered else
                      partial(explore, model, method, prompts, trained_on, method.prompts))
            adapters[name], new = align(name, model, method, groups, point,
                                        settings.judge_every, settings.save_every, settings.seed,
                                        folder, record)
            rows += new
        trained = time.perf_counter() - began
        chosen, models, clips, results = compare(model, adapters, sweep, partial(
            judge_model, settings.judge_samples, settings.seed, "judging"))
        if chosen:
            models[chosen].save(folder / "merged", record | {"method": f"merged, {chosen}", "step":
                                settings.steps, "steps": settings.steps, "seed": settings.seed})
        columns = ["reward", *reward.functions, *JUDGED]
        write_report(folder, columns, chosen, clips, results, settings.judge_prompts,
                     f"{trained / 60:.1f} minutes to load and train on {model.device} "
                     f"({settings.precision}), {(time.perf_counter() - began) / 60:.1f} in all.")
    return report_not_finite(rows, results, columns)


def stream(settings: Settings) -> int:
    """Generate one clip chunk by chunk and write it to a GIF."""
    file = check_gif(settings.out or "clip.gif")
    attributes([settings.sample])
    model = load_generator(settings.base, choose_device(settings.device),
                           settings.precision == "bf16", settings.timesteps)
    with Adapter.load(settings.adapter, model).on(model) if settings.adapter else nullcontext():
        context, chunks = model.begin([settings.sample]), []
        noise = draw_noise(model, 1, seeded(settings.seed, "sampling"))
        for p in progress(range(model.chunks), desc="streaming", unit="chunk"):
            new, context = rollout(model, context, noise, p, p + 1)
            chunks.append(new)
    clip = model.decode(torch.cat(chunks, 1))
    if not clip.isfinite().all():
        raise UserError("--sample: the clip is not finite; the adapter or base is broken")
    save_gif({"": clip[None]}, file, scale=8)
    print(f"wrote {file}")
    return 0


def parse(arguments: list | None = None, description: str = __doc__.split("\n\n")[0]) -> Settings:
    """Command-line arguments, as strings, numbers or paths, -> Settings. Raises UserError."""
    return parse_options(Settings, SECTIONS, arguments, description)


def main(arguments: list | None = None) -> int:
    def call() -> int:
        settings = parse(arguments)
        return stream(settings) if settings.sample else run(settings)
    return command("arcopo", call)


if __name__ == "__main__":
    sys.exit(main())
