"""AR-CoPO: align a streaming, few-step, autoregressive video generator with rewards.

    python arcopo.py --steps 100                        the recipe: train two adapters, merge, judge
    python arcopo.py --method on-policy --steps 100     one adapter; or --method semi
    python arcopo.py --resume runs/NAME --steps 200     continue a run, here up to 200 iterations
    python arcopo.py --sample "a red circle moving right" --adapter runs/NAME/merged
    torchrun --nproc-per-node=8 arcopo.py --steps 100   each process updates on its own groups

He et al., AR-CoPO: Align Autoregressive Video Generation with Contrastive Policy Optimization,
arXiv 2603.17461 ("the paper"), built on He et al., Neighbor GRPO, arXiv 2511.16955. The generator
is a miniature of the one in Self-Forcing, arXiv 2506.08009; CLIP scores stand in for VideoAlign, a
procedural judge for VBench (reward.py). The word "Departure" marks each place where this file
differs from the paper, except in defaults; --help shows the paper's values. The method comes first,
then the script that runs it.

Symbol          in the paper      here
L, p            Sec. 3.2          model.chunks; pivot, counted from 0 (from 1 in all output)
T, t            Sec. 3.2          model.timesteps, and one of them; t_next: 0 after the last
F_θ(x_t, h, t)  Eq. 4             model.predict(x_t, t, context)
h_{p-1}         Alg. 1            Context
ε*, ε⁽ⁱ⁾, σ, G  Eq. 1             noise.initial, neighbor_noise, sigma, group
x̂₀⁽ⁱ⁾, x_t⁽ⁱ⁾   Eq. 4, Eq. 2      candidates: clean predictions x̂₀⁽ⁱ⁾ of a consistency model;
                                  for flow matching Eq. 2's x_t⁽ⁱ⁾, after the Euler step
x̂₀^(θ), B       Eq. 4, Sec. 3.1   replay, anchors
d⁽ⁱ⁾, τ, π_θ(i) Eq. 2, 5          surrogate_log_policy, tau (τ₀)
r⁽ⁱ⁾, A⁽ⁱ⁾      Eq. 3             reward, group_advantages
ρ⁽ⁱ⁾, ε (clip)  Eq. 3             exp(log_ratio), clip_range
J(θ)            Eq. 3             clipped_objective
the buffer      Sec. 3.3          collect_buffer, draw_from
Δ, s            Sec. 3.3, 4.4     Adapter, merge_adapters, choose_strength

Shapes: P prompts, T steps, L chunks, G branches, B anchors, K pairs of a step and an anchor, N rows
of a batch, D elements of a chunk. A batch x_t is [N, *chunk_shape], here [N, frames, 3, height,
width]. Every rng is a torch.Generator on the CPU.
"""

import argparse
import csv
import hashlib
import json
import math
import os
import re
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    print("loading torch", flush=True)              # takes seconds

import imageio.v3 as iio
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from tqdm import tqdm

from reward import (ASSETS, CHUNK_FRAMES, CHUNKS, JUDGE_PROMPTS, SIZE, TRAIN_PROMPTS, WORDS,
                    UserError, attributes, evaluate, load_rewards)

# On CUDA: convolutions in true fp32 (the error of TF32 would reach the clip range of 1e-4), and
# with deterministic gradients, so that the same seed gives the same numbers.
torch.backends.cudnn.conv.fp32_precision = "ieee"
torch.backends.cudnn.deterministic = True


# ------------------------------------------------------------------ settings

def option(default, text: str, paper: str = "", choices: tuple = ()):
    """A setting: its default, its meaning, the paper's value, the values it can have."""
    return field(default=default, metadata={"text": text, "paper": paper, "choices": choices})


@dataclass
class Method:
    """Settings of the method. Raises ValueError if one is out of range."""
    group: int = option(12, "branches G of a fork", "12")
    sigma: float = option(0.5, "radius σ of the neighbours in noise (Eq. 1)", "0.5")
    anchors: int = option(4, "anchors B of the G candidates (symmetric sampling)", "4")
    updates: int = option(2, "policy updates per iteration", "2")
    prompts: int = option(4, "prompts P per iteration", "1 in Alg. 1, on 24 GPUs")
    clip_range: float = option(1e-4, "ε of the ratio clip (Eq. 3); inf: no clip", "1e-4")
    tau: float = option(0.03, "temperature τ₀ of distances averaged over elements (Eq. 5: summed)")
    quasi_norm: float = option(0.0, "p of the quasi-norm of the advantages; 0: standard deviation",
                               "0.8 in Neighbor GRPO")
    floor: float = option(0.02, "lower bound of σ_r (Eq. 3), in the reward's unit")
    micro: int = option(0, "largest batch of the generator, in rows (training takes at least "
                        "--prompts rows); 0: no limit in training, 96 where clips are only sampled")

    def __post_init__(self):
        if self.group < 2:
            raise ValueError(f"group {self.group}: must be at least 2, to compare rewards")
        largest = {"anchors": self.group, "sigma": 1, "quasi_norm": 2, "clip_range": math.inf}
        for f in fields(self):
            value, top = getattr(self, f.name), largest.get(f.name, 1e18)
            if f.type in (int, float) and not (0 < value <= top or value == f.default == 0):
                least = "at least" if f.default == 0 else "above"
                most = "finite" if top == 1e18 else f"at most {top:g}"
                raise ValueError(f"{f.name} {value}: must be {least} 0 and {most}")


# ------------------------------------------------------------------ generator

PATCH = 8                               # px
TIMESTEPS = (1.0, 0.1, 0.05, 0.02)      # Departure: so low that solver noise decides little, as in
                                        # the paper's Fig. 6


class Context(NamedTuple):
    """h_{p-1}: all that is fixed before chunk p."""
    words: Tensor           # [N, width]   the prompt
    kv: list                # of each block: keys, values of the finished chunks, two tensors
                            # [N, heads, tokens, head width]

    def repeat(self, times: int) -> "Context":
        kv = [[x.repeat_interleave(times, 0) for x in pair] for pair in self.kv]
        return Context(self.words.repeat_interleave(times, 0), kv)


