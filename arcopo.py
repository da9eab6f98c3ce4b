"""AR-CoPO: align a streaming, few-step, autoregressive video generator with rewards. One file, to be read beside the paper.

    python arcopo.py --steps 100                                            the paper's recipe: train two adapters, merge, judge
    python arcopo.py --method on-policy --steps 100                         one training alone; also semi, off-policy, sde-grpo
    python arcopo.py --study entropy                                        which noise decides a chunk (Fig. 6); also cost
    python arcopo.py --base assets/teacher.safetensors --steps 100          the recipe on a flow-matching model
    python arcopo.py --sample "a red circle moving right" --out clip.gif    stream one clip (--adapter FILE: of the aligned model)
    python arcopo.py --pretrain                                             make the base itself from nothing

He et al., AR-CoPO: Align Autoregressive Video Generation with Contrastive Policy Optimization, arXiv 2603.17461 ("the paper"),
built on He et al., Neighbor GRPO, arXiv 2511.16955; the generator is a miniature of Self-Forcing's, arXiv 2506.08009.

Symbol          in the paper    here
L, p            Sec. 3.2        model.chunks, pivot (from 0; from 1 in what is printed)
T, t            Sec. 3.2        model.timesteps, one of them (s: the next one, and 0 after the last)
F_θ(x_t, h, t)  Eq. 4           model.predict(x_t, t, context)
h_{p-1}         Alg. 1          Context
ε*, ε⁽ⁱ⁾, σ, G   Eq. 1           noise.initial, neighbor_noise, sigma, group
x_t⁽ⁱ⁾, x̂₀⁽ⁱ⁾     Eq. 2, 4        a Fork's states, its candidates
x̂₀^(θ), B       Eq. 4, Sec. 3.1 replay, anchors
d⁽ⁱ⁾, τ, π_θ(i)  Eq. 2, 5        surrogate_log_policy, tau
r⁽ⁱ⁾, A⁽ⁱ⁾        Eq. 3           reward, group_advantages
ρ⁽ⁱ⁾, ε (clip)   Eq. 3           exp(log_ratio), clip_range
J(θ)            Eq. 3           clipped_objective
the buffer      Sec. 3.3        collect_buffer, draw_from
Δ, s            Sec. 3.3, 4.4   Adapter, merge_adapters, choose_strength

How this departs from the paper:
1. The world is a toy (reward.py): 32x32 clips, 4 chunks of 3 frames, a 3 M parameter generator on pixels. So the defaults that
   depend on size differ (learning rate, σ, prompts, rank); --help shows the paper's value beside each.
2. The P prompts of an iteration share the pivot and the indices of the anchors, so that all of them run as one batch.
3. tau is given for one element and multiplied by their number, so that it does not depend on the size of a chunk.
4. The three rewards are put on one scale by their mean and deviation on the base's own clips before they are weighted and added.
5. π_old is that of a replay, not of the rollout: on-policy of the first one (see update), from a buffer of one by the reference,
   on states in half precision. σ_r has a floor: a nearly flat group moves little.
6. The same anchors serve all updates of an on-policy iteration; J is averaged over anchors, steps and prompts.
7. The base is distilled from its teacher on real past chunks, where Self-Forcing trains on its own rollouts.
8. SDE-GRPO forks at a chunk as AR-CoPO does, so that just the exploration and the policy differ, and with these what is replayed:
   all G branches at the T - 1 steps that add noise, not B at all T. The papers of SDE-GRPO let whole rollouts differ.
9. The sampler's times are lower than those the student was mostly distilled at: with these its solver noise decides little, which
   is how the paper finds its base (Fig. 6); under stronger noise a small clip keeps little of its content.

In shapes: P prompts, T steps, L chunks, G branches of a group, B anchors, N rows of a batch; x_t is [N, frames, 3, height, width].
"""

import argparse
import csv
import dataclasses
import hashlib
import io
import json
import math
import os
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import imageio.v3 as iio
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from reward import (ASSETS, CHUNK_FRAMES, CHUNKS, COLOURS, HELD_OUT_PROMPTS, MOTIONS, SHAPES, SIZE, TRAIN_PROMPTS, ClipReward, Parser,
                    UserError, WeightedReward, attributes, check_folder, judge, make_clips, muon_and_adamw, nonempty, one_line,
                    parse_weights, read_weights, step_with, write_weights)


# ------------------------------------------------------------------ settings

METHODS = ("on-policy", "semi", "off-policy", "sde-grpo")
POSITIVE = ("> 0", lambda v: 0 < v < math.inf)
COUNT = (">= 1", lambda v: v >= 1)
UP_TO_4096 = ("from 1 to 4096", lambda v: 1 <= v <= 4096)
ANY = ("", lambda v: True)


def setting(default, section: str, text: str, paper: str = "", valid: tuple = ANY):
    return field(default=default, metadata={"section": section, "text": text, "paper": paper, "valid": valid})


