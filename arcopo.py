"""AR-CoPO: align a streaming, few-step, autoregressive video generator with rewards. One file, to be read beside the paper.

    python arcopo.py --steps 100                                            align the shipped base, judge it, leave a run folder
    python arcopo.py --sample "a red circle moving right" --out clip.gif    stream one clip (--adapter FILE: of the aligned model)
    python arcopo.py --pretrain                                             make the base itself from nothing

He et al., AR-CoPO: Align Autoregressive Video Generation with Contrastive Policy Optimization, arXiv 2603.17461 ("the paper"),
built on He et al., Neighbor GRPO, arXiv 2511.16955; the generator is a miniature of Self-Forcing's, arXiv 2506.08009.

Symbol          in the paper    here
L, p            Sec. 3.2        model.chunks, pivot (from 0; from 1 in what is printed)
T, t            Sec. 3.2        model.timesteps, one of them
F_θ(x_t, h, t)  Eq. 4           model.predict(x_t, t, context)
h_{p-1}         Alg. 1          Context
ε*, ε⁽ⁱ⁾, σ, G   Eq. 1           noise.initial, neighbor_noise, sigma, group
x_t⁽ⁱ⁾, x̂₀⁽ⁱ⁾     Eq. 2, 4        fork's states, fork's predictions (the candidates)
x̂₀^(θ), B       Eq. 4, Sec. 3.1 replay's predictions, anchors
d⁽ⁱ⁾, τ, π_θ(i)  Eq. 2, 5        surrogate_log_policy, tau
r⁽ⁱ⁾, A⁽ⁱ⁾        Eq. 3           reward, group_advantages
ρ⁽ⁱ⁾, ε (clip)   Eq. 3           exp(log_ratio), clip_range
J(θ)            Eq. 3           clipped_objective

How this departs from the paper:
1. The world is a toy (reward.py): 32x32 clips, 4 chunks of 3 frames, a 3 M parameter generator on pixels. So the defaults that
   depend on size differ (learning rate, rank); --help shows the paper's value beside each.
2. The P prompts of an iteration share the pivot and the indices of the anchors, so that all of them run as one batch.
3. d is the plain sum of squares; tau is given for one element and multiplied by their number, so that it does not depend on size.
4. The three rewards are put on one scale by their mean and deviation on the base's own clips before they are weighted and added.
5. π_old is that of the first replay, not of the rollout (see update); σ_r has a floor, so that a nearly flat group moves little.
6. The same anchors serve all updates of an iteration; J is averaged over anchors, steps and prompts.
7. The base is distilled from its teacher on real past chunks, where Self-Forcing trains on its own rollouts.

In shapes: T steps, L chunks, P prompts, G branches of a group, B anchors, N rows of a batch; x_t is [N, frames, 3, height, width].
"""

import argparse
import csv
import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import imageio.v3 as iio
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn
from tqdm import tqdm

from reward import (ASSETS, CHUNK_FRAMES, CHUNKS, COLOURS, HELD_OUT_PROMPTS, MOTIONS, SHAPES, SIZE, TRAIN_PROMPTS, ClipReward, Parser,
                    UserError, WeightedReward, attributes, check_folder, judge, make_clips, muon_and_adamw, nonempty, one_line,
                    parse_weights, step_with)


# ------------------------------------------------------------------ settings

POSITIVE = ("> 0", lambda v: 0 < v < math.inf)
COUNT = (">= 1", lambda v: v >= 1)
UP_TO_4096 = ("from 1 to 4096", lambda v: 1 <= v <= 4096)
ANY = ("", lambda v: True)


def setting(default, section: str, text: str, paper: str = "", valid: tuple = ANY):
    return field(default=default, metadata={"section": section, "text": text, "paper": paper, "valid": valid})


@dataclass
class Settings:
    """Every setting: default, meaning, the paper's value. Each default runs on a laptop."""
    steps: int = setting(100, "what to do", "iterations of on-policy AR-CoPO", "100", COUNT)
    sample: str = setting("", "what to do", "stream one clip of this prompt to --out (a .gif) instead")
    pretrain: bool = setting(False, "what to do", "make the base from nothing instead, into --out")
    out: str = setting("", "what to do", "folder of the run (default: runs/ and the time, or runs/pretrain); with --sample the GIF (clip.gif)")
    adapter: str = setting("", "what to do", "with --sample: the adapter to apply")
    base: str = setting(str(ASSETS / "base.safetensors"), "what to do", "weights of the base generator")
    seed: int = setting(0, "what to do", "seed of everything random", "", ("in [0, 2^63)", lambda v: 0 <= v < 2**63))
    device: str = setting("auto", "what to do", "cpu, cuda, cuda:1 ...; auto is CUDA when there is one")
    precision: str = setting("bf16", "what to do", "bf16 (autocast) or fp32", "",
                             ("bf16 or fp32", lambda v: v in ("bf16", "fp32")))

    group: int = setting(12, "AR-CoPO", "branches G of a fork", "12", (">= 2", lambda v: v >= 2))
    sigma: float = setting(0.5, "AR-CoPO", "radius σ of the neighbourhood in noise space (Eq. 1)", "0.5",
                           ("in (0, 1]", lambda v: 0 < v <= 1))
    anchors: int = setting(4, "AR-CoPO", "anchors B of the G candidates (symmetric anchor sampling)", "4", COUNT)
    updates: int = setting(2, "AR-CoPO", "policy updates per iteration", "2", COUNT)
    prompts: int = setting(4, "AR-CoPO", "prompts P per iteration, one batch", "24 GPUs",
                           (f"from 1 to {len(TRAIN_PROMPTS)}", lambda v: 1 <= v <= len(TRAIN_PROMPTS)))
    clip_range: float = setting(1e-4, "AR-CoPO", "ε of the ratio clip (Eq. 3)", "1e-4", POSITIVE)
    tau: float = setting(0.03, "AR-CoPO", "temperature τ₀ for each element of a chunk (Eq. 5)", "", POSITIVE)
    quasi_norm: float = setting(0.0, "AR-CoPO", "p of the quasi-norm of the advantages; 0: plain deviation", "0.8 in Neighbor GRPO",
                                ("0 or in [0.1, 2]", lambda v: v == 0 or 0.1 <= v <= 2))
    floor: float = setting(0.02, "AR-CoPO", "least deviation of a group's rewards; below it, it counts as flat", "", POSITIVE)
    lr: float = setting(2e-5, "AR-CoPO", "learning rate of AdamW", "1e-5", POSITIVE)
    rank: int = setting(16, "AR-CoPO", "rank r of the LoRA adapter", "64", UP_TO_4096)
    alpha: float = setting(32.0, "AR-CoPO", "α of the LoRA adapter, which is scaled by α/r", "128", POSITIVE)

    clip: str = setting(str(ASSETS / "clip"), "reward", "open_clip model: ARCH:TAG (ViT-B-32:laion2b_s34b_b79k), ARCH:FILE or a folder",
                        "VideoAlign")
    reward_weights: str = setting("ta=1,vq=1,mq=1", "reward", "weights of text alignment, visual and motion quality", "1 each")
    judge_samples: int = setting(8, "reward", "clips of each held-out prompt to judge base and aligned model on", "", COUNT)

    teacher_steps: int = setting(1600, "pre-training", "steps of flow matching", "", COUNT)
    student_steps: int = setting(180, "pre-training", "steps of distillation", "", COUNT)
    batch: int = setting(32, "pre-training", "clips in a batch", "", UP_TO_4096)
    width: int = setting(192, "pre-training", "width of the transformer", "1536 (1.3 B)", COUNT)
    layers: int = setting(6, "pre-training", "its layers", "30 (1.3 B)", COUNT)
    heads: int = setting(3, "pre-training", "its heads", "12 (1.3 B)", COUNT)

    def __post_init__(self):
        for f in dataclasses.fields(self):
            rule, holds = f.metadata["valid"]
            if not holds(getattr(self, f.name)):
                raise UserError(f"--{f.name.replace('_', '-')} {getattr(self, f.name)}: must be {rule}")
        if self.adapter and not self.sample:
            raise UserError(f"--adapter {self.adapter}: goes with --sample")
        if self.pretrain and self.sample:
            raise UserError("--pretrain and --sample: name one of them")
        if self.anchors > self.group:
            raise UserError(f"--anchors {self.anchors}: must be at most --group, which is {self.group}")
        if self.width % self.heads:
            raise UserError(f"--width {self.width}: must be a multiple of --heads, which is {self.heads}")