class Block(nn.Module):
    """Attention and MLP, modulated by time and prompt (adaLN with a table per block, as in Wan).
    The attention is explicit: torch's fused kernels are not deterministic on CUDA by default."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.table = nn.Parameter(torch.randn(6, width) / width**0.5)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor, modulation: Tensor, past: list) -> tuple[Tensor, list]:
        """x [N, M, W], modulation [N, 6, W], past: keys and values [N, heads, S, W/heads] of the S
        tokens before -> x, and keys and values [N, heads, S + M, W/heads]."""
        N, M, W = x.shape                                               # rows, tokens, width
        six = (modulation + self.table)[:, :, None]
        shift1, scale1, gate1, shift2, scale2, gate2 = six.unbind(1)    # [N, 1, W]
        y = F.layer_norm(x, (W,)) * (1 + scale1) + shift1
        qk, v = self.qkv(y).view(N, M, 3, self.heads, -1).split([2, 1], 2)
        q, k = F.rms_norm(qk, qk.shape[-1:]).permute(2, 0, 3, 1, 4)     # [N, heads, M, W/heads]
        keys = torch.cat([past[0], k], 2)                               # [N, heads, S + M, ...]
        values = torch.cat([past[1], v.squeeze(2).transpose(1, 2)], 2)
        scores = q @ keys.transpose(-1, -2) / q.shape[-1] ** 0.5        # [N, heads, M, S + M]
        y = (scores.softmax(-1) @ values).transpose(1, 2).reshape(N, M, W)
        x = x + gate1 * self.out(y)
        y = F.layer_norm(x, (W,)) * (1 + scale2) + shift2
        return x + gate2 * self.down(F.gelu(self.up(y))), [keys, values]


class Generator(nn.Module):
    """A chunk-causal video transformer. The method needs only this contract, of any torch module:

    begin(prompts)           -> Context   the context before the first chunk, N rows
    predict(x_t, t, context) -> x̂₀        F_θ: the clean chunk, like x_t [N, *chunk_shape]
    extend(context, x0)      -> Context   a new one, with a finished chunk added
    decode(latents)          -> clips     [N, L, *chunk_shape] -> the reward's tensor, batch first
    timesteps                             the T sampler times as floats, from 1 down, 0 excluded
    chunk_shape, chunks                   shape of a latent chunk (any number of axes), and L
    flow                                  False: consistency model; True: flow matching, Euler steps
    device                                where its tensors are

    x_t = (1 - t) x₀ + t ε, in float32; t is a float or float32 [N]. `timesteps` are after a
    scheduler's shift, the same for all chunks. A prediction may have any dtype. There is no
    guidance: the policy is one call of predict. A row's result does not depend on the other rows. A
    Context is any object with repeat(times): row n becomes rows n * times to n * times + times - 1.
    Nothing writes to it, so the copies may share memory. An Adapter applies to nn.Linear layers.

    A flow map predicts the average velocity u from t to the next time (predict looks for the one
    nearest to t in `timesteps`, as t may be rounded to float32); then flow = True, and predict
    returns x_t - t u. Chunks of unequal length are padded to chunk_shape, and predict returns zeros
    for the padding (with flow = True its noise still enters the distances, but no gradient does).
    Optional: `fingerprint`, a hash of the weights, by which an adapter trained on other weights is
    refused.
    """

    chunk_shape, chunks = (CHUNK_FRAMES, 3, SIZE, SIZE), CHUNKS     # the paper: 7, of 3 latents
    fingerprint = ""

    def __init__(self, width: int = 256, layers: int = 5, heads: int = 4,
                 timesteps: tuple = TIMESTEPS, flow: bool = False):
        super().__init__()
        self.width, self.layers, self.heads = width, layers, heads
        self.timesteps, self.flow = tuple(timesteps), flow
        self.tokens = (SIZE // PATCH) ** 2        # of a chunk: a patch spans its frames
        channels = CHUNK_FRAMES * 3
        self.patch = nn.Linear(channels * PATCH**2, width)
        self.position = nn.Parameter(0.02 * torch.randn(CHUNKS, self.tokens, width))
        self.word = nn.Embedding(sum(map(len, WORDS)), width)
        self.time = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.table = nn.Parameter(torch.randn(2, width) / width**0.5)
        self.head = nn.Linear(width, channels * PATCH**2)
        self.smooth = nn.Sequential(nn.Conv2d(channels, 32, 3, padding=1), nn.GELU(),
                                    nn.Conv2d(32, channels, 3, padding=1))     # across patches
        for last in (self.head.weight, self.smooth[2].weight, self.smooth[2].bias):
            nn.init.zeros_(last)

    @property
    def device(self) -> torch.device:
        return self.position.device

    def begin(self, prompts: list[str]) -> Context:
        colours, shapes, motions = map(len, WORDS)
        ids = attributes(prompts) + torch.tensor([0, colours, colours + shapes])
        words, N = self.word(ids.to(self.device)).sum(1), len(prompts)
        empty = words.new_zeros(N, self.heads, 0, self.width // self.heads)
        return Context(words, [[empty, empty]] * self.layers)

    def predict(self, x_t: Tensor, t: float | Tensor, context: Context) -> Tensor:
        N, side = len(x_t), SIZE // PATCH
        y, condition, _ = self.transform(x_t, t, context)
        shift, scale = (condition[:, None] + self.table)[:, :, None].unbind(1)
        y = self.head(F.layer_norm(y, (self.width,)) * (1 + scale) + shift).float()
        y = y.view(N, side, side, -1, PATCH, PATCH).permute(0, 1, 4, 2, 5, 3)
        y = y.reshape(N, SIZE, SIZE, -1).permute(0, 3, 1, 2)    # the frames, from patches
        return (y + self.smooth(y)).reshape(x_t.shape)

    def extend(self, context: Context, x0: Tensor) -> Context:
        return Context(context.words, self.transform(x0, 0.0, context)[2])

    @staticmethod
    def decode(latents: Tensor) -> Tensor:
        """Pixels [N, L, *chunk_shape] in [-1, 1] -> [N, frames, 3, height, width] in [0, 1]."""
        return (latents.flatten(1, 2).float() / 2 + 0.5).clamp(0, 1)

    def transform(self, x: Tensor, t: float | Tensor,
                  context: Context) -> tuple[Tensor, Tensor, list]:
        """All blocks on x [N, *chunk_shape] at times t, a float or [N] -> tokens [N, M, W], their
        condition (time and prompt) [N, W], and the kv of the context with x added."""
        N, side = len(x), SIZE // PATCH
        p = context.kv[0][0].shape[2] // self.tokens                    # which chunk x is
        if p >= len(self.position):
            raise ValueError(f"chunk {p + 1}: this model has positions for {len(self.position)}")
        t = t if isinstance(t, Tensor) else x.new_full((N,), t, dtype=torch.float32)
        frequency = torch.exp(-math.log(1e4) / 128 * torch.arange(128, device=x.device))
        angle = 1000 * t[:, None] * frequency
        condition = self.time(torch.cat([angle.cos(), angle.sin()], -1)) + context.words
        modulation = self.modulation(condition).view(N, 6, self.width)
        y = x.reshape(N, -1, side, PATCH, side, PATCH).permute(0, 2, 4, 1, 3, 5)
        y = self.patch(y.reshape(N, self.tokens, -1))                   # [N, M, W]
        y = y + self.position[p] + context.words[:, None]
        kv = []
        for block, past in zip(self.blocks, context.kv):
            y, pair = block(y, modulation, past)
            kv.append(pair)
        return y, condition, kv


# ------------------------------------------------------------------ sampler

class Noise(NamedTuple):
    """All noise of a rollout, drawn before it starts."""
    initial: Tensor         # [N, L, *chunk_shape]          ε_p, where chunk p starts
    solver: Tensor          # [N, L, T - 1, *chunk_shape]   re-noises x̂₀ between steps; flow: empty

    def repeat(self, times: int) -> "Noise":
        return Noise(*(x.repeat_interleave(times, 0) for x in self))


def draw_noise(model: Generator, rows: int, rng: torch.Generator) -> Noise:
    """Noise for N = rows. Raises ValueError if a sampler time is not in (0, 1]."""
    if not 0 < min(model.timesteps) <= max(model.timesteps) <= 1:
        raise ValueError(f"timesteps {model.timesteps}: must be in (0, 1], not 0 to 1000")
    solver_steps = 0 if model.flow else len(model.timesteps) - 1
    shape = rows, model.chunks, 1 + solver_steps, *model.chunk_shape
    noise = torch.randn(shape, generator=rng).to(model.device)
    return Noise(noise[:, :, 0], noise[:, :, 1:])


def candidate(model: Generator, x_t: Tensor, x0: Tensor, t, t_next) -> Tensor:
    """What distances compare, candidate or anchor. Consistency model: the clean prediction x̂₀ (Eq.
    4). Flow matching: x_t at t_next, an Euler step of the ODE (Eq. 2)."""
    return x0 + t_next / t * (x_t - x0) if model.flow else x0


def denoise(model: Generator, context: Context, initial: Tensor,
            solver: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """One chunk from its noise in T steps. Consistency model, as Self-Forcing samples: predict x̂₀,
    re-noise it to the next time. Flow matching: Euler steps.

    initial [N, *chunk_shape], solver [N, T - 1, *chunk_shape] -> the state x_t and the candidate of
    each step, two lists of T tensors like initial; the last candidate is the finished chunk.
    """
    x_t, states, candidates = initial, [], []
    for i, (t, t_next) in enumerate(zip(model.timesteps, (*model.timesteps[1:], 0.0))):
        states.append(x_t)
        x0 = model.predict(x_t, t, context).float()
        candidates.append(candidate(model, x_t, x0, t, t_next))
        if model.flow:
            x_t = candidates[-1]
        elif t_next > 0:
            x_t = (1 - t_next) * x0 + t_next * solver[:, i]
    return states, candidates


@torch.no_grad()
def rollout(model: Generator, context: Context, noise: Noise, start: int,
            stop: int) -> tuple[Tensor, Context]:
    """Stream chunks start..stop-1: [N, stop - start, *chunk_shape], and the context after them
    (without the clip's last chunk, as nothing follows it)."""
    chunks = torch.empty_like(noise.initial[:, start:stop])
    for p in range(start, stop):
        _, candidates = denoise(model, context, noise.initial[:, p], noise.solver[:, p])
        chunks[:, p - start] = candidates[-1]
        if p + 1 < model.chunks:
            context = model.extend(context, candidates[-1])
    return chunks, context


@torch.no_grad()
def sample(model: Generator, prompts: list[str], noise: Noise) -> Tensor:
    """Whole clips, N of them, as model.decode gives them."""
    return model.decode(rollout(model, model.begin(prompts), noise, 0, model.chunks)[0])


# ------------------------------------------------------------------ fork

class Fork(NamedTuple):
    """P groups of G branches at the pivot chunk. replay reads context and states, update reads the
    candidates. A buffer stores all but the context, which draw_from recomputes from prompts and
    prefix."""
    prompts: list[str]
    prefix: Tensor          # [P, pivot, *chunk_shape]    finished chunks before the pivot
    context: Context        # h_{p-1}, P rows
    states: Tensor          # [P, T, G, *chunk_shape]     x_t⁽ⁱ⁾, the network's inputs, ε_p⁽ⁱ⁾ first
    candidates: Tensor      # [P, T, G, *chunk_shape]     of each step; the last is x_p⁽ⁱ⁾


def neighbor_noise(base: Tensor, sigma: float, group: int,
                   rng: torch.Generator | None = None) -> Tensor:
    """ε⁽ⁱ⁾ = √(1-σ²) ε* + σ δ⁽ⁱ⁾ with δ⁽ⁱ⁾ ~ N(0, I) (Eq. 1): the same expected squared norm.
    base: any shape -> [group, *base.shape]. sigma: in [0, 1]."""
    device = rng.device if rng else base.device
    delta = torch.randn(group, *base.shape, generator=rng, device=device).to(base)
    return math.sqrt(1 - sigma**2) * base + sigma * delta


def branch_noise(noise: Noise, pivot: int, sigma: float, group: int,
                 rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """The noise of the pivot chunk: of each branch its own initial noise [P, G, *chunk_shape]
    (Algorithm 1, line 4), and the solver noise [P, G, T - 1, *chunk_shape] that all share."""
    initial = neighbor_noise(noise.initial[:, pivot], sigma, group, rng).transpose(0, 1)
    solver = noise.solver[:, pivot, None].expand(-1, group, *noise.solver.shape[2:])
    return initial, solver


@torch.no_grad()
def fork(model: Generator, prompts: list[str], pivot: int, noise: Noise, initial: Tensor,
         solver: Tensor, micro: int = 0) -> tuple[Fork, Tensor]:
    """Algorithm 1, lines 2, 3 and 5 without the reward -> the Fork, and the clips [P, G, ...] that
    model.decode gives.

    initial and solver are the branches' noise of the pivot chunk (branch_noise), the only place
    where branches can differ: the noise of all other chunks is shared (`noise`, P rows). This is
    the paper's controlled noise sharing. micro: at most this many rows at a time, but at least one
    branch of each prompt; 0: all branches.
    """
    P, G = initial.shape[:2]
    prefix, context = rollout(model, model.begin(prompts), noise, 0, pivot)         # line 2, P rows
    states = initial.new_empty(P, len(model.timesteps), G, *model.chunk_shape)
    candidates = torch.empty_like(states)
    size = max(1, micro // P) if micro else G
    for i in range(0, G, size):
        first = initial[:, i : i + size]                                    # [P, n, *chunk_shape]
        n = first.shape[1]                                                  # branches
        branch = context.repeat(n)                                          # line 3, P n rows
        visited, reached = denoise(model, branch, first.flatten(0, 1),              # line 5
                                   solver[:, i : i + n].flatten(0, 1))
        for step in range(len(model.timesteps)):
            states[:, step, i : i + n] = visited[step].view_as(first)
            candidates[:, step, i : i + n] = reached[step].view_as(first)
        latents = first.new_empty(P * n, model.chunks, *model.chunk_shape)
        latents[:, :pivot] = prefix.repeat_interleave(n, 0)
        latents[:, pivot] = reached[-1]
        if pivot + 1 < model.chunks:
            branch = model.extend(branch, reached[-1])
            latents[:, pivot + 1 :] = rollout(model, branch, noise.repeat(n), pivot + 1,
                                              model.chunks)[0]
        decoded = model.decode(latents)
        if i == 0:
            clips = decoded.new_empty(P, G, *decoded.shape[1:])
        clips[:, i : i + n] = decoded.view(P, n, *decoded.shape[1:])
    return Fork(prompts, prefix, context, states, candidates), clips


# ------------------------------------------------------------------ objective (pure functions)

def group_advantages(rewards: Tensor, power: float = 0.0, floor: float = 1e-6) -> Tensor:
    """A⁽ⁱ⁾ = (r⁽ⁱ⁾ - r̄) / σ_r over the last axis (Eq. 3), σ_r without Bessel's correction.

    rewards [..., G] -> [..., G] in float32 at least. With power p in (0, 2]: the quasi-norm
    A / (Σ|A|^p)^{1/p} (Neighbor GRPO Eq. 11, p = 0.8); p = 2 is A / √G. Departure: below `floor`,
    σ_r is replaced by it (the quasi-norm's result is scaled by σ_r / floor), so that a nearly flat
    group counts little. A reward that is not finite is left out, and its advantage is 0.
    """
    dtype = torch.promote_types(rewards.dtype, torch.float32)
    rewards = rewards.to(dtype).where(rewards.isfinite(), math.nan)
    rewards = rewards - rewards.nan_to_num(math.inf).amin(-1, keepdim=True)     # 0 if equal
    centred = rewards - rewards.nanmean(-1, keepdim=True)
    deviation = centred.square().nanmean(-1, keepdim=True).sqrt()
    if power == 0:
        return (centred / deviation.clamp_min(floor)).nan_to_num()
    norm = centred.abs().pow(power).nansum(-1, keepdim=True).pow(1 / power)
    return (centred / norm.clamp_min(1e-30) * (deviation / floor).clamp_max(1)).nan_to_num()


def surrogate_log_policy(candidates: Tensor, anchor: Tensor, tau: float) -> Tensor:
    """log π_θ(i) = log softmax_i(-d⁽ⁱ⁾/τ), d⁽ⁱ⁾ = ‖x⁽ⁱ⁾ - x^(θ)‖² / D (Eq. 2; Eq. 5 with x̂₀).

    candidates [..., G, D] are constants, anchor [..., D] carries the gradient; leading axes
    broadcast -> [..., G], in float32 at least. Departure: d is the mean over the D elements, not
    the sum, so that one τ serves chunks of any size. The paper's τ, whose value it does not give,
    is τ D.
    """
    dtype = torch.promote_types(anchor.dtype, torch.float32)
    pair = torch.broadcast_tensors(candidates.to(dtype), anchor.to(dtype).unsqueeze(-2))
    d = F.mse_loss(*pair, reduction="none").sum(-1) / anchor.shape[-1]     # faster than mean(-1)
    return F.log_softmax(-d / tau, -1)


def clipped_objective(log_ratio: Tensor, advantages: Tensor, clip_range: float) -> Tensor:
    """J = 1/G Σ_i min(ρ⁽ⁱ⁾ A⁽ⁱ⁾, clip(ρ⁽ⁱ⁾, 1-ε, 1+ε) A⁽ⁱ⁾) (Eq. 3), a scalar to be MAXIMISED.

    log_ratio [..., G] = log π_θ - log π_old; advantages broadcast to it. ε = inf: no clip (the
    paper's off-policy baseline). Departures: Eq. 3 is for one state; leading axes (prompts, steps,
    anchors) are averaged. ρ is at most e^80, because inf · 0 would be NaN. For one anchor, θ =
    θ_old and Σ A = 0, ∂J/∂x^(θ) = 2/(GτD) Σ_i A⁽ⁱ⁾ x⁽ⁱ⁾, with or without the clip.
    """
    ratio = log_ratio.clamp_max(80).exp()
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    return torch.minimum(ratio * advantages, clipped * advantages).mean()


# ------------------------------------------------------------------ adapter

PEFT = "base_model.model."                          # before a layer's name in peft's files


class Adapter:
    """LoRA next to linear layers: y = W x + (α/r) B A x (Hu et al. 2021); B starts at zero.

    update and iterate need only parameters() and on(model) from an adapter, so peft's LoRA works
    too (examples/peft_adapter.py). weights: {layer: (A [r, in], B [out, r])}, float32 whatever the
    layer's dtype. Convolutions, embeddings and norms get no LoRA.
    """

    def __init__(self, weights: dict[str, tuple[Tensor, Tensor]], alpha: float):
        self.weights, self.alpha = weights, alpha
        self.rank = next(iter(weights.values()))[0].shape[0]
        self.applied = False
        self.merged = {}        # {layer: the tensor for its merged weight}, set by cuda_graphs

    @classmethod
    def new(cls, model: nn.Module, rank: int, alpha: float,
            rng: torch.Generator | None = None, targets: str = ".*") -> "Adapter":
        """targets: regular expression of whole layer names. Raises ValueError if none matches."""
        weights = {}
        for name, layer in model.named_modules():
            if isinstance(layer, nn.Linear) and re.fullmatch(targets, name):
                A = torch.rand(rank, layer.in_features, generator=rng) * 2 - 1
                A, B = A / layer.in_features**0.5, torch.zeros(layer.out_features, rank)
                weights[name] = tuple(z.to(layer.weight.device).requires_grad_() for z in (A, B))
        if not weights:
            raise ValueError(f"targets {targets}: no nn.Linear layer of the model has such a name")
        return cls(weights, alpha)

    def parameters(self) -> list[Tensor]:
        return [z for pair in self.weights.values() for z in pair]

    @contextmanager
    def on(self, model: nn.Module):
        """Inside, the model is the adapted one. Hooks add the low-rank terms to the outputs; if the
        block is entered under torch.no_grad, float32 layers get merged weights, which is faster.
        The model is restored on exit. Several adapters add up; one that is already on raises
        RuntimeError."""
        if self.applied:
            raise RuntimeError("the adapter is on already; update and iterate put it on themselves")
        scale = self.alpha / self.rank
        dynamo = sys.modules.get("torch._dynamo")
        if dynamo and dynamo.config.skip_nnmodule_hook_guards:
            dynamo.config.skip_nnmodule_hook_guards = False
            dynamo.reset()              # else torch.compile would use code traced without the hooks

        def add(A: Tensor, B: Tensor, layer: nn.Module, x: tuple, given: dict, y: Tensor) -> Tensor:
            x = x[0] if x else given["input"]
            with torch.autocast(y.device.type, enabled=False):          # in float32
                return y + F.linear(F.linear(x.float(), A) * scale, B).to(y.dtype)

        with ExitStack() as undo:
            undo.callback(setattr, self, "applied", False)
            self.applied = True
            for name, (A, B) in self.weights.items():
                layer = model.get_submodule(name)
                parameters = layer._parameters
                weight = parameters.get("weight")                       # None: parametrized
                if torch.is_grad_enabled() or weight is None or weight.dtype != A.dtype:
                    hook = layer.register_forward_hook(partial(add, A, B), with_kwargs=True)
                    undo.enter_context(hook)
                else:
                    undo.callback(parameters.update, weight=weight)
                    place = self.merged.get(name)                       # None: a new tensor
                    with torch.autocast(weight.device.type, enabled=False):
                        merged = torch.addmm(weight, B, A, alpha=scale, out=place)
                    parameters["weight"] = nn.Parameter(merged, requires_grad=False)
            yield

    def save(self, folder: str | Path, model: nn.Module) -> None:
        """In peft's format; the header of the weights has what the adapter was trained on."""
        file = Path(folder) / "adapter_model.safetensors"
        file.parent.mkdir(parents=True, exist_ok=True)
        tensors = {f"{PEFT}{name}.lora_{letter}.weight": z.detach().cpu().contiguous()
                   for name, pair in self.weights.items() for letter, z in zip("AB", pair)}
        save_file(tensors, file, {"arcopo": json.dumps(trained_on(model))})
        config = {"peft_type": "LORA", "r": self.rank, "lora_alpha": self.alpha, "bias": "none",
                  "target_modules": "|".join(map(re.escape, self.weights)), "lora_dropout": 0.0}
        file.with_name("adapter_config.json").write_text(json.dumps(config, indent=1) + "\n")

    @classmethod
    def load(cls, folder: str | Path, model: nn.Module) -> "Adapter":
        """The adapter in the folder, trainable. Raises UserError if there is none, if it is broken,
        or if it was trained with another base or other sampler times."""
        file, weights = Path(folder) / "adapter_model.safetensors", {}
        try:
            tensors, record = read_weights(file)
            config = json.loads(file.with_name("adapter_config.json").read_text())
            for key in [key for key in tensors if ".lora_A." in key]:
                name = key.removeprefix(PEFT).removesuffix(".lora_A.weight")
                device = model.get_submodule(name).weight.device
                pair = tensors[key], tensors[key.replace(".lora_A.", ".lora_B.")]
                weights[name] = tuple(z.to(device).requires_grad_() for z in pair)
            adapter = cls(weights, config["lora_alpha"])
        except Exception as error:      # safetensors has exceptions of its own
            others = [str(path.parent) for path in Path(folder).glob(f"*/{file.name}")]
            hint = f"; there are {', '.join(others)}" if others else ""
            raise UserError(f"--adapter {folder}: has no adapter of this model ({error!r}){hint}"
                            ) from error
        for name, value in trained_on(model).items():
            if record.get(name) != value:
                raise UserError(f"--adapter {folder}: was trained with another {name} "
                                f"({record.get(name)}, not {value}); see --{name}")
        return adapter


def trained_on(model: nn.Module) -> dict:
    """What a loaded adapter must have been trained on."""
    return {"base": getattr(model, "fingerprint", ""), "timesteps": list(model.timesteps)}


def read_weights(file: Path) -> tuple[dict[str, Tensor], dict]:
    """The tensors of a safetensors file, and what its header says under "arcopo"."""
    with safe_open(str(file), "pt") as f:
        return {name: f.get_tensor(name) for name in f.keys()}, json.loads(f.metadata()["arcopo"])


# ------------------------------------------------------------------ replay and update

def replay(model: Generator, branches: Fork, steps: Tensor, anchors: Tensor) -> Tensor:
    """Eq. 4: predict again for K pairs of a step and an anchor, two tensors of indices [K], as one
    batch -> x^(θ) [P, K, *chunk_shape]. The only forward pass that is differentiated."""
    x_t = branches.states[:, steps, anchors]
    P, K = x_t.shape[:2]
    x_t = x_t.flatten(0, 1)
    times = torch.stack([x_t.new_full((), t) for t in (*model.timesteps, 0.0)])     # no transfer
    t, t_next = times[steps].repeat(P), times[steps + 1].repeat(P)
    x0 = model.predict(x_t, t, branches.context.repeat(K)).float()
    column = lambda z: z.view(-1, *[1] * (x_t.ndim - 1))
    return candidate(model, x_t, x0, column(t), column(t_next)).unflatten(0, (P, K))


def draw_pairs(T: int, group: int, anchors: int, rng: torch.Generator) -> Tensor:
    """Symmetric anchor sampling (Sec. 3.1): B of the G candidates -> all K = T B pairs of a step
    and an anchor, [K, 2]. Departure: all prompts of a fork, and all updates on it, use the same
    pairs."""
    drawn = torch.randperm(group, generator=rng)[:anchors]
    return torch.cartesian_prod(torch.arange(T), drawn)


def average_(x: Tensor) -> Tensor:
    """The mean over the processes of torchrun, in place; x as it is in a single process."""
    if dist.is_initialized():
        dist.all_reduce(x)
        x /= dist.get_world_size()
    return x


def update(model: Generator, adapter: Adapter, optimizer: torch.optim.Optimizer, branches: Fork,
           rewards: Tensor, method: Method, rng: torch.Generator,
           buffered: bool = False) -> dict[str, Tensor]:
    """Algorithm 1, lines 7 to 9: steps of ascent on J, on the pivot chunk only.

    On-policy there are method.updates updates, and π_old is the policy before the first. buffered:
    the branches are the reference policy's (Sec. 3.3), which is π_old: one update, and the clip is
    the trust region around the reference. rewards [P, G]; no adapter may be on. J is a mean over
    pairs; its gradient is summed over slices of the pairs, whose size method.micro limits. Each
    process has its own groups; the gradients are averaged. Returns scalars, on the device:

    replay_error     mean |log π_old - log π of the rollout|, due to rounding alone if all is well
                     (in a buffer, to half precision)
    ratio_first      mean ρ at the first update; on-policy exactly 1
    clip_fraction    share of terms whose gradient the clip sets to zero, at the last update
    grad_norm        mean over updates
    skipped          share of updates left out because their gradient was not finite (Departure);
                     one prefix that is not finite leaves out the update of all prompts
    """
    T, G = len(model.timesteps), rewards.shape[1]
    pairs = draw_pairs(T, G, method.anchors, rng).to(model.device)
    size = max(1, method.micro // len(rewards)) if method.micro else len(pairs)
    slices = [part.unbind(1) for part in pairs.split(size)]     # each: steps [k], anchors [k]
    usable = rewards.isfinite()[:, pairs[:, 1], None]           # [P, K, 1]: anchors with a reward
    advantages = group_advantages(rewards, method.quasi_norm, method.floor)     # line 7, [P, G]
    pair_advantages = advantages[:, None] * usable              # [P, K, G]

    def log_policy(steps: Tensor, x: Tensor) -> Tensor:
        """Line 8: log π_θ(i | s_t) [P, k, G] from predictions x [P, k, *chunk_shape] of k pairs."""
        candidates = branches.candidates[:, steps].flatten(3)           # [P, k, G, D]
        return surrogate_log_policy(candidates, x.flatten(2), method.tau)

    # Departure: π_old comes from a replay, because the rollout may round differently. It is not
    # under no_grad, so that the model computes as below, and the first ratio is exactly 1.
    with nullcontext() if buffered else adapter.on(model):
        log_olds = [log_policy(steps, replay(model, branches, steps, anchors)).detach()
                    for steps, anchors in slices]
    log_rollouts = [log_policy(steps, branches.candidates[:, steps, anchors])
                    for steps, anchors in slices]
    errors = torch.cat(log_olds, 1) - torch.cat(log_rollouts, 1)
    norms, ratios = [], []
    for _ in range(1 if buffered else method.updates):
        optimizer.zero_grad()
        log_ratios = []
        with adapter.on(model):     # for backward too: activation checkpointing predicts there
            parts = zip(slices, log_olds, pair_advantages.split(size, 1))
            for (steps, anchors), log_old, advantage in parts:
                log_ratio = log_policy(steps, replay(model, branches, steps, anchors)) - log_old
                J = clipped_objective(log_ratio, advantage, method.clip_range)
                (-J * len(steps) / len(pairs)).backward()                                  # line 9
                log_ratios.append(log_ratio.detach())
        if any(p.grad is None for p in adapter.parameters()):
            layers = getattr(adapter, "weights", {})
            unused = [name for name, (A, B) in layers.items() if B.grad is None]
            warnings.warn(f"no gradient reaches some layers {unused or ''}: are they used without "
                          "a call? Leave them out of the adapter's targets", stacklevel=2)
        gradients = [average_(p.grad) for p in adapter.parameters() if p.grad is not None]
        norms.append(nn.utils.get_total_norm(gradients))
        ratios.append(torch.cat(log_ratios, 1).exp())
        if torch.isfinite(norms[-1]):
            optimizer.step()
    clipped = (ratios[-1] - 1) * pair_advantages.sign() > method.clip_range
    norms = torch.stack(norms)
    return {"replay_error": (errors.abs() * usable).mean(),
            "ratio_first": ratios[0].mean(), "clip_fraction": clipped.float().mean(),
            "grad_norm": norms.mean(), "skipped": (~norms.isfinite()).float().mean()}


# ------------------------------------------------------------------ exploration and buffer

def score_branches(branches: Fork, clips: Tensor, reward: Callable) -> dict[str, Tensor]:
    """The scores [P, G] of the branches' clips [P, G, ...]. Departure: a branch that is not finite
    is scored NaN, so that its advantage and its terms as an anchor are 0; the Fork's tensors are
    made finite, in place. Raises TypeError if the reward returns no dict with a tensor "reward"."""
    P, G = clips.shape[:2]
    finite = branches.candidates.isfinite().flatten(3).all(3).all(1)
    finite &= clips.isfinite().flatten(2).all(2).to(finite.device)
    scores = reward(clips.flatten(0, 1), [p for p in branches.prompts for _ in range(G)])
    if not isinstance(scores, dict) or not isinstance(scores.get("reward"), Tensor):
        raise TypeError(f"the reward returned {type(scores).__name__}; expected {{'reward': [N]}}")
    branches.states.nan_to_num_(0, 0, 0)
    branches.candidates.nan_to_num_(0, 0, 0)
    return {name: x.view(P, G).to(finite.device).where(finite, math.nan)
            for name, x in scores.items()}


@torch.no_grad()
def explore(model: Generator, method: Method, prompts: list[str], reward: Callable,
            rng: torch.Generator) -> tuple[Fork, dict[str, Tensor]]:
    """Algorithm 1, lines 1 to 5, for P = method.prompts prompts drawn at random -> Fork, {"reward":
    [P, G], ...}. Raises ValueError if there are fewer prompts.

    reward(clips [N, ...] as model.decode gives them, prompts) -> {"reward": [N], others: [N]}.
    Departure: the P prompts share the pivot, so that they run as one batch.
    """
    P = method.prompts
    if P > len(prompts):
        raise ValueError(f"prompts {P}: must be at most {len(prompts)}, the number given")
    chosen = [prompts[i] for i in torch.randperm(len(prompts), generator=rng)[:P]]
    pivot = int(torch.randint(model.chunks, (), generator=rng))                     # line 1
    noise = draw_noise(model, P, rng)
    initial, solver = branch_noise(noise, pivot, method.sigma, method.group, rng)   # line 4
    branches, clips = fork(model, chosen, pivot, noise, initial, solver,            # lines 2, 3, 5
                           method.micro)
    return branches, score_branches(branches, clips, reward)                        # line 5


def collect_buffer(model: Generator, method: Method, prompts: list[str], reward: Callable,
                   rng: torch.Generator) -> list[dict]:
    """P = method.prompts groups for the buffer (Sec. 3.3), a list that many calls fill together.
    The reference policy must explore, so no adapter may be on.

    A group is {"prompt": str, "scores": {"reward": [G], ...} and, in half precision, "prefix"
    [pivot, *chunk_shape], "states", "candidates" [T, G, *chunk_shape]}, in CPU memory.
    """
    branches, scores = explore(model, method, prompts, reward, rng)
    groups = []
    for i, prompt in enumerate(branches.prompts):
        tensors = {name: getattr(branches, name)[i].half().cpu()
                   for name in ("prefix", "states", "candidates")}
        rewards = {name: x[i].clone().cpu() for name, x in scores.items()}      # no views: saved
        groups.append({"prompt": prompt, "scores": rewards} | tensors)
    return groups


@torch.no_grad()
def draw_from(buffer: list[dict], model: Generator, P: int,
              rng: torch.Generator) -> tuple[Fork, dict[str, Tensor]]:
    """Up to P random groups, as explore returns them; no adapter may be on.

    Departures: all have the pivot of the first one drawn, so there may be fewer than P; tensors
    were stored in half precision; h_{p-1} is not stored but recomputed from the prefix; ε_p* is not
    stored, as it is not needed.
    """
    shuffled = [buffer[i] for i in torch.randperm(len(buffer), generator=rng)]
    pivot = len(shuffled[0]["prefix"])
    groups = [group for group in shuffled if len(group["prefix"]) == pivot][:P]
    stack = lambda tensors: torch.stack(tensors).to(model.device).float()
    prompts = [group["prompt"] for group in groups]
    prefix, states, candidates = (stack([group[name] for group in groups])
                                  for name in ("prefix", "states", "candidates"))
    context = model.begin(prompts)
    for x0 in prefix.unbind(1):
        context = model.extend(context, x0)
    scores = {name: stack([group["scores"][name] for group in groups])
              for name in groups[0]["scores"]}
    return Fork(prompts, prefix, context, states, candidates), scores


# ------------------------------------------------------------------ one iteration

def reward_metrics(scores: dict[str, Tensor], floor: float) -> dict[str, Tensor]:
    """scores {"reward": [P, G], ...} -> their means over finite values; not_finite: share of the
    rewards that are not; deviation: the reward's standard deviation in a group, its mean over
    groups; flat_groups: share of groups with a deviation below the floor."""
    scores = {name: x.where(x.isfinite(), math.nan) for name, x in scores.items()}
    reward = scores["reward"]
    reward = reward - reward.nan_to_num(math.inf).amin(1, keepdim=True)         # 0 if equal
    deviation = (reward - reward.nanmean(1, keepdim=True)).square().nanmean(1).sqrt()
    flat = ~(deviation >= floor)                    # also NaN, in a group without rewards
    return {name: x.nanmean() for name, x in scores.items()} | {
        "not_finite": reward.isnan().float().mean(), "deviation": deviation.nanmean(),
        "flat_groups": flat.float().mean()}


def average_rows(rows: list[dict[str, Tensor]]) -> dict[str, float]:
    """The mean of rows of metrics, leaving out NaN, and then over processes."""
    table = torch.stack([torch.stack(list(row.values())) for row in rows])      # [rows, metrics]
    return dict(zip(rows[0], average_(table.nanmean(0)).tolist()))


def iterate(model: Generator, adapter: Adapter, optimizer: torch.optim.Optimizer, method: Method,
            prompts: list[str], reward: Callable, rng: torch.Generator) -> dict[str, float]:
    """One iteration of Algorithm 1: explore, then update, which takes method.updates steps -> the
    metrics of reward_metrics and update, averaged over processes."""
    with torch.no_grad(), adapter.on(model):            # no_grad, so that the weights are merged
        branches, scores = explore(model, method, prompts, reward, rng)             # lines 1 to 5
    row = reward_metrics(scores, method.floor)
    row |= update(model, adapter, optimizer, branches, scores["reward"], method, rng)   # 7 to 9
    return average_rows([row])


def iterate_buffered(model: Generator, adapter: Adapter, optimizer: torch.optim.Optimizer,
                     method: Method, buffer: list[dict], rng: torch.Generator) -> dict[str, float]:
    """One iteration of semi-on-policy training (Sec. 3.3): method.updates times, draw groups from
    the buffer and update once -> metrics as those of iterate. method.tau is the buffer's
    (--buffer-tau of the script). With clip_range = inf it is the paper's off-policy baseline."""
    rows = []
    for _ in range(method.updates):
        branches, scores = draw_from(buffer, model, method.prompts, rng)
        row = reward_metrics(scores, method.floor)
        row |= update(model, adapter, optimizer, branches, scores["reward"], method, rng,
                      buffered=True)
        rows.append(row)
    return average_rows(rows)


# ------------------------------------------------------------------ merging and the choice of s

def merge_adapters(*terms: tuple[Adapter, float]) -> Adapter:
    """Σ s_k Δ_k as one adapter, exactly: the ranks add up (Sec. 3.3: θ_ref + Δ_semi + s · Δ_on).
    Raises ValueError if the adapters differ in their layers."""
    layers = terms[0][0].weights.keys()
    if any(adapter.weights.keys() != layers for adapter, s in terms):
        raise ValueError("the adapters must have the same layers")
    weights = {}
    for name in layers:
        A = torch.cat([adapter.weights[name][0] for adapter, s in terms])
        B = torch.cat([adapter.weights[name][1] * (s * adapter.alpha / adapter.rank)
                       for adapter, s in terms], 1)
        weights[name] = A.detach(), B.detach()
    return Adapter(weights, alpha=float(sum(adapter.rank for adapter, s in terms)))     # α = r


def choose_strength(scores: dict[float, tuple[float, float]],
                    base: tuple[float, float]) -> float | None:
    """Sec. 4.4: the largest s that improves both (reward, independent judge) over the base; None if
    none does. Departures: then the script takes the semi-on-policy adapter alone (s = 0); s is
    chosen on the clips that the final table judges."""
    return max((s for s, (reward, score) in scores.items()
                if reward > base[0] and score > base[1]), default=None)


# ------------------------------------------------------------------ the script: its settings

@dataclass
class Settings(Method):
    """Settings of the script: those of the method, and these. Raises ValueError, as Method."""
    steps: int = option(100, "iterations", "100")
    lr: float = option(1e-4, "learning rate of AdamW, on-policy", "1e-5")
    rank: int = option(16, "rank r of the LoRA adapter", "64")
    alpha: float = option(32.0, "α of the LoRA adapter, which is scaled by α/r", "128")
    buffer_groups: int = option(100, "rollout groups in the buffer", "100")
    buffer_lr: float = option(2e-5, "learning rate of AdamW with the buffer", "1e-5")
    buffer_tau: float = option(20.0, "τ with the buffer; the trust region grows with ε τ",
                               "as --tau")      # Departure: the paper names one τ₀ for both
    buffer_reward: str = option("ta=1", "rewards of the buffer, as --reward", "TA")
    sweep: tuple = option((0.4, 0.6, 0.8, 1.0), "strengths s of the on-policy adapter", "0.4 to 1")
    method: str = option("recipe", "what to train: both adapters and their merge, or one alone; "
                         "semi with --clip-range inf is the paper's off-policy baseline",
                         choices=("recipe", "on-policy", "semi"))
    sample: str = option("", "write clips of this prompt to --out (a .gif) instead of training")
    samples: int = option(1, "with --sample: how many clips, side by side")
    adapter: str = option("", "with --sample: the folder of the adapter to apply")
    out: str = option("", "run folder [runs/DATE-TIME]; with --sample the GIF [clip.gif]")
    resume: str = option("", "continue the run in this folder; --steps, --sweep, --judge-samples, "
                         "--micro and --device can be given anew")
    base: str = option("", "weights of the base generator [assets/base.safetensors]")
    timesteps: tuple = option((), "sampler times, falling from 1, as 1,0.5,0.25,0.1 [the base's]")
    seed: int = option(0, "seed of training, sampling and judging")
    device: str = option("auto", "cpu, cuda, cuda:1 ...; auto is cuda if there is one")
    reward: str = option("ta=3,mq=1", "NAME=WEIGHT,...: of ta, vq, mq (text alignment, visual, "
                         "motion quality) and module:function, your own", "VideoAlign's, 1 each")
    clip: str = option("", "open_clip model of ta, vq, mq: a folder, ARCH:FILE or ARCH:TAG, as "
                       "ViT-B-32:laion2b_s34b_b79k [assets/clip]")
    judge_prompts: str = option("held-out", "prompts of the judged clips; training: 24 training "
                                "prompts, to choose settings on",
                                choices=tuple(JUDGE_PROMPTS))
    judge_samples: int = option(8, "clips per prompt in the final table")
    judge_every: int = option(20, "iterations between points of the curve")

    def __post_init__(self):
        super().__post_init__()
        times = (*self.timesteps, 0.0)
        if self.timesteps and not (times[0] == 1 and all(t > s for t, s in zip(times, times[1:]))):
            raise ValueError(f"timesteps {self.timesteps}: must fall from 1 toward 0")
        if not all(0 < s < math.inf for s in self.sweep):
            raise ValueError(f"sweep {self.sweep}: must be numbers above 0")
        if self.prompts > len(TRAIN_PROMPTS):
            raise ValueError(f"prompts {self.prompts}: must be at most {len(TRAIN_PROMPTS)}")


# ------------------------------------------------------------------ training loop

RANK = int(os.environ["RANK"]) if dist.is_torchelastic_launched() else 0    # only rank 0 writes
progress = partial(tqdm, disable=RANK > 0)


def seeded(seed: int, *stream: str | int) -> torch.Generator:
    """A random generator for (seed, *stream), on the CPU: the same noise on every device. A hash
    fills its whole state, 624 words, because manual_seed would keep only 32 bits of the hash."""
    generator = torch.Generator()
    state = generator.get_state()
    words = hashlib.shake_256(repr((seed, *stream)).encode()).digest(4 * 624)
    words = torch.frombuffer(bytearray(words), dtype=torch.uint32).long().view(torch.uint8)
    state[24 : 24 + len(words)] = words             # after the seed, two counters and a flag
    return generator.set_state(state)


def save_whole(content, file: Path) -> None:
    """torch.save, all or nothing: whatever ends the process leaves the old file or the new one."""
    if RANK == 0:
        file.parent.mkdir(exist_ok=True)
        part = file.with_name(file.name + ".part")
        torch.save(content, part)
        os.replace(part, file)


def write_csv(file: Path, rows: list[dict], mode: str = "w") -> None:
    """mode "a" appends, and writes the header if the file is new or empty."""
    if RANK == 0:
        with open(file, mode, newline="", encoding="utf-8") as f:
            writer = csv.DictWriter(f, rows[0] if rows else [], lineterminator="\n")
            if rows and f.tell() == 0:
                writer.writeheader()
            for row in rows:                            # NaN is left blank
                writer.writerow({name: "" if x != x else x for name, x in row.items()})


@contextmanager
def cuda_graphs(model: Generator, adapter: Adapter):
    """A speed-up that a reader may skip. Inside, predict and extend replay CUDA graphs, recorded
    once for each shape, because a model this small takes longer to launch kernels than to run them.
    No other adapter may be on. A prediction's backward pass must precede the next prediction."""
    graphs, pool, parameters = {}, torch.cuda.graph_pool_handle(), adapter.parameters()

    def graphed(call: Callable, *inputs):                           # tensors, and a Context
        shapes = tuple(x.shape for x in tree_leaves(inputs))
        key = call, adapter.applied, torch.is_grad_enabled(), shapes
        if key not in graphs:
            warnings.filterwarnings("ignore", "The AccumulateGrad node's stream")
            example = tree_map(torch.clone, inputs)                 # each replay writes to it
            graphs[key] = torch.cuda.make_graphed_callables(
                lambda *given: call(*given[: len(inputs)]), (*example, *parameters),
                allow_unused_input=True, pool=pool)
        return tree_map(torch.clone, graphs[key](*inputs, *parameters))

    predict = model.predict
    model.predict = lambda x_t, t, context: graphed(
        predict, x_t, t if isinstance(t, Tensor) else x_t.new_full((len(x_t),), t), context)
    model.extend = partial(graphed, model.extend)
    adapter.merged = {name: torch.empty_like(model.get_submodule(name).weight)
                      for name in adapter.weights}                  # the graphs read these
    hooks = [p.register_hook(torch.clone) for p in parameters]      # replays overwrite gradients
    try:
        yield
    finally:
        del model.predict, model.extend
        adapter.merged = {}
        for hook in hooks:
            hook.remove()


def train(name: str, model: Generator, settings: Settings, lr: float, iteration: Callable,
          reward: Callable, folder: Path) -> Adapter:
    """Train an adapter, or continue from the checkpoint that every iteration ends with. A run that
    is killed at any time and resumed ends as if it had run on. Writes NAME.csv. At step 0, every
    settings.judge_every steps and at the end it also writes the adapter to NAME/ and, from two
    clips of each judging prompt, a row of NAME-curve.csv. iteration(model, adapter, optimizer,
    rng=rng) -> a row of NAME.csv without step and seconds. Raises UserError if the rewards differed
    in no group."""
    stream = "buffered" if name == "semi" else "explored"   # of random numbers
    seed = settings.seed
    process = (RANK,) if RANK else ()                       # each process draws its own groups
    adapter = Adapter.new(model, settings.rank, settings.alpha, seeded(seed, stream, "adapter"))
    optimizer = torch.optim.AdamW(adapter.parameters(), lr, weight_decay=0, fused=True)
    checkpoint = folder / f"{name}.checkpoint.pt"
    rows, curve = [], []
    judged = lambda step: step % settings.judge_every == 0 or step == settings.steps
    if checkpoint.exists():
        saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
        for p, q in zip(adapter.parameters(), saved["parameters"]):
            p.data.copy_(q)
        optimizer.load_state_dict(saved["optimizer"])
        rows = saved["rows"]
        curve = [row for row in saved["curve"] if judged(row["step"])]  # not the old last step
    write_csv(folder / f"{name}.csv", rows)
    write_csv(folder / f"{name}-curve.csv", curve)
    bar = progress(total=settings.steps, initial=len(rows), desc=name, unit="it")
    graphs = cuda_graphs(model, adapter) if model.device.type == "cuda" else nullcontext()
    with bar, graphs:
        for step in range(len(rows), settings.steps + 1):
            if step > len(rows):                    # not step 0, nor what the checkpoint has
                began, rng = time.perf_counter(), seeded(seed, stream, step, *process)
                row = iteration(model, adapter, optimizer, rng=rng)
                rows.append({"step": step} | row | {"seconds": time.perf_counter() - began})
                write_csv(folder / f"{name}.csv", rows[-1:], "a")
                bar.update()
            if judged(step) and step not in [row["step"] for row in curve]:
                _, scores = judge_model(adapter, model, reward, settings, 2, "curve")
                curve.append({"step": step} | {key: x.mean().item() for key, x in scores.items()})
                write_csv(folder / f"{name}-curve.csv", curve[-1:], "a")
            if judged(step) and RANK == 0:
                adapter.save(folder / name, model)
            parameters = [p.detach() for p in adapter.parameters()]
            save_whole({"parameters": parameters, "optimizer": optimizer.state_dict(),
                        "rows": rows, "curve": curve}, checkpoint)
            bar.set_postfix({what: f"{of[-1]['reward']:+.2f}" for what, of in
                             (("reward", rows), ("judged reward", curve)) if of})
    if not any(row["deviation"] > 0 for row in rows):
        raise UserError(f"{name} learned nothing: in no group did the rewards differ; start a new "
                        "run with another reward, as --resume cannot change it")
    if any(row["not_finite"] + row["skipped"] > 0 for row in rows) and RANK == 0:
        print(f"{name}: rewards or updates that were not finite were left out; see {name}.csv",
              file=sys.stderr)
    return adapter


# ------------------------------------------------------------------ evaluation and report

def sample_batches(model: Generator, prompts: list[str], rng: torch.Generator,
                   size: int) -> Tensor:
    """sample in batches of `size` prompts (0: 96). Same rng, same noise, whatever the weights."""
    size = size or 96
    parts = [prompts[i : i + size] for i in range(0, len(prompts), size)]
    return torch.cat([sample(model, part, draw_noise(model, len(part), rng)) for part in parts])


@torch.no_grad()
def judge_model(adapter: Adapter | None, model: Generator, reward: Callable, settings: Settings,
                samples: int, stream: str) -> tuple[Tensor, dict[str, Tensor]]:
    """`samples` clips of each judging prompt with the adapter (None: of the base), on the same
    noise for every adapter, that of the seed and the stream, and their scores (reward.evaluate)."""
    prompts = [p for p in JUDGE_PROMPTS[settings.judge_prompts] for _ in range(samples)]
    with adapter.on(model) if adapter else nullcontext():
        clips = sample_batches(model, prompts, seeded(settings.seed, stream), settings.micro)
    return clips, evaluate(clips, prompts, reward)


def save_gif(clips: Tensor, file: str | Path, columns: int, scale: int = 4) -> None:
    """Clips [N, frames, 3, H, W] in [0, 1], `columns` to a row -> a looping GIF."""
    grid = F.pad(clips.cpu(), (1, 1, 1, 1), value=0.5).unflatten(0, (-1, columns))
    grid = grid.permute(2, 0, 4, 1, 5, 3)               # [frames, rows, H, columns, W, 3]
    frames = (grid.flatten(1, 2).flatten(2, 3) * 255).round().byte()
    frames = frames.repeat_interleave(scale, 1).repeat_interleave(scale, 2)     # [frames, H, W, 3]
    iio.imwrite(file, frames.numpy(), extension=".gif", duration=150, loop=0)


def judged_rows(scores: dict[str, dict[str, Tensor]]) -> list[dict]:
    """A row for each model from its scores (judge_model): means; changes from the base ± standard
    error over prompts; mended: share of the base's wrong clips that are all right with this model;
    spoiled: share of the base's right clips that are not."""
    rows, base = [], scores["base"]
    right = base["all_right"] == 1
    for name, own in scores.items():
        row = {"model": name} | {column: x.mean().item() for column, x in own.items()}
        for column in ("reward", "judge"):
            change = (own[column] - base[column]).mean(1)
            row[f"Δ {column}"] = change.mean().item()
            row[f"± {column}"] = change.std().item() / len(change) ** 0.5
        row["mended"] = own["all_right"][~right].mean().item()
        row["spoiled"] = 1 - own["all_right"][right].mean().item()
        rows.append(row)
    return rows


def write_report(folder: Path, settings: Settings, clips: dict[str, Tensor], rows: list[dict],
                 seconds: float, chosen: str = "") -> None:
    """Write judged.csv, models.gif and report.md, which is also printed. clips: by model; rows: of
    judged_rows; chosen: the model in merged/."""
    line = "| {:11} | {:15} | {:15} | {:>9} | {:>6} | {:>7} | {:>4} |\n"
    report = line.format("model", "Δ reward", "Δ judge", "all right", "mended", "spoiled", "area")
    report += line.format(*("-" * width for width in (11, 15, 15, 9, 6, 7, 4)))
    for row in rows:
        changes = [f"{row[f'Δ {name}']:+7.3f} ± {row[f'± {name}']:.3f}"
                   for name in ("reward", "judge")]
        report += line.format(row["model"] + " *" * (row["model"] == chosen), *changes,
                              f"{row['all_right']:.2f}", f"{row['mended']:.0%}",
                              f"{row['spoiled']:.0%}", f"{row['area']:.0f}")
    if chosen:
        rule = "semi alone, as no s improves" if chosen == "semi" else "the largest s that improves"
        report += f"\nThe model in merged/ has a *: {rule} both reward and judge over the base.\n"
        row = next(row for row in rows if row["model"] == chosen)
        if not (row["Δ reward"] > 0 and row["Δ judge"] > 0):
            report += "Semi alone does not either. Use the base: merged/ is no better.\n"
    shown = [name for name in clips if name == chosen or not name.startswith("s = ")]
    report += (f"Clips of each {settings.judge_prompts} prompt: {settings.judge_samples}, on the "
               "same noise for all models. Δ: change from the\nbase ± standard error over prompts; "
               "mended, spoiled: of the base's wrong, right clips; area in px².\njudged.csv has "
               f"all scores.\nmodels.gif shows every third prompt; from top: {', '.join(shown)}.\n"
               f"{seconds / 60:.1f} minutes on {settings.device}"
               f"{' since --resume' if settings.resume else ''}.\n")
    write_csv(folder / "judged.csv", rows)
    if RANK == 0:
        (folder / "report.md").write_text(report, encoding="utf-8")
        parts = [clips[name][:: 3 * settings.judge_samples] for name in shown]
        save_gif(torch.cat(parts), folder / "models.gif", columns=len(parts[0]))
        print(f"\n{report}Run folder: {folder}")
    broken = [row["model"] for row in rows if not math.isfinite(row["reward"] + row["judge"])]
    if broken:
        raise UserError(f"scores of {', '.join(broken)} are not finite (--resume cannot mend that)")


# ------------------------------------------------------------------ command line

CHANGEABLE = {"resume", "steps", "micro", "device", "sweep", "judge_samples"}   # with --resume
WITHOUT_EFFECT = {"recipe": "", "semi": "lr tau sweep",                         # by --method
                  "on-policy": "buffer_groups buffer_lr buffer_tau buffer_reward sweep"}


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(f"{message}; --help lists the settings")


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def parse(arguments: list | None = None, cls: type = Settings, only: set | None = None,
          description: str = __doc__) -> Settings:
    """Command-line arguments, as strings, numbers or paths -> settings, of the class `cls`; with
    --resume the run's, except those given anew. only: the settings that a study takes. Raises
    UserError."""
    def numbers(text: str) -> tuple[float, ...]:
        return tuple(float(part) for part in text.split(","))

    parser = Parser(description="\n\n".join(description.split("\n\n")[:2]), allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter,
                    argument_default=argparse.SUPPRESS)
    for f in fields(cls):
        if only is None or f.name in only:
            about = f.metadata
            shown = ",".join(map(str, f.default)) if f.type is tuple else str(f.default)
            text = about["text"] + (f" [{shown}]" if shown else "")
            text += f" (paper: {about['paper']})" if about["paper"] else ""
            parser.add_argument(flag(f.name), type=numbers if f.type is tuple else f.type,
                                help=text, choices=about["choices"] or None,
                                metavar=None if about["choices"] else "X")
    given = vars(parser.parse_args(arguments and [str(a) for a in arguments]))
    for name, value in given.items():
        if value == "":
            raise UserError(f"{flag(name)}: is empty; give a value or leave it out")
    for name in given.keys() & {"base", "clip"}:
        if Path(given[name]).exists():                          # for --resume from elsewhere
            given[name] = str(Path(given[name]).resolve())
    named = set(given)
    if "resume" in given:
        saved = read_record(given["resume"], cls)["settings"]
        for name in given:
            if name not in CHANGEABLE and given[name] != saved[name]:
                raise UserError(f"{flag(name)} {given[name]}: the run in {given['resume']} has "
                                f"{saved[name]!r}; --resume cannot change that, start a new run")
        given = saved | given
    try:
        settings = cls(**given)
    except ValueError as error:
        raise UserError(flag(str(error))) from error
    if not settings.sample:
        for name in named & {"samples", "adapter"}:
            raise UserError(f"{flag(name)} {given[name]}: has no effect without --sample")
        for name in named & set(WITHOUT_EFFECT[settings.method].split()):
            raise UserError(f"{flag(name)} {given[name]}: has no effect with --method "
                            f"{settings.method}; leave it out")
    return settings


def choose_device(name: str) -> str:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:           # set by torchrun
        name += ":" + os.environ["LOCAL_RANK"]
    try:
        device = torch.empty(0, device=name).device             # with its index
    except Exception as error:
        raise UserError(f"--device {name}: cannot be used ({error})") from error
    if device.type == "cuda":
        torch.cuda.set_device(device)                           # CUDA graphs need the current one
    return name


def load_generator(file: str | Path = "", device: str | torch.device = "cpu",
                   timesteps: tuple = ()) -> Generator:
    """A frozen base, sampled at its own timesteps or at others. Raises UserError."""
    file = Path(file or ASSETS / "base.safetensors")
    try:
        weights, header = read_weights(file)
        model = Generator(**header["record"]["generator"])
        model.load_state_dict({name: x.float() for name, x in weights.items()})
    except Exception as error:      # safetensors has exceptions of its own
        raise UserError(f"--base {file}: not weights of studies.pretrain ({error})") from error
    model.fingerprint = hashlib.sha256(file.read_bytes()).hexdigest()[:16]
    model.timesteps = tuple(timesteps) or model.timesteps
    return model.to(device).requires_grad_(False)


def load(settings: Settings, scales: dict | None = None) -> tuple[Generator, Callable, Callable]:
    """The base, the reward and the buffer's reward.

    Departure: each reward is standardised on the base's clips before the weighted mean is taken,
    and the default weighs TA most and leaves out VQ, which makes shapes grow. The clips do not
    depend on the seed. scales: those of the run, with --resume.
    """
    device = choose_device(settings.device)
    rewards = load_rewards([settings.reward, settings.buffer_reward], device, settings.clip)
    model = load_generator(settings.base, device, settings.timesteps)
    if scales is None:
        clips = sample_batches(model, TRAIN_PROMPTS, seeded(0, "calibration"), settings.micro)
        scales = rewards[0].measure_scales(clips, TRAIN_PROMPTS)
    for reward in rewards:
        reward.scales = scales
    return model, *rewards


def read_record(folder: str | Path, cls: type = Settings) -> dict:
    """What settings.json of a run with settings of this class holds. Raises UserError."""
    try:
        record = json.loads((Path(folder) / "settings.json").read_text(encoding="utf-8"))
        names = {f.name for f in fields(cls)}
        if record["program"] != cls.__name__ or record["settings"].keys() != names:
            raise ValueError("it is of another program, or of another version of this one")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"--resume {folder}: not the folder of a run ({error})") from error
    for name, value in record["settings"].items():
        record["settings"][name] = tuple(value) if isinstance(value, list) else value
    return record


def start(settings: Settings) -> tuple[Path, Generator, Callable, Callable]:
    """Begin a run in a new folder, or continue one: its folder, with settings.json, and what load
    returns. Raises UserError."""
    asked = asdict(settings) | {"resume": ""}
    settings.device = choose_device(settings.device)
    if dist.is_torchelastic_launched() and not dist.is_initialized():           # by torchrun
        cuda = torch.device(settings.device) if settings.device.startswith("cuda") else None
        dist.init_process_group("nccl" if cuda else "gloo", device_id=cuda)
    processes = dist.get_world_size() if dist.is_initialized() else 1
    folder = Path(settings.out)
    taken = f"--out {folder}: exists; name another folder, or --resume it if it is a run"
    if settings.resume:
        record = read_record(folder, type(settings))
        if record["processes"] != processes:
            raise UserError(f"--resume {folder}: start as many processes as before, "
                            f"{record['processes']}")
        for file in folder.glob("*.checkpoint.pt"):
            done = len(torch.load(file, map_location="cpu", weights_only=True)["rows"])
            if done > settings.steps:
                raise UserError(f"--steps {settings.steps}: {done} are done; --resume it with more")
    elif RANK == 0 and folder.exists():
        raise UserError(taken)
    else:
        record = {"program": type(settings).__name__, "processes": processes,
                  "torch": torch.__version__, "command": sys.argv, "reward_scales": None}
    model, reward, buffer_reward = load(settings, record["reward_scales"])
    if record.setdefault("base", model.fingerprint) != model.fingerprint:
        raise UserError(f"--resume {folder}: the weights of --base have changed; start a new run")
    record |= {"settings": asked, "reward_scales": reward.scales}
    if RANK == 0:
        try:
            folder.mkdir(parents=True, exist_ok=bool(settings.resume))  # no other run has it
        except FileExistsError:
            raise UserError(taken) from None
        part = folder / "settings.json.part"
        part.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        os.replace(part, folder / "settings.json")
    return folder, model, reward, buffer_reward


def run(settings: Settings) -> None:
    """The recipe, or the training of settings.method alone: train, merge, judge, choose s and write
    all to the run folder."""
    began = time.perf_counter()
    folder, model, reward, buffer_reward = start(settings)
    adapters = {}
    if settings.method in ("recipe", "on-policy"):
        iteration = partial(iterate, method=settings, prompts=TRAIN_PROMPTS, reward=reward)
        adapters["on-policy"] = train("on-policy", model, settings, settings.lr, iteration, reward,
                                      folder)
    if settings.method in ("recipe", "semi"):
        buffer, firsts = [], range(0, settings.buffer_groups, settings.prompts)
        for first in progress(firsts, "buffer", unit="batch"):
            file = folder / "buffer" / f"{first}.pt"
            if file.exists():
                groups = torch.load(file, weights_only=True)
            else:
                rng = seeded(settings.seed, "buffer", first)
                groups = collect_buffer(model, settings, TRAIN_PROMPTS, buffer_reward, rng)
                groups = groups[: settings.buffer_groups - first]
                save_whole(groups, file)
            buffer += groups
        method = replace(settings, tau=settings.buffer_tau)
        iteration = partial(iterate_buffered, method=method, buffer=buffer)
        adapters["semi"] = train("semi", model, settings, settings.buffer_lr, iteration, reward,
                                 folder)
    models = {"base": None} | adapters
    if settings.method == "recipe":
        for s in settings.sweep:
            models[f"s = {s:g}"] = merge_adapters((adapters["semi"], 1.0),
                                                  (adapters["on-policy"], s))
    clips, scores = {}, {}
    for name, adapter in progress(models.items(), "judging", unit="model"):
        clips[name], scores[name] = judge_model(adapter, model, reward, settings,
                                                settings.judge_samples, "judging")
    rows = judged_rows(scores)
    chosen = ""
    if settings.method == "recipe":
        both = {row["model"]: (row["reward"], row["judge"]) for row in rows}
        s = choose_strength({s: both[f"s = {s:g}"] for s in settings.sweep}, both["base"])
        chosen = "semi" if s is None else f"s = {s:g}"
        if RANK == 0:
            models[chosen].save(folder / "merged", model)
    write_report(folder, settings, clips, rows, time.perf_counter() - began, chosen)


def write_sample(settings: Settings) -> None:
    """Write clips of a prompt to a GIF, side by side."""
    file = Path(settings.out or "clip.gif")
    if file.suffix != ".gif":
        raise UserError(f"--out {file}: must be the name of a .gif file")
    model = load_generator(settings.base, choose_device(settings.device), settings.timesteps)
    adapter = Adapter.load(settings.adapter, model) if settings.adapter else None
    prompts, rng = [settings.sample] * settings.samples, seeded(settings.seed, "sampling")
    with torch.no_grad(), adapter.on(model) if adapter else nullcontext():
        clips = sample_batches(model, prompts, rng, settings.micro)
    file.parent.mkdir(parents=True, exist_ok=True)
    save_gif(clips, file, settings.samples, scale=8)
    print(f"wrote {file}")


def exit_code(error: BaseException, folder: str = "") -> int:
    """Print one line for Ctrl-C, too little memory or a user's mistake -> exit code. Any other
    error is raised again."""
    message, code = str(error), 2
    if isinstance(error, KeyboardInterrupt):
        message, code = "interrupted", 130
    elif re.search("(out of|enough|allocate) memory|MemoryError|alloc_failed",
                   repr((error, error.__context__)), re.I):     # CUDA graphs may add an error
        message = f"out of memory ({message}); set a small --micro, also when you resume"
    elif not isinstance(error, (UserError, OSError)):
        raise error
    if folder and "--resume" not in message and (Path(folder) / "settings.json").exists():
        message += f"; continue with --resume {folder}"
    print("arcopo:", " ".join(message.split()), file=sys.stderr)
    return code


def command(body: Callable, arguments: list | None = None, **parsing) -> int:
    """body(settings) with the settings of parse -> exit code. parsing: more arguments of parse."""
    folder = ""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")        # a terminal may lack Δ
    try:
        settings = parse(arguments, **parsing)
        if settings.sample:
            write_sample(settings)
        else:
            folder = settings.resume or settings.out or time.strftime("runs/%Y%m%d-%H%M%S")
            body(replace(settings, out=folder))
    except (Exception, KeyboardInterrupt) as error:
        return exit_code(error, folder)
    try:
        sys.stdout.flush()
    except BrokenPipeError:             # as by | head; all files are written
        sys.stdout = open(os.devnull, "w")
    return 0


main = partial(command, run)


if __name__ == "__main__":
    sys.exit(main())