@dataclass
class Settings:
    """Every setting: default, meaning, the paper's value. Each default runs on a laptop."""
    steps: int = setting(100, "what to do", "iterations of each training", "100", COUNT)
    method: str = setting("", "what to do", f"one training alone ({', '.join(METHODS)}) instead of the whole recipe", "",
                          (f"one of {', '.join(METHODS)}", lambda v: v in ("", *METHODS)))
    study: str = setting("", "what to do", "entropy (redraw one noise at a time, Fig. 6) or cost (of forking at a chunk) instead", "",
                         ("entropy or cost", lambda v: v in ("", "entropy", "cost")))
    sample: str = setting("", "what to do", "stream one clip of this prompt to --out (a .gif) instead")
    pretrain: bool = setting(False, "what to do", "make the base from nothing instead, into --out")
    out: str = setting("", "what to do", "folder of the run (default: runs/ and the time, or runs/pretrain); with --sample the GIF (clip.gif)")
    adapter: str = setting("", "what to do", "with --sample: the adapter to apply")
    base: str = setting(str(ASSETS / "base.safetensors"), "what to do", "weights of the base generator")
    timesteps: str = setting("", "what to do", "times of the sampler, falling from 1, as 1,0.6,0.33,0.14 (default: the base's own)")
    seed: int = setting(0, "what to do", "seed of everything random", "", ("in [0, 2^63)", lambda v: 0 <= v < 2**63))
    device: str = setting("auto", "what to do", "cpu, cuda, cuda:1 ...; auto is CUDA when there is one")
    precision: str = setting("auto", "what to do", "bf16 (autocast), fp32, or auto: bf16 on a GPU, on a CPU the one that is faster there",
                             "", ("auto, bf16 or fp32", lambda v: v in ("auto", "bf16", "fp32")))

    group: int = setting(12, "AR-CoPO", "branches G of a fork", "12", (">= 2", lambda v: v >= 2))
    sigma: float = setting(0.25, "AR-CoPO", "radius σ of the neighbourhood in noise space (Eq. 1)", "0.5",
                           ("in (0, 1]", lambda v: 0 < v <= 1))
    anchors: int = setting(4, "AR-CoPO", "anchors B of the G candidates (symmetric anchor sampling)", "4", COUNT)
    updates: int = setting(2, "AR-CoPO", "policy updates per iteration", "2", COUNT)
    prompts: int = setting(4, "AR-CoPO", "prompts P per iteration, one batch", "24 GPUs",
                           (f"from 1 to {len(TRAIN_PROMPTS)}", lambda v: 1 <= v <= len(TRAIN_PROMPTS)))
    clip_range: float = setting(1e-4, "AR-CoPO", "ε of the ratio clip (Eq. 3); inf: no clip", "1e-4", ("> 0", lambda v: v > 0))
    tau: float = setting(0.03, "AR-CoPO", "temperature τ₀ for each element of a chunk (Eq. 5): how far the anchor may move until the clip acts",
                         "", POSITIVE)
    quasi_norm: float = setting(0.0, "AR-CoPO", "p of the quasi-norm of the advantages; 0: plain deviation", "0.8 in Neighbor GRPO",
                                ("0 or in [0.1, 2]", lambda v: v == 0 or 0.1 <= v <= 2))
    floor: float = setting(0.02, "AR-CoPO", "least deviation of a group's rewards; below it, it counts as flat", "", POSITIVE)
    lr: float = setting(5e-5, "AR-CoPO", "learning rate of AdamW", "1e-5", POSITIVE)
    rank: int = setting(16, "AR-CoPO", "rank r of the LoRA adapter", "64", UP_TO_4096)
    alpha: float = setting(32.0, "AR-CoPO", "α of the LoRA adapter, which is scaled by α/r", "128", POSITIVE)

    buffer_groups: int = setting(100, "semi-on-policy and merging", "rollout groups in the buffer", "100", COUNT)
    buffer: str = setting("", "semi-on-policy and merging", "buffer.safetensors of an earlier run, instead of collecting one")
    buffer_weights: str = setting("ta=1", "semi-on-policy and merging", "weights of the reward in the buffer", "text alignment alone")
    sweep: str = setting("0.4,0.6,0.8,1", "semi-on-policy and merging", "strengths s of the on-policy adapter to try", "0.4 to 1")

    clip: str = setting(str(ASSETS / "clip"), "reward", "open_clip model: ARCH:TAG (ViT-B-32:laion2b_s34b_b79k), ARCH:FILE or a folder",
                        "VideoAlign")
    reward_weights: str = setting("ta=1,vq=1,mq=1", "reward", "weights of text alignment, visual and motion quality; the buffer has its own",
                                  "1 each")
    reward_noise: float = setting(0.0, "reward", "deviation of Gaussian noise added to each reward in on-policy and sde-grpo training", "",
                                  (">= 0", lambda v: 0 <= v < math.inf))
    judge_samples: int = setting(8, "reward", "clips of each held-out prompt to judge models on", "", COUNT)
    judge_every: int = setting(20, "reward", "iterations between two points of the held-out curve", "", COUNT)

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
        modes = [f"--{name}" for name in ("sample", "pretrain", "study", "method") if getattr(self, name)]
        if len(modes) > 1:
            raise UserError(f"{' and '.join(modes)}: name one of them")
        if self.buffer and (self.sample or self.pretrain or self.study or self.method in ("on-policy", "sde-grpo")):
            raise UserError(f"--buffer {self.buffer}: nothing draws from it here; it goes with the recipe, semi or off-policy")
        if self.timesteps and self.pretrain:
            raise UserError(f"--timesteps {self.timesteps}: goes with sampling and training; --pretrain has its own")
        if self.anchors > self.group:
            raise UserError(f"--anchors {self.anchors}: must be at most --group, which is {self.group}")
        if self.width % self.heads:
            raise UserError(f"--width {self.width}: must be a multiple of --heads, which is {self.heads}")


def seeded(seed: int, *stream: int) -> torch.Generator:
    """A random generator that depends on the seed and the stream alone, always on the CPU: the same noise on every device."""
    for number in stream:
        seed = (seed * 1_000_003 + number) % 2**63
    return torch.Generator().manual_seed(seed)


ADAPTER, TRAINING, CALIBRATION, JUDGING, SAMPLING, BUFFER, CURVE, STUDY = range(1, 9)      # random streams of a run, apart


# ------------------------------------------------------------------ model

PATCH = 8
TIMESTEPS = (1.0, 0.3, 0.15, 0.07)       # the sampler's (departure 9)
DISTILLED_AT = (1.0, 0.6, 0.33, 0.14)    # the times that distillation prefers
FLOW_TIMESTEPS = (1.0, 0.9, 0.75, 0.6, 0.4, 0.2)                      # of the flow-matching teacher


class Context(NamedTuple):
    """h_p, all that is fixed before the next chunk. A value, not state: extending it returns a new one, so a fork is a copy."""
    words: Tensor           # [N, width]                                     the prompt
    kv: Tensor              # [N, layers, 2, heads, tokens, head width]      keys and values of the finished chunks

    def repeat(self, times: int) -> "Context":
        """The context of each row for `times` branches: row n * times + b is branch b of row n."""
        return Context(*(x.repeat_interleave(times, 0) for x in self))


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

    def forward(self, x: Tensor, modulation: Tensor, past: Tensor, mask: Tensor | None) -> tuple[Tensor, tuple]:
        """x [N, C, K, W], modulation [N, C, 6, W], past [N, 2, heads, tokens, D] -> x, and its new keys and values."""
        N, C, K, W = x.shape                                                                    # rows, chunks, tokens, width
        shift1, scale1, gate1, shift2, scale2, gate2 = (modulation + self.table)[:, :, :, None].unbind(2)   # [N, C, 1, W]
        y = F.layer_norm(x, (W,)) * (1 + scale1) + shift1
        q, k, v = self.qkv(y).view(N, C * K, 3, self.heads, -1).permute(2, 0, 3, 1, 4)          # [N, heads, C*K, D]
        q, k = (F.rms_norm(z, z.shape[-1:]).to(v.dtype) for z in (q, k))
        new = k, v
        k, v = (torch.cat([old.to(z.dtype), z], 2) for old, z in zip(past.unbind(1), new))      # [N, heads, past + C*K, D]
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
    flow                                                 False: a consistency model (CM); True: a flow-matching one (FM)
    solver_steps                                         how often the sampler adds noise: T - 1, or 0 for an FM
    device                                               where its tensors are; an Adapter sits beside its nn.Linear layers

    x_t = (1 - t) x₀ + t ε, with t = 1 pure noise. A Context is a NamedTuple of tensors with rows first, as all that has rows here,
    and can `repeat` its rows; chunk_shape has four axes.
    """

    chunk_shape, chunks = (CHUNK_FRAMES, 3, SIZE, SIZE), CHUNKS

    def __init__(self, width: int = 192, layers: int = 6, heads: int = 3, timesteps: tuple = TIMESTEPS, flow: bool = False,
                 bf16: bool = True):
        super().__init__()
        self.width, self.layers, self.heads, self.timesteps, self.flow, self.bf16 = width, layers, heads, tuple(timesteps), flow, bf16
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

    @property
    def solver_steps(self) -> int:
        return 0 if self.flow else len(self.timesteps) - 1

    def begin(self, prompts: list[str]) -> Context:
        ids = attributes(prompts) + torch.tensor([0, len(COLOURS), len(COLOURS) + len(SHAPES)])
        words = self.word(ids.to(self.device)).sum(1)
        return Context(words, words.new_zeros(len(prompts), self.layers, 2, self.heads, 0, self.width // self.heads))

    def predict(self, x_t: Tensor, t: float | Tensor, context: Context) -> Tensor:
        t = torch.as_tensor(t, dtype=torch.float32, device=self.device).expand(len(x_t))
        return self(x_t[:, None], t[:, None], context)[0][:, 0]

    def extend(self, context: Context, x0: Tensor) -> Context:
        kv = self(x0[:, None], torch.zeros(len(x0), 1, device=self.device), context)[1]
        return Context(context.words, torch.cat([context.kv.to(kv[0][0].dtype), self.stack(kv)], 4))

    @staticmethod
    def stack(kv: list[tuple[Tensor, Tensor]]) -> Tensor:
        return torch.stack([torch.stack(pair, 1) for pair in kv], 1)                            # [N, layers, 2, heads, tokens, D]

    @staticmethod
    def decode(latents: Tensor) -> Tensor:
        """[N, L, *chunk_shape] in [-1, 1] -> [N, FRAMES, 3, SIZE, SIZE] in [0, 1]."""
        return (latents.flatten(1, 2).float() / 2 + 0.5).clamp(0, 1)

    @staticmethod
    def encode(clips: Tensor) -> Tensor:
        return (clips * 2 - 1).unflatten(1, (CHUNKS, CHUNK_FRAMES))

    def forward(self, x: Tensor, t: Tensor, context: Context, visible: Tensor | None = None,
                first: int | None = None) -> tuple[Tensor, list]:
        """C chunks at once: x [N, C, *chunk_shape] at times t [N, C] -> x̂₀ like x, and of each layer the new keys and values.

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
            for block, past in zip(self.blocks, context.kv.unbind(1)):
                y, new = block(y, modulation, past, mask)
                kv.append(new)
            shift, scale = (condition[:, :, None] + self.table)[:, :, :, None].unbind(2)
            y = self.head(F.layer_norm(y, (self.width,)) * (1 + scale) + shift).float()
        y = y.view(N, C, CHUNK_FRAMES, side, side, 3, PATCH, PATCH).permute(0, 1, 2, 5, 3, 6, 4, 7)
        return y.reshape(x.shape), kv

    def write_all(self, clean: Tensor, prompts: list[str]) -> Context:
        """The context after all but the last of the chunks clean [N, L, *chunk_shape], in one pass (teacher forcing)."""
        context = self.begin(prompts)
        causal = torch.ones(CHUNKS - 1, CHUNKS - 1, dtype=torch.bool).tril()
        return Context(context.words, self.stack(self(clean[:, :-1], clean.new_zeros(len(clean), CHUNKS - 1), context, causal)[1]))

    def predict_all(self, x_t: Tensor, t: Tensor, context: Context) -> Tensor:
        """predict for every chunk at once: x_t [N, L, *chunk_shape] at times t [N, L], each chunk behind its own clean past."""
        past = torch.ones(CHUNKS, CHUNKS - 1, dtype=torch.bool).tril(-1)
        return self(x_t, t, context, torch.cat([past, torch.eye(CHUNKS, dtype=torch.bool)], 1), first=0)[0]