def seeded(seed: int, *stream: int) -> torch.Generator:
    """A random generator that depends on the seed and the stream alone, always on the CPU: the same noise on every device."""
    for number in stream:
        seed = (seed * 1_000_003 + number) % 2**63
    return torch.Generator().manual_seed(seed)


ADAPTER, TRAINING, CALIBRATION, JUDGING, SAMPLING = range(1, 6)      # streams of random numbers: no draw of one moves another


# ------------------------------------------------------------------ model

PATCH = 8
TIMESTEPS = (1.0, 0.6, 0.33, 0.14)       # lower than a large model's: a small clip keeps little of its content under strong noise


class Context(NamedTuple):
    """h_p, all that is fixed before the next chunk. A value, not state: extending it returns a new one, so a fork is a copy."""
    words: Tensor           # [N, width]                                     the prompt
    kv: Tensor              # [layers, 2, N, heads, tokens, head width]      keys and values of the finished chunks

    def repeat(self, times: int) -> "Context":
        """The context of each row for `times` branches: row b * N + n is branch b of row n."""
        return Context(self.words.repeat(times, 1), self.kv.repeat(1, 1, times, 1, 1, 1))


class Block(nn.Module):
    """Attention and MLP, modulated by time and prompt (adaLN; one projection for all blocks and a table for each, as in Wan)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.table = nn.Parameter(torch.randn(6, width) / width**0.5)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor, modulation: Tensor, past: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        N, C, K, W = x.shape                                                                    # rows, chunks, tokens, width
        shift1, scale1, gate1, shift2, scale2, gate2 = (modulation + self.table)[:, :, :, None].unbind(2)   # [N, C, 1, W]
        y = F.layer_norm(x, (W,)) * (1 + scale1) + shift1
        q, k, v = self.qkv(y).view(N, C * K, 3, self.heads, -1).permute(2, 0, 3, 1, 4)          # [N, heads, C*K, D]
        q, k = (F.rms_norm(z, z.shape[-1:]).to(v.dtype) for z in (q, k))
        new = torch.stack([k, v])                                                               # [2, N, heads, C*K, D]
        k, v = torch.cat([past.to(v.dtype), new], 3)
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5       # plain: on a CPU faster than scaled_dot_product_attention
        if mask is not None:
            scores = scores + mask.to(scores.dtype)
        y = (scores.softmax(-1).to(v.dtype) @ v).transpose(1, 2).reshape(N, C, K, W)
        x = x + gate1 * self.out(y)
        y = F.layer_norm(x, (W,)) * (1 + scale2) + shift2
        return x + gate2 * self.down(F.gelu(self.up(y))), new


class Generator(nn.Module):
    """A chunk-causal video transformer with the contract below. The algorithm knows nothing else of the model.

    begin(prompts)           -> Context                  the context before the first chunk
    predict(x_t, t, context) -> x̂₀ like x_t              F_θ: the clean chunk, in one jump from a noisy one at time t
    extend(context, x0)      -> Context                  the context with a finished clean chunk written into it (at t = 0)
    decode(latents)          -> clips in [0, 1]          here latents are pixels in [-1, 1]
    timesteps, chunk_shape, chunks                       the T times of the sampler, the shape of x_t for one row, L

    x_t = (1 - t) x₀ + t ε, with t = 1 pure noise.
    """

    chunk_shape, chunks = (CHUNK_FRAMES, 3, SIZE, SIZE), CHUNKS

    def __init__(self, width: int = 192, layers: int = 6, heads: int = 3, timesteps: tuple = TIMESTEPS, bf16: bool = True):
        super().__init__()
        self.width, self.layers, self.heads, self.timesteps, self.bf16 = width, layers, heads, tuple(timesteps), bf16
        self.tokens = CHUNK_FRAMES * (SIZE // PATCH) ** 2
        self.patch = nn.Linear(3 * PATCH**2, width)
        self.position = nn.Parameter(0.02 * torch.randn(CHUNKS, self.tokens, width))
        self.word = nn.Embedding(len(COLOURS) + len(SHAPES) + len(MOTIONS), width)
        self.time = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.table = nn.Parameter(torch.randn(2, width) / width**0.5)
        self.head = nn.Linear(width, 3 * PATCH**2)
        nn.init.zeros_(self.head.weight)

    @property
    def device(self) -> torch.device:
        return self.position.device

    def begin(self, prompts: list[str]) -> Context:
        ids = attributes(prompts) + torch.tensor([0, len(COLOURS), len(COLOURS) + len(SHAPES)])
        words = self.word(ids.to(self.device)).sum(1)
        return Context(words, words.new_zeros(self.layers, 2, len(prompts), self.heads, 0, self.width // self.heads))

    def predict(self, x_t: Tensor, t: float | Tensor, context: Context) -> Tensor:
        t = torch.as_tensor(t, dtype=torch.float32, device=self.device).expand(len(x_t))
        return self(x_t[:, None], t[:, None], context)[0][:, 0]

    def extend(self, context: Context, x0: Tensor) -> Context:
        kv = self(x0[:, None], torch.zeros(len(x0), 1, device=self.device), context)[1]
        return Context(context.words, torch.cat([context.kv.to(kv.dtype), kv], 4))

    @staticmethod
    def decode(latents: Tensor) -> Tensor:
        """[N, L, *chunk_shape] in [-1, 1] -> [N, FRAMES, 3, SIZE, SIZE] in [0, 1]."""
        return (latents.flatten(1, 2).float() / 2 + 0.5).clamp(0, 1)

    @staticmethod
    def encode(clips: Tensor) -> Tensor:
        return (clips * 2 - 1).unflatten(1, (CHUNKS, CHUNK_FRAMES))

    def forward(self, x: Tensor, t: Tensor, context: Context, visible: Tensor | None = None,
                first: int | None = None) -> tuple[Tensor, Tensor]:
        """C chunks at once: x [N, C, *chunk_shape] at times t [N, C] -> x̂₀ like x, and keys and values [layers, 2, N, heads, C*K, D].

        visible [C, past + C]: which chunk sees which (None: all). first: the place of x[:, 0] in the clip (None: after the context).
        """
        N, C, side = *x.shape[:2], SIZE // PATCH
        first = context.kv.shape[4] // self.tokens if first is None else first
        mask = None
        if visible is not None:
            mask = visible.to(x.device).repeat_interleave(self.tokens, 0).repeat_interleave(self.tokens, 1)
            mask = torch.zeros(mask.shape, device=x.device).masked_fill(~mask, float("-inf"))
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            frequency = torch.exp(-math.log(1e4) / 128 * torch.arange(128, device=x.device))
            angle = 1000 * t[..., None] * frequency
            condition = self.time(torch.cat([angle.cos(), angle.sin()], -1)) + context.words[:, None]           # [N, C, W]
            modulation = self.modulation(condition).view(N, C, 6, self.width)
            y = x.reshape(N, C, CHUNK_FRAMES, 3, side, PATCH, side, PATCH).permute(0, 1, 2, 4, 6, 3, 5, 7)
            y = self.patch(y.reshape(N, C, self.tokens, -1))                                                    # [N, C, K, W]
            y = y + self.position[first : first + C] + context.words[:, None, None]
            kv = []
            for block, past in zip(self.blocks, context.kv):
                y, new = block(y, modulation, past, mask)
                kv.append(new)
            shift, scale = (condition[:, :, None] + self.table)[:, :, :, None].unbind(2)
            y = self.head(F.layer_norm(y, (self.width,)) * (1 + scale) + shift).float()
        y = y.view(N, C, CHUNK_FRAMES, side, side, 3, PATCH, PATCH).permute(0, 1, 2, 5, 3, 6, 4, 7)
        return y.reshape(x.shape), torch.stack(kv)

    def write_all(self, clean: Tensor, prompts: list[str]) -> Context:
        """The context after all but the last of the chunks clean [N, L, *chunk_shape], in one pass (teacher forcing)."""
        context = self.begin(prompts)
        causal = torch.ones(CHUNKS - 1, CHUNKS - 1, dtype=torch.bool).tril()
        return Context(context.words, self(clean[:, :-1], clean.new_zeros(len(clean), CHUNKS - 1), context, causal)[1])

    def predict_all(self, x_t: Tensor, t: Tensor, context: Context) -> Tensor:
        """predict for every chunk at once: x_t [N, L, *chunk_shape] at times t [N, L], each chunk behind its own clean past."""
        past = torch.ones(CHUNKS, CHUNKS - 1, dtype=torch.bool).tril(-1)
        return self(x_t, t, context, torch.cat([past, torch.eye(CHUNKS, dtype=torch.bool)], 1), first=0)[0]


# ------------------------------------------------------------------ sampler

class Noise(NamedTuple):
    """All noise of a rollout, drawn before it: what branches share and where they differ is in plain sight."""
    initial: Tensor         # [L, N, *chunk_shape]           where chunk p starts, ε_p
    solver: Tensor          # [L, T-1, N, *chunk_shape]      what re-noises its clean predictions

    def repeat(self, times: int) -> "Noise":
        """The noise of each row for `times` branches, in the order of Context.repeat."""
        return Noise(self.initial.repeat(1, times, 1, 1, 1, 1), self.solver.repeat(1, 1, times, 1, 1, 1, 1))


def draw_noise(model: Generator, rows: int, generator: torch.Generator) -> Noise:
    shape = (rows, *model.chunk_shape)
    initial = torch.randn(model.chunks, *shape, generator=generator)
    solver = torch.randn(model.chunks, len(model.timesteps) - 1, *shape, generator=generator)
    return Noise(initial.to(model.device), solver.to(model.device))


def denoise(model: Generator, context: Context, initial: Tensor, solver: Tensor) -> tuple[Tensor, Tensor]:
    """One chunk from its noise, as Self-Forcing samples: predict x̂₀, re-noise it to the next time, T times.

    initial [N, *chunk_shape], solver [T-1, N, *chunk_shape] -> states x_t and predictions x̂₀,t, both [T, N, *chunk_shape]; the
    last prediction is the finished chunk.
    """
    x_t, states, predictions = initial, [], []
    for i, t in enumerate(model.timesteps):
        if i > 0:
            x_t = (1 - t) * predictions[-1] + t * solver[i - 1]
        states.append(x_t)
        predictions.append(model.predict(x_t, t, context))
    return torch.stack(states), torch.stack(predictions)


@torch.no_grad()
def rollout(model: Generator, context: Context, noise: Noise, start: int, stop: int) -> tuple[list[Tensor], Context]:
    """Stream chunks start..stop-1 behind their context: a list of [N, *chunk_shape], and the context after them."""
    chunks = []
    for p in range(start, stop):
        chunks.append(denoise(model, context, noise.initial[p], noise.solver[p])[1][-1])
        if p + 1 < model.chunks:
            context = model.extend(context, chunks[-1])
    return chunks, context


@torch.no_grad()
def sample(model: Generator, prompts: list[str], noise: Noise) -> Tensor:
    """Whole clips in [0, 1], [N, FRAMES, 3, SIZE, SIZE]."""
    return model.decode(torch.stack(rollout(model, model.begin(prompts), noise, 0, model.chunks)[0], 1))


# ------------------------------------------------------------------ fork

class Fork(NamedTuple):
    """What the update needs of the G branches of P prompts."""
    context: Context        # h_{p-1}, P rows
    states: Tensor          # [T, G, P, *chunk_shape]        x_t⁽ⁱ⁾ of the pivot chunk
    predictions: Tensor     # [T, G, P, *chunk_shape]        x̂₀,t⁽ⁱ⁾, the candidates
    clips: Tensor           # [G, P, FRAMES, 3, SIZE, SIZE]  the finished clips


@torch.no_grad()
def fork(model: Generator, prompts: list[str], pivot: int, group: int, sigma: float, noise: Noise,
         generator: torch.Generator) -> Fork:
    """Algorithm 1, lines 2 to 5: one prefix, then G branches as one batch. Nothing but ε_p⁽ⁱ⁾ differs between them.

    noise has a row for each of the P prompts; generator draws the δ⁽ⁱ⁾ of Eq. 1.
    """
    P = len(prompts)
    prefix, context = rollout(model, model.begin(prompts), noise, 0, pivot)                     # line 2: once, with P rows
    branch, shared = context.repeat(group), noise.repeat(group)                                 # line 3: G * P rows
    initial = neighbor_noise(noise.initial[pivot], sigma, group, generator)                     # line 4: [G, P, *chunk_shape]
    states, predictions = denoise(model, branch, initial.flatten(0, 1), shared.solver[pivot])   # line 5
    chunks = [chunk.repeat(group, 1, 1, 1, 1) for chunk in prefix] + [predictions[-1]]
    if pivot + 1 < model.chunks:
        chunks += rollout(model, model.extend(branch, predictions[-1]), shared, pivot + 1, model.chunks)[0]
    clips = model.decode(torch.stack(chunks, 1)).unflatten(0, (group, P))
    return Fork(context, states.unflatten(1, (group, P)), predictions.unflatten(1, (group, P)), clips)


# ------------------------------------------------------------------ objective (pure functions of tensors: lift them out)

def neighbor_noise(base: Tensor, sigma: float, group: int, generator: torch.Generator | None = None) -> Tensor:
    """ε⁽ⁱ⁾ = √(1-σ²) ε* + σ δ⁽ⁱ⁾ with δ⁽ⁱ⁾ ~ N(0, I) (Eq. 1): `group` neighbours of a noise, of the same expected norm.

    base: any shape -> [group, *base.shape]. sigma in [0, 1]: 0 copies the base, 1 draws independent noise (plain best-of-G
    exploration). Raises ValueError for another sigma.
    """
    if not 0 <= sigma <= 1:
        raise ValueError(f"sigma must be in [0, 1], got {sigma}")
    device = generator.device if generator else base.device
    delta = torch.randn(group, *base.shape, generator=generator, device=device).to(base)
    return (1 - sigma**2) ** 0.5 * base + sigma * delta


def group_advantages(rewards: Tensor, p: float | None = None, floor: float = 1e-6) -> Tensor:
    """A⁽ⁱ⁾ = (r⁽ⁱ⁾ - r̄) / σ_r over the last axis (Eq. 3), σ_r the deviation of the group itself (not Bessel's).

    rewards [..., G] -> [..., G]. σ_r is never taken below `floor`, so a nearly flat group moves little; a flat one gives zeros.
    With p, the quasi-norm A / (Σ|A|^p)^{1/p} (Neighbor GRPO Eq. 11; the paper's p is 0.8), p in (0, 2]; p = 2 is A / √G.
    """
    centred = rewards - rewards[..., :1]                       # first, so that a flat group is exactly zero
    centred = centred - centred.mean(-1, keepdim=True)
    deviation = centred.square().mean(-1, keepdim=True).sqrt()
    if p is None:
        return centred / deviation.clamp_min(floor)
    norm = centred.abs().pow(p).sum(-1, keepdim=True).pow(1 / p)      # the same for any scale of A: so the floor acts apart
    return centred / norm.clamp_min(1e-30) * (deviation / floor).clamp_max(1)


def surrogate_log_policy(candidates: Tensor, anchor: Tensor, tau: float) -> Tensor:
    """log π_θ(i) = log softmax_i(-d⁽ⁱ⁾/τ), d⁽ⁱ⁾ = ‖x⁽ⁱ⁾ - x^(θ)‖² (Eq. 2; Eq. 5 when both are clean predictions x̂₀).

    candidates [G, ...] are constants, anchor [...] carries the gradient -> [G]. d is the plain sum of squares over all other
    axes, not their mean: τ has the unit of a squared norm.
    """
    d = (candidates - anchor).square().flatten(1).sum(1)
    return F.log_softmax(-d / tau, 0)


def clipped_objective(log_ratio: Tensor, advantages: Tensor, clip: float | None) -> Tensor:
    """J = 1/G Σ_i min(ρ⁽ⁱ⁾ A⁽ⁱ⁾, clip(ρ⁽ⁱ⁾, 1-ε, 1+ε) A⁽ⁱ⁾) (Eq. 3), a scalar to be MAXIMISED.

    log_ratio [..., G] = log π_θ - log π_old, advantages broadcast to it; leading axes (steps, prompts, anchors) are averaged.
    clip=None is no clip (the paper's off-policy baseline).
    """
    ratio = log_ratio.exp()
    if clip is None:
        return (ratio * advantages).mean()
    return torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages).mean()


# ------------------------------------------------------------------ adapter

class Adapter:
    """LoRA beside every linear layer: y = W x + s · B A x (Hu et al. 2021), with s = α/r and B zero at the start.

    The model is never changed: `with adapter.on(model):` adds the low-rank terms for as long as the block lasts, and several
    adapters add up. weights: {layer: (A [r, in], B [out, r])}, float32.
    """

    def __init__(self, weights: dict[str, tuple[Tensor, Tensor]], alpha: float):
        self.weights, self.alpha = weights, alpha
        self.scale = alpha / next(iter(weights.values()))[0].shape[0]

    @classmethod
    def new(cls, model: nn.Module, rank: int, alpha: float, generator: torch.Generator | None = None) -> "Adapter":
        weights = {}
        for name, layer in model.named_modules():
            if isinstance(layer, nn.Linear):
                A = (torch.rand(rank, layer.in_features, generator=generator) * 2 - 1) / layer.in_features**0.5
                B = torch.zeros(layer.out_features, rank)
                weights[name] = tuple(z.to(layer.weight.device).requires_grad_() for z in (A, B))
        return cls(weights, alpha)

    def parameters(self) -> list[Tensor]:
        return [z for pair in self.weights.values() for z in pair]

    @contextmanager
    def on(self, model: nn.Module, strength: float = 1.0):
        def hook(A: Tensor, B: Tensor):
            return lambda layer, inputs, output: output + strength * self.scale * F.linear(F.linear(inputs[0], A), B)
        hooks = [model.get_submodule(name).register_forward_hook(hook(*pair)) for name, pair in self.weights.items()]
        try:
            yield model
        finally:
            for handle in hooks:
                handle.remove()

    def save(self, file: Path) -> None:
        tensors = {f"{name}.lora_{x}.weight": z for name, pair in self.weights.items() for x, z in zip("AB", pair)}
        write_weights(file, tensors, {"alpha": repr(self.alpha)})

    @classmethod
    def load(cls, file: str | Path, model: nn.Module) -> "Adapter":
        """Raises UserError for a file that is missing, broken or made for another model."""
        tensors, metadata = read_weights(file, "--adapter")
        try:
            weights, ranks = {}, set()
            for name, layer in ((n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)):
                A, B = (tensors[f"{name}.lora_{x}.weight"].to(layer.weight) for x in "AB")
                if (B @ A).shape != layer.weight.shape:
                    raise ValueError(f"{name}: B A is {tuple((B @ A).shape)}, the layer {tuple(layer.weight.shape)}")
                weights[name] = A, B
                ranks.add(len(A))
            if len(ranks) != 1 or 0 in ranks:
                raise ValueError(f"its ranks are {sorted(ranks)}, not one")
            return cls(weights, float(metadata["alpha"]))
        except (KeyError, ValueError, RuntimeError) as error:
            raise UserError(f"--adapter {file}: not an adapter of this base ({one_line(error)})") from error


def merge_adapters(*terms: tuple[Adapter, float]) -> Adapter:
    """Σ s_k Δ_k as one adapter, exactly: the ranks add up (Sec. 3.3: θ = θ_ref + Δ_semi + s · Δ_on)."""
    weights = {}
    for name in terms[0][0].weights:
        A = torch.cat([adapter.weights[name][0] for adapter, s in terms]).detach()
        B = torch.cat([adapter.weights[name][1] * (s * adapter.scale) for adapter, s in terms], 1).detach()
        weights[name] = (A, B)
    return Adapter(weights, alpha=float(A.shape[0]))           # α = r: the scales are in B


# ------------------------------------------------------------------ training

def replay(model: Generator, branches: Fork, anchors: Tensor) -> Tensor:
    """x̂₀,t^(θ) (Eq. 4): predict anew from the anchors' stored states -> [T, B, P, *chunk_shape]. All that is differentiated.

    All steps run as one batch; one step at a time gives the same and needs a T-th of the memory.
    """
    states = branches.states[:, anchors]
    T, B, P = states.shape[:3]
    t = torch.tensor(model.timesteps, device=states.device).repeat_interleave(B * P)
    return model.predict(states.flatten(0, 2), t, branches.context.repeat(T * B)).view_as(states)


def log_policies(branches: Fork, x0: Tensor, tau: float) -> Tensor:
    """log π_θ(i | s_t) for every step, prompt and anchor: replayed x0 [T, B, P, *chunk_shape] -> [T, P, B, G]."""
    policy = lambda candidates, anchor: surrogate_log_policy(candidates, anchor, tau * anchor.numel())
    for axes in ((None, 0), (1, 1), (0, 0)):                   # over anchors, prompts, steps
        policy = torch.vmap(policy, axes)
    return policy(branches.predictions, x0)


def update(model: Generator, branches: Fork, advantages: Tensor, optimizer: torch.optim.Optimizer, settings: Settings,
           generator: torch.Generator) -> dict:
    """Algorithm 1, lines 8 and 9: a few steps up J on the pivot chunk only. advantages [P, G] -> diagnostics:

    ratio_first (mean at the first update: 1), clip_fraction (terms whose gradient the clip stops, at the last update), grad_norm
    (mean over updates), replay_error (largest difference of replay and rollout before any update), skipped (non-finite updates).
    """
    parameters = [p for options in optimizer.param_groups for p in options["params"]]
    anchors = torch.randperm(settings.group, generator=generator)[: settings.anchors]
    old, ratios, norms, skipped = None, [], [], 0
    for _ in range(settings.updates):
        x0 = replay(model, branches, anchors)                                                   # line 8
        log_policy = log_policies(branches, x0, settings.tau)
        if old is None:
            # π_old from this very replay and not from the rollout, which ran another batch size and, in bf16 on some devices, is
            # rounded otherwise: the first ratio is exp(x - x), exactly 1, and its gradient is that of log π_θ all the same.
            old, replay_error = log_policy.detach(), (x0.detach() - branches.predictions[:, anchors]).abs().max()
        log_ratio = log_policy - old
        J = clipped_objective(log_ratio, advantages[:, None], settings.clip_range)
        optimizer.zero_grad()
        (-J).backward()                                                                         # line 9
        ratios.append(log_ratio.detach().exp())
        norms.append(nn.utils.get_total_norm([p.grad for p in parameters]))
        if torch.isfinite(J) and torch.isfinite(norms[-1]):
            optimizer.step()
        else:
            skipped += 1
    clipped = ((ratios[-1] - 1) * advantages[:, None].sign() > settings.clip_range).float().mean()
    return {"ratio_first": ratios[0].mean().item(), "clip_fraction": clipped.item(), "grad_norm": torch.stack(norms).mean().item(),
            "replay_error": replay_error.item(), "skipped": skipped}


def iterate(model: Generator, prompts: list[str], reward: Callable, optimizer: torch.optim.Optimizer, settings: Settings,
            generator: torch.Generator) -> dict:
    """One iteration of Algorithm 1 for P prompts -> a row of metrics: the pivot (from 1), means of reward and components, deviation
    (of the reward inside a group), flat_groups (share of them with a deviation below the floor), update's diagnostics, seconds.

    reward(clips [N, FRAMES, 3, SIZE, SIZE], prompts) -> {"reward": [N], any components: [N]}.
    """
    began, P, G = time.perf_counter(), settings.prompts, settings.group
    prompts = [prompts[i] for i in torch.randperm(len(prompts), generator=generator)[:P]]
    pivot = int(torch.randint(model.chunks, (), generator=generator))                           # line 1
    branches = fork(model, prompts, pivot, G, settings.sigma, draw_noise(model, P, generator), generator)
    scores = reward(branches.clips.flatten(0, 1), prompts * G)
    rewards = scores["reward"].view(G, P).T                                                     # [P, G]
    advantages = group_advantages(rewards, settings.quasi_norm or None, settings.floor).to(model.device)        # line 7
    deviation = rewards.std(1, correction=0)
    row = {"pivot": pivot + 1} | {name: value.mean().item() for name, value in scores.items()}
    row |= {"deviation": deviation.mean().item(), "flat_groups": (deviation < settings.floor).float().mean().item()}
    return row | update(model, branches, advantages, optimizer, settings, generator) | {"seconds": time.perf_counter() - began}


def mean_of(rows: list[dict], column: str) -> float:
    return mean([row[column] for row in rows if math.isfinite(row[column])] or [math.nan])


def align(model: Generator, reward: Callable, settings: Settings, folder: Path) -> tuple[Adapter, list[dict]]:
    """Train one on-policy adapter; the base stays as it is. Writes metrics.csv row by row and adapter.safetensors at the end."""
    adapter = Adapter.new(model, settings.rank, settings.alpha, seeded(settings.seed, ADAPTER))
    optimizer = torch.optim.AdamW(adapter.parameters(), settings.lr, weight_decay=0)
    rows, skipped = [], 0
    with adapter.on(model), open(folder / "metrics.csv", "w", newline="") as file:
        bar = tqdm(range(settings.steps), desc="on-policy", unit="it")
        for step in bar:
            generator = seeded(settings.seed, TRAINING, step)
            row = {"step": step + 1} | iterate(model, TRAIN_PROMPTS, reward, optimizer, settings, generator)
            if not rows:
                writer = csv.DictWriter(file, row)
                writer.writeheader()
            writer.writerow(row)
            file.flush()
            rows.append(row)
            skipped += row["skipped"]
            bar.set_postfix_str(f"reward {mean_of(rows[-10:], 'reward'):+.2f}, clipped {row['clip_fraction']:.0%}, "
                                f"flat {row['flat_groups']:.0%}" + (f", skipped {skipped} non-finite" if skipped else ""))
    adapter.save(folder / "adapter.safetensors")
    return adapter, rows


# ------------------------------------------------------------------ base model

def read_weights(file: str | Path, option: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file (never pickle). Raises UserError if it is missing or broken."""
    if not Path(file).is_file():
        raise UserError(f"{option} {file}: no such file")
    try:
        with safe_open(str(file), "pt") as f:
            tensors, metadata = {name: f.get_tensor(name) for name in f.keys()}, f.metadata() or {}
    except Exception as error:
        raise UserError(f"{option} {file}: not a whole safetensors file ({one_line(error)})") from error
    if not all(t.isfinite().all() for t in tensors.values()):
        raise UserError(f"{option} {file}: holds numbers that are not finite")
    return tensors, metadata


def write_weights(file: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write all or nothing."""
    part = Path(f"{file}.part")
    try:
        part.write_bytes(save({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, metadata))
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)


def save_generator(model: Generator, file: Path) -> None:
    shape = {"width": model.width, "layers": model.layers, "heads": model.heads, "timesteps": model.timesteps}
    write_weights(file, {name: t.bfloat16() for name, t in model.state_dict().items()}, {"generator": json.dumps(shape)})


def load_generator(file: str | Path, device: str | torch.device = "cpu", bf16: bool = True) -> Generator:
    """A frozen base generator. Raises UserError for a file that is missing, broken or of another shape."""
    tensors, metadata = read_weights(file, "--base")
    try:
        model = Generator(**json.loads(metadata["generator"]), bf16=bf16)
        model.load_state_dict(tensors)
        if model.timesteps[:1] != (1,) or min(model.timesteps) <= 0 or sorted(model.timesteps, reverse=True) != list(model.timesteps):
            raise ValueError(f"its timesteps {model.timesteps} do not fall from 1 toward 0")
    except (KeyError, TypeError, ValueError, RuntimeError, ArithmeticError) as error:
        raise UserError(f"--base {file}: not a generator that --pretrain wrote ({one_line(error)})") from error
    return model.to(device).requires_grad_(False)


ODE_STEPS, SAVE_EVERY = 6, 100


def pretrain_loss(model: Generator, teacher: Generator | None, settings: Settings, generator: torch.Generator) -> Tensor:
    """Flow matching with teacher forcing or, given a teacher, its distillation to a consistency sampler.

    Flow matching: x_t of each chunk, behind real (slightly noised) past chunks, is asked for v = (x_t - x₀)/t (t >= 0.05 there).
    Distillation: the jump from x_t is asked for the end of the teacher's ODE from there; 60 % of the times are the sampler's.
    """
    N, device = settings.batch, model.device
    prompts = [TRAIN_PROMPTS[i] for i in torch.randint(len(TRAIN_PROMPTS), (N,), generator=generator)]
    clean = Generator.encode(make_clips(prompts, generator))                                    # [N, L, F, 3, H, W]
    noise, context_noise = (torch.randn(clean.shape, generator=generator) for _ in range(2))
    u = 0.1 * torch.rand(N, CHUNKS, 1, 1, 1, 1, generator=generator)
    t = torch.sigmoid(0.6 + 1.1 * torch.randn(N, CHUNKS, generator=generator))
    if teacher:
        own = torch.tensor(model.timesteps)[torch.randint(len(model.timesteps), t.shape, generator=generator)]
        t = torch.where(torch.rand(t.shape, generator=generator) < 0.6, own, 0.05 + 0.95 * torch.rand(t.shape, generator=generator))
    clean, past, noise, t = (z.to(device) for z in (clean, (1 - u) * clean + u * context_noise, noise, t))
    s = t[..., None, None, None, None]
    x_t = (1 - s) * clean + s * noise
    prediction = model.predict_all(x_t, t, model.write_all(past, prompts))
    if teacher is None:
        return ((prediction - clean) / s.clamp_min(0.05)).square().mean()
    with torch.no_grad():
        context = teacher.write_all(past, prompts)
        for k in range(ODE_STEPS):                                                              # Euler from t to 0
            x0 = teacher.predict_all(x_t, t * (1 - k / ODE_STEPS), context)
            x_t = x0 + (x_t - x0) * (ODE_STEPS - k - 1) / (ODE_STEPS - k)
    return ((prediction - x_t).square().flatten(2).mean(2) + 0.03**2).sqrt().mean()


def fit(stage: str, model: Generator, teacher: Generator | None, steps: int, lr: float, settings: Settings, folder: Path) -> None:
    """Train one stage to the end. Resumes from the stage's checkpoint; a step's data depend on the seed and the step alone."""
    hidden = [m.weight for m in model.blocks.modules() if isinstance(m, nn.Linear)]
    optimizers = muon_and_adamw(model, hidden)
    checkpoint, start = folder / f"{stage}.checkpoint.safetensors", 0
    described = json.dumps({n: getattr(settings, n) for n in ("seed", "batch", "width", "layers", "heads", "precision")}
                           | {"steps": steps})
    if checkpoint.is_file():
        tensors, metadata = read_weights(checkpoint, "--out")
        if metadata.get("settings") != described:
            raise UserError(f"--out {folder}: holds a pre-training with other settings ({metadata.get('settings')}); name another")
        start = int(metadata["step"])
        model.load_state_dict({name[6:]: t for name, t in tensors.items() if name.startswith("model.")})
        for i, optimizer in enumerate(optimizers):
            state = {}
            for name, t in tensors.items():
                if name.startswith(f"optimizer{i}."):
                    state.setdefault(int(name.split(".")[1]), {})[name.split(".")[2]] = t
            optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    bar = tqdm(range(start, steps), desc=stage, initial=start, total=steps, unit="step")
    for step in bar:
        loss = pretrain_loss(model, teacher, settings, seeded(settings.seed, step))
        model.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        step_with(optimizers, lr * min(1, (step + 1) / 50, 2 * (1 - step / steps)))                # warm-up, constant, linear decay
        bar.set_postfix(loss=f"{loss.item():.4f}", grad=f"{norm.item():.2f}")
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
            tensors = {f"model.{name}": t for name, t in model.state_dict().items()}
            for i, optimizer in enumerate(optimizers):
                for index, state in optimizer.state_dict()["state"].items():
                    tensors |= {f"optimizer{i}.{index}.{name}": t for name, t in state.items()}
            write_weights(checkpoint, tensors, {"step": str(step + 1), "settings": described})


def pretrain(settings: Settings) -> None:
    """Make the base from nothing: teacher.safetensors (flow matching, many steps), then base.safetensors (consistency, T steps)."""
    folder = Path(settings.out or "runs/pretrain")
    check_folder(folder, new=not (folder / "teacher.checkpoint.safetensors").exists())
    torch.manual_seed(settings.seed)
    shape = {name: getattr(settings, name) for name in ("width", "layers", "heads")}
    folder.mkdir(parents=True, exist_ok=True)
    teacher = Generator(**shape, bf16=settings.precision == "bf16").to(settings.device)
    fit("teacher", teacher, None, settings.teacher_steps, 2e-3, settings, folder)
    save_generator(teacher, folder / "teacher.safetensors")
    student = Generator(**shape, bf16=settings.precision == "bf16").to(settings.device)
    student.load_state_dict(teacher.state_dict())
    fit("student", student, teacher.requires_grad_(False), settings.student_steps, 5e-4, settings, folder)
    save_generator(student, folder / "base.safetensors")
    print(f"wrote {folder}/base.safetensors; use it with --base")


# ------------------------------------------------------------------ evaluation

COLUMNS = {"reward": "reward", "ta": "TA", "vq": "VQ", "mq": "MQ", "all_right": "right", "text": "text", "visual": "visual",
           "motion_quality": "motion", "area": "area", "displacement": "displ.", "spread": "spread"}


@torch.no_grad()
def sample_batches(model: Generator, prompts: list[str], generator: torch.Generator, size: int = 48) -> Tensor:
    """sample in batches; the noise depends on the generator alone, so two models get the same."""
    return torch.cat([sample(model, prompts[i : i + size], draw_noise(model, len(prompts[i : i + size]), generator))
                      for i in range(0, len(prompts), size)])


def evaluate(clips: Tensor, prompts: list[str], reward: Callable) -> dict[str, Tensor]:
    """Rewards, judge and detectors of collapse, each [prompts]: means over the clips of a prompt, which must follow each other.

    spread: how far, in px, the clips of one prompt lie apart (deviation of their mean positions); 0 when they are all the same.
    """
    scores = reward(clips, prompts) | judge(clips, prompts)
    per_prompt = len(prompts) // len(set(prompts))
    scores = {name: value.float().cpu().view(-1, per_prompt) for name, value in scores.items()}
    spread = (scores.pop("x").var(1, correction=0) + scores.pop("y").var(1, correction=0)).sqrt()
    return {name: value.mean(1) for name, value in scores.items()} | {"spread": spread}


def table(results: dict[str, dict[str, Tensor]]) -> str:
    """Means by model, and the mean change from the first model with the standard error of its paired differences over prompts."""
    lines = [" " * 10 + f"{'reward model (open_clip)':>36} {'judge, in [0, 1]':>35} {'px², px, px':>27}",
             " " * 10 + "".join(f"{title:>9}" for title in COLUMNS.values())]
    first = next(iter(results.values()))
    for name, scores in results.items():
        lines.append(f"{name:<10}" + "".join(f"{scores[c].mean().item():>9.3f}" for c in COLUMNS))
    for name, scores in list(results.items())[1:]:
        change = {c: scores[c] - first[c] for c in COLUMNS}
        lines.append(f"{'  change':<10}" + "".join(f"{d.mean().item():>+9.3f}" for d in change.values()))
        lines.append(f"{'  ± s.e.':<10}" + "".join(f"{d.std().item() / len(d) ** 0.5:>9.3f}" for d in change.values()))
    return "\n".join(lines)


def sparkline(values: list[float], width: int = 50) -> str:
    """A curve in one line of text; each character is the mean of a stretch of values."""
    values = [value for value in values if math.isfinite(value)] or [0.0]
    width = min(width, len(values))
    parts = [values[i * len(values) // width : (i + 1) * len(values) // width] for i in range(width)]
    means = [mean(part) for part in parts]
    low, high = min(means), max(means)
    return "".join("▁▂▃▄▅▆▇█"[int(7.999 * (m - low) / (high - low or 1))] for m in means)


def save_gif(blocks: list[Tensor], file: Path, scale: int = 4) -> None:
    """Blocks of clips, each [rows, columns, FRAMES, 3, H, W] in [0, 1] -> a looping GIF of the blocks side by side."""
    mosaics = []
    for clips in blocks:
        clips = F.pad(clips, (1, 1, 1, 1), value=0.5).permute(2, 0, 4, 1, 5, 3)                 # [FRAMES, rows, H, columns, W, 3]
        mosaics += [clips.flatten(1, 2).flatten(2, 3), clips.new_ones(clips.shape[0], clips.shape[1] * clips.shape[2], 3, 3)]
    frames = torch.cat(mosaics[:-1], 2).repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    iio.imwrite(file, (frames * 255).round().byte().cpu().numpy(), extension=".gif", duration=150, loop=0)


def save_filmstrip(clips: Tensor, file: Path, scale: int = 2) -> None:
    """clips [prompts, models, FRAMES, 3, H, W] in [0, 1] -> a PNG, a line for each clip: a prompt's models follow each other."""
    clips = F.pad(clips, (1, 1, 1, 1), value=0.5).flatten(0, 1).permute(0, 3, 1, 4, 2)
    image = clips.flatten(2, 3).flatten(0, 1).repeat_interleave(scale, 0).repeat_interleave(scale, 1)
    iio.imwrite(file, (image * 255).round().byte().cpu().numpy(), extension=".png")


# ------------------------------------------------------------------ main

def run_alignment(settings: Settings) -> None:
    """Align, judge base and aligned model on held-out prompts with the same noise, report, and leave it all in the run's folder."""
    folder = Path(settings.out or time.strftime("runs/%Y%m%d-%H%M%S"))
    check_folder(folder, new=True)
    weights = parse_weights(settings.reward_weights)
    model = load_generator(settings.base, settings.device, settings.precision == "bf16")
    scorer = ClipReward(settings.clip, settings.device)
    reference = sample_batches(model, TRAIN_PROMPTS, seeded(0, CALIBRATION))                    # the same for all seeds: one scale
    reward = WeightedReward(scorer, weights, reference, TRAIN_PROMPTS)
    folder.mkdir(parents=True, exist_ok=True)
    record = dataclasses.asdict(settings) | {"reward_scales": reward.scales}
    (folder / "settings.json").write_text(json.dumps(record, indent=1) + "\n")

    adapter, rows = align(model, reward, settings, folder)
    prompts = [prompt for prompt in HELD_OUT_PROMPTS for _ in range(settings.judge_samples)]
    base = sample_batches(model, prompts, seeded(settings.seed, JUDGING))
    with adapter.on(model):
        aligned = sample_batches(model, prompts, seeded(settings.seed, JUDGING))
    results = {"base": evaluate(base, prompts, reward), "on-policy": evaluate(aligned, prompts, reward)}
    shown = [clips[:: len(prompts) // 8] for clips in (base, aligned)]                          # of 8 prompts the first clip
    save_gif([clips.unflatten(0, (2, 4)) for clips in shown], folder / "base_aligned.gif")
    save_filmstrip(torch.stack(shown, 1), folder / "base_aligned.png")
    means = {name: {column: value.mean().item() for column, value in scores.items()} for name, scores in results.items()}
    (folder / "judged.json").write_text(json.dumps(means, indent=1) + "\n")
    pivots = [[row for row in rows if row["pivot"] == p + 1] for p in range(model.chunks)]
    print(f"""
{len(prompts)} clips of {len(HELD_OUT_PROMPTS)} held-out prompts, the same noise for both models; the reward is a mean of z-scores:

{table(results)}

reward by iteration   {sparkline([row["reward"] for row in rows])}
deviation in a group  {", ".join(f"{mean_of(p, 'deviation'):.3f}" if p else "-" for p in pivots)} with pivot chunk 1 to {model.chunks}
clipped ratios        {mean_of(rows, "clip_fraction"):.0%}; flat groups {mean_of(rows, "flat_groups"):.0%}; \
updates skipped as not finite {sum(row["skipped"] for row in rows)}
time                  {mean_of(rows, "seconds"):.2f} s an iteration on {settings.device}
run folder            {folder}: {" ".join(sorted(file.name for file in folder.iterdir()))}""")


def run_sample(settings: Settings) -> None:
    """Stream one clip."""
    file = Path(settings.out or "clip.gif")
    if file.suffix != ".gif" or file.is_dir():
        raise UserError(f"--out {file}: expected the name of a .gif file")
    check_folder(file.parent)
    attributes([settings.sample])
    model = load_generator(settings.base, settings.device, settings.precision == "bf16")
    with Adapter.load(settings.adapter, model).on(model) if settings.adapter else nullcontext():
        context, noise, chunks = model.begin([settings.sample]), draw_noise(model, 1, seeded(settings.seed, SAMPLING)), []
        for p in tqdm(range(model.chunks), desc="streaming", unit="chunk"):
            new, context = rollout(model, context, noise, p, p + 1)
            chunks += new
    file.parent.mkdir(parents=True, exist_ok=True)
    save_gif([model.decode(torch.stack(chunks, 1))[None]], file, scale=8)
    print(f"wrote {file}")


def parse(arguments: list[str] | None = None) -> Settings:
    parser = Parser(description=__doc__.split("\n\n")[0])
    sections = {}
    for f in dataclasses.fields(Settings):
        m = f.metadata
        if m["section"] not in sections:
            sections[m["section"]] = parser.add_argument_group(m["section"])
        section = sections[m["section"]]
        default = str(f.default).replace(str(ASSETS), ASSETS.name)
        about = m["text"] + ("" if default in ("", "False") else f" [{default}]") + (f" (paper: {m['paper']})" if m["paper"] else "")
        kind = {int: {"type": int, "metavar": "N"}, float: {"type": float, "metavar": "X"}, str: {"type": nonempty, "metavar": "TEXT"},
                bool: {"action": "store_true"}}[f.type]
        section.add_argument("--" + f.name.replace("_", "-"), default=argparse.SUPPRESS, help=about.replace("%", "%%"), **kind)
    return Settings(**vars(parser.parse_args(arguments)))


def choose_device(name: str) -> str:
    name = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    try:
        if torch.device(name).type not in ("cpu", "cuda"):
            raise RuntimeError("neither cpu nor cuda")
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: cannot be used ({one_line(error)})") from error
    return name


def main(arguments: list[str] | None = None) -> int:
    try:
        settings = parse(arguments)
        settings.device = choose_device(settings.device)
        if settings.sample:
            run_sample(settings)
        elif settings.pretrain:
            pretrain(settings)
        else:
            run_alignment(settings)
    except (UserError, OSError) as error:
        print(f"arcopo: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