# ------------------------------------------------------------------ sampler

class Noise(NamedTuple):
    """All noise of a rollout, drawn before it: what branches share and where they differ is in plain sight."""
    initial: Tensor         # [N, L, *chunk_shape]                   where chunk p starts, ε_p
    solver: Tensor          # [N, L, solver_steps, *chunk_shape]     what re-noises its clean predictions; an FM has none

    def repeat(self, times: int) -> "Noise":
        """The noise of each row for `times` branches, in the order of Context.repeat."""
        return Noise(*(x.repeat_interleave(times, 0) for x in self))


def draw_noise(model: Generator, rows: int, generator: torch.Generator) -> Noise:
    noise = torch.randn(rows, model.chunks, 1 + model.solver_steps, *model.chunk_shape, generator=generator).to(model.device)
    return Noise(noise[:, :, 0], noise[:, :, 1:])


def comparison_point(model: Generator, x_t: Tensor, x0: Tensor, t: float | Tensor, s: float | Tensor) -> Tensor:
    """What distances are taken between, in a step from t down to s. CM: the clean prediction (Eq. 4). FM: x_s, an Euler step of the
    flow's ODE (Eq. 2). At the last step, s = 0, both are the finished chunk."""
    return x0 + s / t * (x_t - x0) if model.flow else x0


def denoise(model: Generator, context: Context, initial: Tensor, solver: Tensor) -> tuple[Tensor, Tensor]:
    """One chunk from its noise in T steps. CM, as Self-Forcing samples: predict x̂₀, re-noise it to the next time. FM: Euler.

    initial [N, *chunk_shape], solver [N, solver_steps, *chunk_shape] -> states x_t and comparison points, both [N, T, *chunk_shape]; the
    last of the latter is the finished chunk.
    """
    x_t, states, points = initial, [], []
    for i, (t, s) in enumerate(zip(model.timesteps, (*model.timesteps[1:], 0.0))):
        states.append(x_t)
        points.append(comparison_point(model, x_t, model.predict(x_t, t, context), t, s))
        if s > 0:
            x_t = points[-1] if model.flow else (1 - s) * points[-1] + s * solver[:, i]
    return torch.stack(states, 1), torch.stack(points, 1)


@torch.no_grad()
def rollout(model: Generator, context: Context, noise: Noise, start: int, stop: int) -> tuple[list[Tensor], Context]:
    """Stream chunks start..stop-1 behind their context: a list of [N, *chunk_shape], and the context after them (the clip's last one is not
    written: nothing follows it)."""
    chunks = []
    for p in range(start, stop):
        chunks.append(denoise(model, context, noise.initial[:, p], noise.solver[:, p])[1][:, -1])
        if p + 1 < model.chunks:
            context = model.extend(context, chunks[-1])
    return chunks, context


@torch.no_grad()
def sample(model: Generator, prompts: list[str], noise: Noise) -> Tensor:
    """Whole clips in [0, 1], [N, FRAMES, 3, SIZE, SIZE]."""
    return model.decode(torch.stack(rollout(model, model.begin(prompts), noise, 0, model.chunks)[0], 1))


# ------------------------------------------------------------------ fork

class Fork(NamedTuple):
    """The G branches of P prompts at the pivot chunk: what the update and the semi-on-policy buffer need of them."""
    context: Context        # h_{p-1}, P rows
    base: Tensor            # [P, *chunk_shape]              ε_p*, which no update needs: the paper's entry of the buffer holds it
    states: Tensor          # [P, T, G, *chunk_shape]        x_t⁽ⁱ⁾; the first is ε_p⁽ⁱ⁾
    candidates: Tensor      # [P, T, G, *chunk_shape]        the comparison points, x̂₀,t⁽ⁱ⁾ of a CM; the last is x_p⁽ⁱ⁾


@torch.no_grad()
def fork(model: Generator, prompts: list[str], pivot: int, group: int, radii: tuple[float, ...], noise: Noise,
         generator: torch.Generator) -> tuple[Fork, Tensor]:
    """Algorithm 1, lines 2 to 5: one prefix, then G branches as one batch -> the Fork, and the clips [P, G, FRAMES, 3, SIZE, SIZE].

    radii: how far branches differ (σ of Eq. 1) in each noise of the pivot chunk: the initial noise, then that of each re-noising.
    AR-CoPO is (σ, 0, 0, 0): nothing but ε_p⁽ⁱ⁾ differs. SDE-GRPO is (0, 1, 1, 1). The noise of other chunks is always shared.
    noise has a row for each of the P prompts; generator draws the δ⁽ⁱ⁾.
    """
    P = len(prompts)
    prefix, context = rollout(model, model.begin(prompts), noise, 0, pivot)                     # line 2: once, with P rows
    branch, shared = context.repeat(group), noise.repeat(group)                                 # line 3: P * G rows
    base = torch.cat([noise.initial[:, pivot, None], noise.solver[:, pivot]], 1)                # [P, 1 + solver_steps, *chunk_shape]
    own = [neighbor_noise(base[:, i], radius, group, generator) for i, radius in enumerate(radii)]      # line 4: [G, P, *chunk_shape]
    own = torch.stack(own, 2).transpose(0, 1).flatten(0, 1)                                     # [P * G, 1 + solver_steps, *chunk_shape]
    states, points = denoise(model, branch, own[:, 0], own[:, 1:])                              # line 5
    chunks = [chunk.repeat_interleave(group, 0) for chunk in prefix] + [points[:, -1]]
    if pivot + 1 < model.chunks:
        chunks += rollout(model, model.extend(branch, points[:, -1]), shared, pivot + 1, model.chunks)[0]
    clips = model.decode(torch.stack(chunks, 1)).unflatten(0, (P, group))
    states, points = (x.unflatten(0, (P, group)).transpose(1, 2) for x in (states, points))
    return Fork(context, noise.initial[:, pivot], states, points), clips


# ------------------------------------------------------------------ objective (pure functions of tensors: lift them out)

def neighbor_noise(base: Tensor, sigma: float, group: int, generator: torch.Generator | None = None) -> Tensor:
    """ε⁽ⁱ⁾ = √(1-σ²) ε* + σ δ⁽ⁱ⁾ with δ⁽ⁱ⁾ ~ N(0, I) (Eq. 1): `group` neighbours of a noise, of the same expected norm.

    base: any shape -> [group, *base.shape]. sigma in [0, 1]: 0 copies the base, 1 draws independent noise, as plain GRPO
    explores. Raises ValueError for another sigma.
    """
    if not 0 <= sigma <= 1:
        raise ValueError(f"sigma must be in [0, 1], got {sigma}")
    if sigma == 0:
        return base.expand(group, *base.shape)
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


def gaussian_log_density(x: Tensor, mean: Tensor, std: float | Tensor) -> Tensor:
    """log N(x; mean, std²) element by element: the policy of SDE-GRPO, where x is what re-noising made of its mean. All broadcast."""
    std = torch.as_tensor(std)
    return -((x - mean) / std).square() / 2 - std.log() - math.log(2 * math.pi) / 2


def clipped_objective(log_ratio: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """J = 1/G Σ_i min(ρ⁽ⁱ⁾ A⁽ⁱ⁾, clip(ρ⁽ⁱ⁾, 1-ε, 1+ε) A⁽ⁱ⁾) (Eq. 3), a scalar to be MAXIMISED.

    log_ratio [..., G] = log π_θ - log π_old, advantages broadcast to it; leading axes (prompts, steps, anchors) are averaged.
    clip = inf is no clip (the paper's off-policy baseline).
    """
    ratio = log_ratio.exp()
    return torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages).mean()


# ------------------------------------------------------------------ adapter

def fingerprint(module: nn.Module) -> str:
    """Tells one set of weights from another: an adapter and a buffer are of use only beside those they were made with."""
    digest = hashlib.sha256()
    for x in module.state_dict().values():
        digest.update(x.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


class Adapter:
    """LoRA beside every linear layer: y = W x + (α/r) B A x (Hu et al. 2021), with B zero at the start.

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

    def save(self, file: Path, model: nn.Module) -> None:
        tensors = {f"{name}.lora_{x}.weight": z for name, pair in self.weights.items() for x, z in zip("AB", pair)}
        times = ",".join(f"{t:g}" for t in model.timesteps)
        write_weights(file, tensors, {"alpha": repr(self.alpha), "base": fingerprint(model), "timesteps": times})

    @classmethod
    def load(cls, file: str | Path, model: nn.Module) -> "Adapter":
        """Raises UserError for a file that is missing, broken or trained on another base or at other times."""
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
            if not 0 < float(metadata["alpha"]) < math.inf:
                raise ValueError(f"its alpha is {metadata['alpha']}")
            if metadata["base"] != fingerprint(model):
                raise ValueError("it was trained on other weights; name them with --base")
            if metadata["timesteps"] != ",".join(f"{t:g}" for t in model.timesteps):
                raise ValueError(f"it was trained at other times; name them with --timesteps {metadata['timesteps']}")
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

def replay(model: Generator, branches: Fork, anchors: Tensor, steps: int) -> Tensor:
    """Eq. 4: predict anew from the anchors' stored states of the first `steps` steps (T: all) -> comparison points
    [P, steps, B, *chunk_shape]. All that is differentiated.

    The steps run as one batch; where that needs too much memory, back-propagate J one step at a time.
    """
    x_t = branches.states[:, :steps, anchors]
    P, B = len(x_t), len(anchors)
    t, s = (torch.tensor(z[:steps], device=x_t.device).repeat_interleave(B).repeat(P)
            for z in (model.timesteps, (*model.timesteps[1:], 0.0)))                            # [P * steps * B] each
    x0 = model.predict(x_t.flatten(0, 2), t, branches.context.repeat(steps * B)).view_as(x_t)
    return comparison_point(model, x_t, x0, *(z.view(P, steps, B, 1, 1, 1, 1) for z in (t, s)))


def contrastive_log_policies(branches: Fork, replayed: Tensor, tau: float) -> Tensor:
    """log π_θ(i | s_t) for every prompt, step and anchor: replayed [P, T, B, *chunk_shape] -> [P, T, B, G]."""
    policy = lambda candidates, anchor: surrogate_log_policy(candidates, anchor, tau * anchor.numel())
    for axes in ((None, 0), (0, 0), (0, 0)):                   # over anchors, steps, prompts
        policy = torch.vmap(policy, axes)
    return policy(branches.candidates, replayed)


def sde_log_policies(branches: Fork, replayed: Tensor, timesteps: tuple[float, ...]) -> Tensor:
    """SDE-GRPO: log-probability of each re-noising, x_s ~ N((1-s) x̂₀^(θ), s² I); a mean over elements, as in Flow-GRPO's code.

    replayed [P, T-1, G, *chunk_shape], each branch its own anchor -> [P, T-1, 1, G]: the last step adds no noise, so it has no policy.
    """
    s = torch.tensor(timesteps[1:], device=replayed.device).view(-1, 1, 1, 1, 1, 1)
    density = gaussian_log_density(branches.states[:, 1:], (1 - s) * replayed, s)             # [P, T-1, G, *chunk_shape]
    return density.flatten(3).mean(3)[:, :, None]


class Method(NamedTuple):
    """What a training method is: where its groups come from, how they explore, their policy, and the clip of its ratio."""
    radii: tuple[float, ...]            # where, and how far, the branches of a group differ (see fork)
    steps: int                          # how many of the pivot's T steps, from the first, have a policy
    log_policies: Callable              # (branches, replayed) -> log π_θ [P, steps, B, G], of SDE-GRPO [P, steps, 1, G]
    clip: float                         # ε of Eq. 3
    buffered: bool = False              # groups from the buffer, and π_old that of the reference, instead of the current policy
    all_anchors: bool = False           # every branch is replayed, each for itself, instead of B of G


def update(model: Generator, adapter: Adapter, branches: Fork, anchors: Tensor, advantages: Tensor, method: Method,
           optimizer: torch.optim.Optimizer, updates: int) -> dict:
    """Algorithm 1, lines 8 and 9: a few steps up J on the pivot chunk only. advantages [P, G] -> diagnostics:

    ratio_first (mean at the first update; on-policy 1), clip_fraction (terms whose gradient the clip stops, at the last update),
    grad_norm (mean over updates), replay_error (largest difference between rollout and replay by the same policy), skipped (updates).
    """
    parameters, ratios, norms, skipped, old = adapter.parameters(), [], [], 0, None
    if method.buffered:
        with torch.no_grad():                                  # the adapter is off: π_old is π_ref, the clip a trust region around it
            first_replay = replay(model, branches, anchors, method.steps)
            old = method.log_policies(branches, first_replay)
    for _ in range(updates):
        with adapter.on(model):
            replayed = replay(model, branches, anchors, method.steps)                           # line 8
        log_policy = method.log_policies(branches, replayed)
        if old is None:
            # π_old from this very replay and not from the rollout, which ran another batch size and, in bf16 on some devices, is
            # rounded otherwise: the first ratio is exp(x - x), exactly 1, and its gradient is that of log π_θ all the same.
            first_replay, old = replayed.detach(), log_policy.detach()
        log_ratio = log_policy - old
        J = clipped_objective(log_ratio, advantages[:, None, None], method.clip)
        optimizer.zero_grad()
        (-J).backward()                                                                         # line 9
        ratios.append(log_ratio.detach().exp())
        norms.append(nn.utils.get_total_norm([p.grad for p in parameters]))
        if torch.isfinite(J) and torch.isfinite(norms[-1]):
            optimizer.step()
        else:
            skipped += 1
    clipped = ((ratios[-1] - 1) * advantages[:, None, None].sign() > method.clip).float().mean()
    return {"ratio_first": ratios[0].mean().item(), "clip_fraction": clipped.item(), "grad_norm": torch.stack(norms).mean().item(),
            "replay_error": (first_replay - branches.candidates[:, :method.steps, anchors]).abs().max().item(), "skipped": skipped}


def explore(model: Generator, reward: Callable, P: int, group: int, radii: tuple[float, ...],
            generator: torch.Generator) -> tuple[int, Fork, dict[str, Tensor]]:
    """Algorithm 1, lines 1 to 5, for P training prompts at random -> the pivot, the Fork, {"reward", any components: [P, G]}.

    reward(clips [N, FRAMES, 3, SIZE, SIZE], prompts) -> {"reward": [N], any components: [N]}.
    """
    chosen = [TRAIN_PROMPTS[i] for i in torch.randperm(len(TRAIN_PROMPTS), generator=generator)[:P]]
    pivot = int(torch.randint(model.chunks, (), generator=generator))                           # line 1
    branches, clips = fork(model, chosen, pivot, group, radii, draw_noise(model, P, generator), generator)
    scores = reward(clips.flatten(0, 1), [prompt for prompt in chosen for _ in range(group)])
    return pivot, branches, {name: value.view(P, group).to(model.device) for name, value in scores.items()}


Buffer = dict[int, dict[str, Tensor]]
"""The fixed groups of semi-on-policy training (Sec. 3.3) by their pivot: (h_{p-1}, ε_p*, {ε_p⁽ⁱ⁾}, {x_p⁽ⁱ⁾ and its states}, {r⁽ⁱ⁾}), that
is, a Fork's tensors and "reward" [rows, G], a row for each group. Rolled out once by the reference policy; nothing writes to it again."""


def collect_buffer(rollouts: Callable, size: int, P: int, seed: int) -> Buffer:
    """`size` groups, P at a time, noise and chunks in half precision. rollouts(P, generator) is explore of the reference policy: no
    adapter may be on."""
    found, bar = {}, tqdm(total=size, desc="buffer", unit="group")
    for first in range(0, size, P):
        pivot, branches, scores = rollouts(min(P, size - first), seeded(seed, BUFFER, first))
        found.setdefault(pivot, []).append(branches.context._asdict() | {name: x.half() for name, x in branches._asdict().items()
                                                                         if name != "context"} | {"reward": scores["reward"]})
        bar.update(len(branches.base))
    bar.close()
    return {pivot: {name: torch.cat([part[name] for part in parts]) for name in parts[0]} for pivot, parts in sorted(found.items())}


def draw_from(buffer: Buffer, P: int, generator: torch.Generator) -> tuple[int, Fork, dict[str, Tensor]]:
    """Groups of the buffer at random, as explore gives them: up to P of those that were forked at the same chunk."""
    counts = torch.tensor([len(groups["reward"]) for groups in buffer.values()], dtype=torch.float32)
    pivot = list(buffer)[int(torch.multinomial(counts, 1, generator=generator))]
    rows = torch.randperm(len(buffer[pivot]["reward"]), generator=generator)[:P]
    groups = {name: x[rows.to(x.device)] for name, x in buffer[pivot].items()}                  # copies: the buffer stays as it is
    context = Context(*(groups[name] for name in Context._fields))
    return pivot, Fork(context, *(groups[name].float() for name in Fork._fields[1:])), {"reward": groups["reward"]}


def save_buffer(buffer: Buffer, file: Path, about: dict) -> None:
    write_weights(file, {f"{pivot}.{name}": x for pivot, groups in buffer.items() for name, x in groups.items()},
                  {"buffer": json.dumps(about)})


def load_buffer(file: str, about: dict, model: Generator) -> Buffer:
    """Raises UserError for a file that is missing, broken or not made with what `about` says: base, reward, group, sampler."""
    tensors, metadata = read_weights(file, "--buffer")
    try:
        made, buffer = json.loads(metadata["buffer"]), {}
        for name in about:
            if made[name] != about[name]:
                raise UserError(f"--buffer {file}: made with {name} {made[name]}, not {about[name]}; without --buffer one is collected")
        for name, x in sorted(tensors.items()):
            buffer.setdefault(int(name.split(".")[0]), {})[name.split(".")[1]] = x.to(model.device)
        for pivot, groups in buffer.items():
            if set(groups) != {"reward", *Context._fields, *Fork._fields[1:]} or not 0 <= pivot < model.chunks:
                raise ValueError(f"holds {', '.join(groups)} of chunk {pivot + 1}")
    except (KeyError, IndexError, ValueError, TypeError) as error:
        raise UserError(f"--buffer {file}: not a buffer that this script wrote ({one_line(error)})") from error
    return buffer


def mean_of(rows: list[dict], column: str) -> float:
    return mean([row[column] for row in rows if math.isfinite(row[column])] or [math.nan])


def methods(model: Generator, settings: Settings) -> dict[str, Method]:
    """AR-CoPO's methods and the baseline, each as a change to another."""
    T, solver = len(model.timesteps), model.solver_steps
    on_policy = Method((settings.sigma, *[0.0] * solver), T, partial(contrastive_log_policies, tau=settings.tau), settings.clip_range)
    semi = on_policy._replace(buffered=True)                                                    # Sec. 3.3
    off_policy = semi._replace(clip=math.inf)                                                   # Table 2
    sde_grpo = on_policy._replace(radii=(0.0, *[1.0] * solver), steps=solver, all_anchors=True,
                                  log_policies=partial(sde_log_policies, timesteps=model.timesteps))            # Fig. 2
    return {"on-policy": on_policy, "semi": semi, "off-policy": off_policy, "sde-grpo": sde_grpo}


def iterate(model: Generator, adapter: Adapter, optimizer: torch.optim.Optimizer, method: Method, reward: Callable, buffer: Buffer | None,
            settings: Settings, generator: torch.Generator) -> dict:
    """One iteration for P prompts -> a row of metrics: the pivot (from 1), means of the reward (with --reward-noise in it) and its
    components, deviation (of the reward inside a group), flat_groups (share of them with a deviation below the floor), what update
    returns (skipped: the sum), seconds.

    On-policy all updates use one batch of groups (Algorithm 1); from a buffer, whose reward is its own and of the reference, each draws
    one, and the row tells of the last.
    """
    began, rows = time.perf_counter(), []
    for _ in range(settings.updates if method.buffered else 1):
        if method.buffered:
            pivot, branches, scores = draw_from(buffer, settings.prompts, generator)
        else:
            with adapter.on(model):
                pivot, branches, scores = explore(model, reward, settings.prompts, settings.group, method.radii, generator)
            scores["reward"] += settings.reward_noise * torch.randn(scores["reward"].shape, generator=generator).to(model.device)
        advantages = group_advantages(scores["reward"], settings.quasi_norm or None, settings.floor)            # line 7
        drawn = torch.randperm(settings.group, generator=generator)[: settings.anchors]
        anchors = torch.arange(settings.group) if method.all_anchors else drawn
        updates = 1 if method.buffered else settings.updates
        rows.append(update(model, adapter, branches, anchors, advantages, method, optimizer, updates))
    deviation = scores["reward"].std(1, correction=0)
    row = {"pivot": pivot + 1} | {name: value.mean().item() for name, value in scores.items()}
    row |= {"deviation": deviation.mean().item(), "flat_groups": (deviation < settings.floor).float().mean().item()}
    return row | rows[-1] | {"skipped": sum(r["skipped"] for r in rows), "seconds": time.perf_counter() - began}


def align(name: str, model: Generator, reward: Callable, settings: Settings, folder: Path,
          buffer: Buffer | None = None) -> tuple[Adapter, list[dict]]:
    """Train one adapter by the named method -> it, and the held-out curve; the base stays as it is.

    Writes into the folder NAME.csv (a row of metrics for each iteration), NAME-curve.csv (held-out prompts judged every few iterations)
    and NAME.safetensors.
    """
    adapter = Adapter.new(model, settings.rank, settings.alpha, seeded(settings.seed, ADAPTER))
    optimizer, method = torch.optim.AdamW(adapter.parameters(), settings.lr, weight_decay=0), methods(model, settings)[name]
    metrics, curve, skipped = Rows(folder / f"{name}.csv"), Rows(folder / f"{name}-curve.csv"), 0

    def judge_now(step: int) -> None:
        with adapter.on(model):
            judged = evaluate(*held_out_clips(model, CURVE_SAMPLES, settings.seed, CURVE), reward)
        curve.add({"step": step} | {column: value.mean().item() for column, value in judged.items()})
        adapter.save(folder / f"{name}.safetensors", model)

    judge_now(0)
    bar = tqdm(range(1, settings.steps + 1), desc=name, unit="it")
    for step in bar:
        row = iterate(model, adapter, optimizer, method, reward, buffer, settings, seeded(settings.seed, TRAINING, step))
        metrics.add({"step": step} | row)
        skipped += row["skipped"]
        if step % settings.judge_every == 0 or step == settings.steps:
            judge_now(step)
        bar.set_postfix_str(f"reward {mean_of(metrics.rows[-10:], 'reward'):+.2f}, held out {curve.rows[-1]['reward']:+.2f}, "
                            f"clipped {row['clip_fraction']:.0%}" + (f", skipped {skipped} non-finite" if skipped else ""))
    return adapter, curve.rows


# ------------------------------------------------------------------ base model

def save_generator(model: Generator, file: Path) -> None:
    shape = {"width": model.width, "layers": model.layers, "heads": model.heads, "timesteps": model.timesteps, "flow": model.flow}
    write_weights(file, {name: t.bfloat16() for name, t in model.state_dict().items()}, {"generator": json.dumps(shape)})


def check_timesteps(times: tuple[float, ...]) -> None:
    if times[:1] != (1,) or not all(t > s for t, s in zip(times, (*times[1:], 0))):
        raise ValueError(f"timesteps {times} do not fall from 1 toward 0")


def load_generator(file: str | Path, device: str | torch.device = "cpu", bf16: bool = True, timesteps: str = "") -> Generator:
    """A frozen base generator, sampled at its own timesteps or at others. Raises UserError for a file that is missing, broken or of
    another shape."""
    tensors, metadata = read_weights(file, "--base")
    try:
        model = Generator(**json.loads(metadata["generator"]), bf16=bf16)
        model.load_state_dict(tensors)
        check_timesteps(model.timesteps)
    except (KeyError, TypeError, ValueError, RuntimeError, ArithmeticError) as error:
        raise UserError(f"--base {file}: not a generator that --pretrain wrote ({one_line(error)})") from error
    if timesteps:
        try:
            model.timesteps = tuple(float(t) for t in timesteps.split(","))
            check_timesteps(model.timesteps)
        except ValueError as error:
            raise UserError(f"--timesteps {timesteps}: expected numbers that fall from 1 toward 0, as 1,0.6,0.33,0.14") from error
    return model.to(device).requires_grad_(False)


ODE_STEPS, SAVE_EVERY = 6, 100


def pretrain_loss(model: Generator, teacher: Generator | None, settings: Settings, generator: torch.Generator) -> Tensor:
    """Flow matching with teacher forcing or, given a teacher, its distillation to a consistency sampler.

    Flow matching: x_t of each chunk, behind real (slightly noised) past chunks, is asked for v = (x_t - x₀)/t (t >= 0.05 there).
    Distillation: the jump from x_t is asked for the end of the teacher's ODE from there; 60 % of the times are DISTILLED_AT.
    """
    N, device = settings.batch, model.device
    prompts = [TRAIN_PROMPTS[i] for i in torch.randint(len(TRAIN_PROMPTS), (N,), generator=generator)]
    clean = Generator.encode(make_clips(prompts, generator))                                    # [N, L, F, 3, H, W]
    noise, context_noise = (torch.randn(clean.shape, generator=generator) for _ in range(2))
    u = 0.1 * torch.rand(N, CHUNKS, 1, 1, 1, 1, generator=generator)
    t = torch.sigmoid(0.6 + 1.1 * torch.randn(N, CHUNKS, generator=generator))
    if teacher:
        own = torch.tensor(DISTILLED_AT)[torch.randint(len(DISTILLED_AT), t.shape, generator=generator)]
        t = torch.where(torch.rand(t.shape, generator=generator) < 0.6, own, 0.05 + 0.95 * torch.rand(t.shape, generator=generator))
    clean, past, noise, t = (z.to(device) for z in (clean, (1 - u) * clean + u * context_noise, noise, t))
    level = t[..., None, None, None, None]
    x_t = (1 - level) * clean + level * noise
    prediction = model.predict_all(x_t, t, model.write_all(past, prompts))
    if teacher is None:
        return ((prediction - clean) / level.clamp_min(0.05)).square().mean()
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
    teacher = Generator(**shape, timesteps=FLOW_TIMESTEPS, flow=True, bf16=settings.precision == "bf16").to(settings.device)
    fit("teacher", teacher, None, settings.teacher_steps, 2e-3, settings, folder)
    save_generator(teacher, folder / "teacher.safetensors")
    student = Generator(**shape, bf16=settings.precision == "bf16").to(settings.device)
    student.load_state_dict(teacher.state_dict())
    fit("student", student, teacher.requires_grad_(False), settings.student_steps, 5e-4, settings, folder)
    save_generator(student, folder / "base.safetensors")
    print(f"wrote {folder}/base.safetensors; use it with --base")


# ------------------------------------------------------------------ evaluation

COLUMNS = {"reward": "reward", "ta": "TA", "vq": "VQ", "mq": "MQ", "judge": "judge", "text": "text", "visual": "visual",
           "motion_quality": "motion", "all_right": "right", "area": "area", "displacement": "displ.", "spread": "spread"}
CURVE_SAMPLES = 2                        # clips of each held-out prompt for a point of a curve


class Rows:
    """A CSV file, written row by row."""

    def __init__(self, file: Path):
        self.file, self.rows = file, []

    def add(self, row: dict) -> None:
        with open(self.file, "a" if self.rows else "w", newline="") as file:
            writer = csv.DictWriter(file, row)
            if not self.rows:
                writer.writeheader()
            writer.writerow(row)
        self.rows.append(row)


@torch.no_grad()
def sample_batches(model: Generator, prompts: list[str], generator: torch.Generator, size: int = 48) -> Tensor:
    """sample in batches; the noise depends on the generator alone, so two models get the same."""
    return torch.cat([sample(model, prompts[i : i + size], draw_noise(model, len(prompts[i : i + size]), generator))
                      for i in range(0, len(prompts), size)])


def held_out_clips(model: Generator, samples: int, seed: int, stream: int) -> tuple[Tensor, list[str]]:
    """`samples` clips of each held-out prompt, and the prompt of each clip."""
    prompts = [prompt for prompt in HELD_OUT_PROMPTS for _ in range(samples)]
    return sample_batches(model, prompts, seeded(seed, stream)), prompts


def evaluate(clips: Tensor, prompts: list[str], reward: Callable) -> dict[str, Tensor]:
    """Rewards, judge and detectors of collapse, each [prompts]: means over the clips of a prompt, which must follow each other.

    judge: mean of text, visual and motion quality, in [0, 1]. spread: how far, in px, the clips of one prompt lie apart (deviation
    of their mean positions); 0 when they are all the same.
    """
    scores = reward(clips, prompts) | judge(clips, prompts)
    per_prompt = len(prompts) // len(set(prompts))
    scores = {name: value.float().cpu().view(-1, per_prompt) for name, value in scores.items()}
    spread = (scores.pop("x").var(1, correction=0) + scores.pop("y").var(1, correction=0)).sqrt()
    total = (scores["text"] + scores["visual"] + scores["motion_quality"]) / 3
    return {name: value.mean(1) for name, value in scores.items()} | {"judge": total.mean(1), "spread": spread}


def choose_strength(scores: dict[float, tuple[float, float]], base: tuple[float, float]) -> float | None:
    """The rule of Sec. 4.4: the largest s that improves both (in-domain reward, independent judge) over the base; None if none does.

    A higher reward alone is not accepted as better: that is how reward hacking looks. Equal, or NaN, is not improved. Where None is
    the answer, compare takes s = 0, the semi-on-policy adapter alone.
    """
    return max((s for s, (reward, judged) in scores.items() if reward > base[0] and judged > base[1]), default=None)


def table(results: dict[str, dict[str, Tensor]], compare: list[str], marked: str = "") -> str:
    """Means by model; below those to compare the mean change from the first and the standard error of its paired differences over
    prompts; * at the marked one."""
    lines = [f"{'':<12}{'reward model (open_clip)':>32}{'judge, in [0, 1]':>40}{'px², px, px':>24}",
             f"{'':<12}" + "".join(f"{title:>8}" for title in COLUMNS.values())]
    first = next(iter(results.values()))
    for name, scores in results.items():
        lines.append(f"{name + (' *' if name == marked else ''):<12}" + "".join(f"{scores[c].mean().item():>8.3f}" for c in COLUMNS))
        if name in compare:
            change = {c: scores[c] - first[c] for c in COLUMNS}
            lines.append(f"{'  change':<12}" + "".join(f"{d.mean().item():>+8.3f}" for d in change.values()))
            lines.append(f"{'  ± s.e.':<12}" + "".join(f"{d.std().item() / len(d) ** 0.5:>8.3f}" for d in change.values()))
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


# ------------------------------------------------------------------ studies

def study_entropy(model: Generator, reward: Callable, settings: Settings, folder: Path) -> str:
    """Fig. 6: share all noise, redraw one source of the pivot chunk's at a time, and see how much the clip changes.

    Writes entropy.csv: for each source and pivot the deviation between branches of the pixels in [0, 1] (root mean square over prompts,
    pixels and the frames of the pivot chunk, and of all chunks from there on) and of the reward (mean over prompts), and entropy.png:
    for one prompt a block for each source (down) and pivot (across), with the chunks' middle frames of three branches.
    """
    group, sources = 4, ["nothing", "initial noise"] + [f"solver noise {i + 1}" for i in range(model.solver_steps)]
    rows, pictures = Rows(folder / "entropy.csv"), {}
    for pivot in tqdm(range(model.chunks), desc="entropy", unit="pivot"):
        for i, source in enumerate(sources):
            radii = tuple(float(k + 1 == i) for k in range(len(sources) - 1))
            noise, generator = draw_noise(model, len(HELD_OUT_PROMPTS), seeded(settings.seed, STUDY)), seeded(settings.seed, STUDY, i)
            clips = fork(model, HELD_OUT_PROMPTS, pivot, group, radii, noise, generator)[1]     # [P, G, FRAMES, 3, H, W]
            scores = reward(clips.flatten(0, 1), [p for p in HELD_OUT_PROMPTS for _ in range(group)])["reward"]
            variance = (clips - clips[:, :1]).var(1, correction=0).unflatten(1, (model.chunks, -1))     # [P, L, frames, 3, H, W]
            rows.add({"source": source, "pivot": pivot + 1, "pivot_chunk": variance[:, pivot].mean().sqrt().item(),
                      "from_pivot_on": variance[:, pivot:].mean().sqrt().item(),
                      "reward": scores.view(-1, group).std(1, correction=0).mean().item()})
            pictures[source, pivot] = clips[0, :3, CHUNK_FRAMES // 2 :: CHUNK_FRAMES]           # [3, L, 3, H, W]
    across = [torch.cat([pictures[source, p] for p in range(model.chunks)], 1) for source in sources[1:]]
    save_filmstrip(torch.stack(across), folder / "entropy.png")
    lines = [f"{'deviation between branches':<28}" + "".join(f"{f'pivot {p + 1}':>9}" for p in range(model.chunks))]
    for column in ("pivot_chunk", "from_pivot_on", "reward"):
        for source in sources:
            values = [row[column] for row in rows.rows if row["source"] == source]
            lines.append(f"{column.replace('_', ' ') + ', ' + source:<28}" + "".join(f"{value:>9.4f}" for value in values))
    return "\n".join(lines)


def study_cost(model: Generator, reward: Callable, settings: Settings, folder: Path) -> str:
    """Sec. 3.2: seconds, without the reward, of a fork at each chunk and its update, beside sequence-level (SDE-)GRPO with the same G:
    there each rollout runs all L chunks, and the gradient goes through all re-noising steps of all chunks of all of them. Writes cost.csv."""
    P, G, rounds, rows = settings.prompts, settings.group, 3, Rows(folder / "cost.csv")
    adapter = Adapter.new(model, settings.rank, settings.alpha, seeded(settings.seed, ADAPTER))
    optimizer = torch.optim.AdamW(adapter.parameters(), settings.lr, weight_decay=0)
    advantages = torch.randn(P, G, generator=seeded(settings.seed, STUDY)).to(model.device)
    method, sde = methods(model, settings)["on-policy"], methods(model, settings)["sde-grpo"]

    def seconds(call: Callable) -> tuple[float, object]:
        began = time.perf_counter()
        result = call()
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)
        return time.perf_counter() - began, result

    for step in tqdm(range(rounds + 1), desc="cost", unit="round"):
        row, whole = {}, 0.0
        for p in range(model.chunks):
            generator = seeded(settings.seed, STUDY, step)
            noise = draw_noise(model, P, generator)
            with adapter.on(model):
                forked, (branches, _) = seconds(lambda: fork(model, TRAIN_PROMPTS[:P], p, G, method.radii, noise, generator))
            one, _ = seconds(lambda: update(model, adapter, branches, torch.arange(settings.anchors), advantages, method, optimizer,
                                            settings.updates))
            every, _ = seconds(lambda: update(model, adapter, branches, torch.arange(G), advantages, sde, optimizer,
                                              settings.updates))
            row |= {f"fork_{p + 1}": forked, f"update_{p + 1}": one}
            whole += every
        if step > 0:                                           # the first round warms up
            rows.add(row | {"sequence_rollouts": row["fork_1"], "sequence_update": whole})
    columns = {name: [row[name] for row in rows.rows] for name in rows.rows[0]}
    show = lambda names: f"{mean(map(sum, zip(*(columns[n] for n in names)))):>12.2f}"
    lines = [f"{'seconds of an iteration':<28}{'rollouts':>12}{'update':>12}{'together':>12}"]
    for name, parts in [(f"fork at chunk {p + 1}", (f"fork_{p + 1}", f"update_{p + 1}")) for p in range(model.chunks)] + [
            ("sequence-level GRPO", ("sequence_rollouts", "sequence_update"))]:
        lines.append(f"{name:<28}" + "".join(show([part]) for part in parts) + show(parts))
    return "\n".join(lines)


# ------------------------------------------------------------------ main

def parse_sweep(text: str) -> list[float]:
    try:
        strengths = sorted({float(part) for part in text.split(",")})
    except ValueError:
        strengths = []
    if not strengths or not all(0 < s <= 10 for s in strengths):
        raise UserError(f"--sweep {text}: expected strengths above 0 and up to 10, as 0.4,0.6,0.8,1")
    return strengths


def run(settings: Settings) -> None:
    """A training, the recipe, or a study: check the input, load base and reward, and leave all that comes of it in a folder."""
    folder = Path(settings.out or time.strftime("runs/%Y%m%d-%H%M%S"))
    check_folder(folder, new=True)
    weights, buffer_weights = (parse_weights(getattr(settings, name), name) for name in ("reward_weights", "buffer_weights"))
    sweep = parse_sweep(settings.sweep)
    model = load_generator(settings.base, settings.device, settings.precision == "bf16", settings.timesteps)
    if not model.solver_steps and (settings.method == "sde-grpo" or settings.study == "cost"):
        raise UserError(f"{'--study cost' if settings.study else '--method sde-grpo'}: the sampler adds no noise that SDE-GRPO could explore"
                        f"; choose another --base (now {settings.base}) or more --timesteps (now {model.timesteps})")
    scorer = ClipReward(settings.clip, settings.device)
    about = {"base": fingerprint(model), "clip": fingerprint(scorer.model), "buffer_weights": buffer_weights, "group": settings.group,
             "sigma": settings.sigma, "timesteps": list(model.timesteps), "flow": model.flow}
    buffer = load_buffer(settings.buffer, about, model) if settings.buffer else None
    reference = sample_batches(model, TRAIN_PROMPTS, seeded(0, CALIBRATION))                    # the same for all seeds: one scale
    reward = WeightedReward(scorer, weights, reference, TRAIN_PROMPTS)
    buffer_reward = reward.reweighted(buffer_weights)
    folder.mkdir(parents=True, exist_ok=bool(settings.out))
    record = dataclasses.asdict(settings) | {"reward_scales": reward.scales}
    (folder / "settings.json").write_text(json.dumps(record, indent=1) + "\n")
    if settings.study:
        report = {"entropy": study_entropy, "cost": study_cost}[settings.study](model, reward, settings, folder)
    else:
        adapters, curves, began = {}, {}, time.perf_counter()
        for name in [settings.method] if settings.method else ["on-policy", "semi"]:
            method = methods(model, settings)[name]
            if method.buffered and buffer is None:
                rollouts = lambda P, generator: explore(model, buffer_reward, P, settings.group, method.radii, generator)
                buffer = collect_buffer(rollouts, settings.buffer_groups, settings.prompts, settings.seed)
                save_buffer(buffer, folder / "buffer.safetensors", about)
            adapters[name], curves[name] = align(name, model, reward, settings, folder, buffer)
        minutes = (time.perf_counter() - began) / 60
        report = compare(model, reward, adapters, sweep, settings, folder)
        line = lambda name, column: f"{column} {sparkline([row[column] for row in curves[name]])}"
        report += f"""
held out, by iteration  {"; ".join(f"{name}: {line(name, 'reward')} {line(name, 'judge')}" for name in adapters)}
time                    {minutes:.1f} min to train on {settings.device}, in {settings.precision}"""
    print(f"\n{report}\n{'run folder':<24}{folder}: {' '.join(sorted(file.name for file in folder.iterdir()))}")


def compare(model: Generator, reward: Callable, adapters: dict[str, Adapter], sweep: list[float], settings: Settings, folder: Path) -> str:
    """Merge the recipe's two adapters at each strength, judge all models on held-out prompts with the same noise, choose s -> the report.
    Given another single adapter, judge it beside the base."""
    models, strengths = {"base": None} | adapters, {}
    if not settings.method:
        on, semi, strengths = adapters["on-policy"], adapters["semi"], {f"s = {s:g}": s for s in sweep}
        merged = {name: merge_adapters((semi, 1.0), (on, s)) for name, s in strengths.items()}          # Sec. 3.3
        models = {"base": None, "semi": semi} | merged | {"on-policy": on}                      # the rows of Tables 1 and 3
    clips, results, judged = {}, {}, Rows(folder / "judged.csv")
    for name, adapter in tqdm(models.items(), desc="judging", unit="model"):
        with adapter.on(model) if adapter else nullcontext():
            clips[name], prompts = held_out_clips(model, settings.judge_samples, settings.seed, JUDGING)
        results[name] = evaluate(clips[name], prompts, reward)
        judged.add({"model": name} | {column: results[name][column].mean().item() for column in COLUMNS})

    chosen, rule, shown = "", "", list(models)
    if not settings.method:
        both = {name: (scores["reward"].mean().item(), scores["judge"].mean().item()) for name, scores in results.items()}
        s = choose_strength({s: both[name] for name, s in strengths.items()}, both["base"])
        chosen = "semi" if s is None else f"s = {s:g}"
        models[chosen].save(folder / "merged.safetensors", model)
        rule = "\n* " + ("the largest s that improves both reward and judge over the base" if s is not None else
                         "no s improves both reward and judge over the base, so s = 0: the semi-on-policy adapter alone") + "\n"
        shown = list(dict.fromkeys(["base", "on-policy", "semi", chosen]))
    first = [clips[name][:: len(prompts) // 8] for name in shown]                               # of 8 prompts the first clip
    save_gif([part.unflatten(0, (4, 2)) for part in first], folder / "models.gif")
    save_filmstrip(torch.stack(first, 1), folder / "models.png")
    return f"""{len(prompts)} clips of {len(HELD_OUT_PROMPTS)} held-out prompts, the same noise for all models; the reward is a mean of z-scores:

{table(results, [name for name in shown if name != "base"], chosen)}
{rule}
in models.gif           {", ".join(shown)}"""


def run_sample(settings: Settings) -> None:
    """Stream one clip."""
    file = Path(settings.out or "clip.gif")
    if file.suffix != ".gif" or file.is_dir():
        raise UserError(f"--out {file}: expected the name of a .gif file")
    check_folder(file.parent)
    attributes([settings.sample])
    model = load_generator(settings.base, settings.device, settings.precision == "bf16", settings.timesteps)
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


def choose_precision(name: str, device: str) -> str:
    """Processors differ by a factor of ten in bf16: a trial of some milliseconds tells."""
    if name != "auto" or torch.device(device).type == "cuda":
        return "bf16" if name == "auto" else name
    dtypes, seconds = {"bf16": torch.bfloat16, "fp32": torch.float32}, {"bf16": [], "fp32": []}
    for _ in range(30):                                        # in turns, and the best of each: other work may be running
        for precision, dtype in dtypes.items():
            x, weight = torch.ones(2048, 192, dtype=dtype), torch.ones(768, 192, dtype=dtype)
            began = time.perf_counter()
            F.linear(x, weight)
            seconds[precision].append(time.perf_counter() - began)
    return min(seconds, key=lambda precision: min(seconds[precision]))


def main(arguments: list[str] | None = None) -> int:
    if isinstance(sys.stdout, io.TextIOWrapper):               # not in a notebook
        sys.stdout.reconfigure(errors="replace")               # an output without σ or ▇ is no reason to stop
    try:
        settings = parse(arguments)
        settings.device = choose_device(settings.device)
        settings.precision = choose_precision(settings.precision, settings.device)
        if settings.sample:
            run_sample(settings)
        elif settings.pretrain:
            pretrain(settings)
        else:
            run(settings)
    except (UserError, OSError) as error:
        print(f"arcopo: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
