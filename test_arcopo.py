"""pytest: tests by equivalence; no network, no GPU (tests that need one skip themselves)."""

import copy
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import fields
from functools import partial
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import DEFAULT, Mock

import imageio.v3 as iio
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributions import Normal
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint

import arcopo
import reward
from arcopo import (Adapter, Fork, Generator, Method, Settings, branch_noise, choose_strength,
                    clipped_objective, collect_buffer, denoise, draw_from, draw_noise, draw_pairs,
                    explore, fork, group_advantages, iterate, iterate_buffered, merge_adapters,
                    neighbor_noise, replay, sample, seeded, surrogate_log_policy, update)
from reward import (CHUNKS, HELD_OUT_PROMPTS, QUALITIES, TRAIN_PROMPTS, ClipReward, UserError,
                    WeightedReward, judge, load_rewards, make_clips)
from examples import own_model, rewards
from examples.check_self_forcing import Text, Vae
from examples.checks import check
from examples.self_forcing import SelfForcing
from studies import claims, measure, merging, pretrain, sde_grpo, tables
from studies.common import read

HERE = Path(arcopo.__file__).resolve().parent
torch.set_num_threads(1)                # faster for models this small
PROMPTS = TRAIN_PROMPTS[:3]
SMALL = {"group": 4, "anchors": 2, "prompts": 2, "clip_range": 1e-2}
tiny_method = partial(Method, **SMALL)
tiny_settings = partial(Settings, **SMALL, rank=4, alpha=4.0)


def tiny(flow=False, width=32, layers=2, timesteps=(1.0, 0.6, 0.33, 0.14)) -> Generator:
    torch.manual_seed(0)
    model = Generator(width, layers, 2, timesteps, flow).requires_grad_(False)
    nn.init.normal_(model.head.weight, std=0.1)
    nn.init.normal_(model.patch.weight, std=0.2)    # so that the noise decides too
    return model


def nonzero(adapter: Adapter, seed: int = 1) -> Adapter:
    for _, B in adapter.weights.values():
        B.data.copy_(0.1 * torch.randn(B.shape, generator=seeded(seed)))
    return adapter


def new_adapter(model: nn.Module) -> Adapter:
    return Adapter.new(model, 4, 4.0, seeded(0))


def forked(model: nn.Module, micro: int = 0, prompts: list[str] = PROMPTS) -> tuple[Fork, Tensor]:
    """At pivot 1, 4 neighbours of its initial noise; the solver noise is shared."""
    noise = draw_noise(model, len(prompts), seeded(0))
    own = branch_noise(noise, 1, 0.5, 4, seeded(0, 1))
    return fork(model, prompts, 1, noise, *own, micro)


def brightness(clips: Tensor, prompts: list[str]) -> dict[str, Tensor]:
    return {"reward": clips.flatten(1).mean(1)}


def tiny_buffer(model: nn.Module, reward: Callable = brightness) -> list[dict]:
    collect = partial(collect_buffer, model, tiny_method(), TRAIN_PROMPTS, reward)
    return [group for seed in range(3) for group in collect(seeded(seed))]


@pytest.mark.parametrize("name, values", [
    ("tau", (-1.0, math.nan, math.inf)), ("anchors", (0, 5)), ("sigma", (0.0, 2.0)),
    ("clip_range", (0.0, -math.inf)), ("quasi_norm", (-0.5, 3.0)), ("micro", (-1,)),
    ("group", (0, 1)), ("steps", (-1,)), ("lr", (math.nan,)), ("sweep", ((0.5, 0.0), (math.nan,))),
    ("timesteps", ((0.9, 0.5), (1.0, 0.5, 0.5), (1.0, math.nan)))])
def test_settings_refuse_nonsense_by_name(name, values):
    for build in [tiny_method, tiny_settings] if hasattr(Method, name) else [tiny_settings]:
        for value in values:
            with pytest.raises(ValueError, match=re.escape(f"{name} {value}: must ")):
                build(**{name: value})


# ------------------------------------------------------------------ world, judge, rewards

def test_split_is_fixed_and_disjoint():
    assert len(TRAIN_PROMPTS) == 96 and len(HELD_OUT_PROMPTS) == 24
    assert not set(TRAIN_PROMPTS) & set(HELD_OUT_PROMPTS)
    assert set(reward.JUDGE_PROMPTS["training"]) <= set(TRAIN_PROMPTS)


def test_judge_is_near_perfect_on_the_sharp_world_and_low_on_any_other():
    triples = reward.attributes(TRAIN_PROMPTS).tolist()
    wrong = [reward.prompt_of((c + 1) % 6, (s + 1) % 4, (m + 1) % 5) for c, s, m in triples]
    clips = make_clips(TRAIN_PROMPTS, seeded(0), "sharp")
    sharp = judge(clips, TRAIN_PROMPTS)
    assert sharp["all_right"].mean() > 0.99 and judge(clips, wrong)["text"].mean() < 0.02
    assert sharp["visual"].min() > 0.9 and sharp["motion_quality"].min() > 0.85
    for quality, visual, motion in (("blurry", 0.8, 1), ("noisy", 0.3, 0.7), ("dim", 0.55, 1),
                                    ("flickering", 0.7, 0.55)):
        scores = judge(make_clips(TRAIN_PROMPTS, seeded(0), quality), TRAIN_PROMPTS)
        assert scores["visual"].mean() < visual and scores["motion_quality"].mean() < motion
        assert scores["text"].mean() > 0.95
    empty = judge(torch.full((2, 12, 3, 32, 32), 0.06), PROMPTS[:2])
    assert all(empty[name].max() == 0 for name in ("text", "visual", "motion_quality"))


def unit_features(model: nn.Module, clips: Tensor) -> Tensor:
    mean, std = (torch.tensor(v)[:, None, None]
                 for v in (model.visual.image_mean, model.visual.image_std))
    return model.encode_image((clips.flatten(0, 1) - mean) / std, normalize=True)


def test_clip_reward_prefers_the_right_prompt_the_sharp_and_the_steady():
    clip, prompts = ClipReward(), TRAIN_PROMPTS[::2]
    ta, vq, mq = clip.text_alignment, clip.visual_quality, clip.motion_quality
    triples, sharp = reward.attributes(prompts).tolist(), make_clips(prompts, seeded(0), "sharp")
    wrong = [reward.prompt_of((c + 1) % 6, (s + 1) % 4, m) for c, s, m in triples]
    assert (ta(sharp, prompts) > ta(sharp, wrong)).float().mean() > 0.99
    for quality in list(QUALITIES)[1:]:
        worse = make_clips(prompts, seeded(0), quality)
        assert (vq(sharp, prompts) > vq(worse, prompts)).float().mean() > 0.95
    assert (mq(sharp, prompts) > mq(worse, prompts)).float().mean() > 0.95      # flickering


@torch.no_grad()
def test_clip_scores_are_their_formulas_of_open_clips_own_features():
    """And the features that are kept for the next reward are not those of other clips."""
    import open_clip
    model, clip = open_clip.create_model(f"local-dir:{reward.ASSETS / 'clip'}").eval(), ClipReward()
    for seed in (0, 1):
        clips = make_clips(PROMPTS, seeded(seed))
        found = [getattr(clip, name)(clips, PROMPTS) for name in reward.OF_CLIP.values()]
        for i, image in enumerate(unit_features(model, clips).unflatten(0, (3, 12))):
            texts = [PROMPTS[i]] + [PROMPTS[i].replace("a ", f"a {quality} ", 1)
                                    for quality in ("sharp", "blurry", "noisy", "dim")]
            cosine = image @ model.encode_text(clip.tokenizer(texts), normalize=True).T
            logits = model.logit_scale.exp() * cosine
            vq = torch.stack([logits[:, [1, k]].softmax(1)[:, 0] for k in (2, 3, 4)])
            mq = torch.cosine_similarity(image[1:], image[:-1])
            expected = torch.stack([cosine[:, 0].mean(), vq.mean(), mq.mean()])
            assert torch.allclose(torch.stack(found)[:, i], expected, atol=1e-5)


def test_weighted_reward_puts_the_components_on_one_scale():
    parts = {f"my:{i}": lambda clips, prompts, i=i: 1000.0**i * clips[:, i] for i in range(3)}
    clips, prompts = torch.randn(500, 3, generator=seeded(0)), [""] * 500
    weighted = WeightedReward(parts, {"my:0": 2.0, "my:1": 1.0})
    spoiled = torch.cat([clips, torch.full((1, 3), math.nan)])              # is left out
    weighted.scales = weighted.measure_scales(spoiled, prompts)
    found, z = weighted(clips, prompts), (clips - clips.mean(0)) / clips.std(0)
    assert torch.allclose(found["reward"], (2 * z[:, 0] + z[:, 1]) / 3, atol=1e-4)
    assert torch.equal(found["my:2"], 1e6 * clips[:, 2])


def test_a_reward_that_fails_is_constant_or_returns_something_else_is_named():
    for value, says in ((lambda: None, "returned NoneType"), (lambda: 1 / 0, "failed"),
                        (lambda: (torch.zeros(3), {}), "returned tuple"),
                        (lambda: [1, 2], "returned list of shape (2,) for 3"),
                        (lambda: torch.zeros(3, 1), "returned Tensor of shape (3, 1) for 3"),
                        (lambda: torch.full((3,), 0.1), "is the same number for all"),
                        (lambda: torch.full((3,), math.nan), "is the same number for all")):
        bad = WeightedReward({"my:f": lambda clips, prompts: value()}, {"my:f": 1.0})
        with pytest.raises(UserError, match=re.escape(f"--reward my:f: {says}")):
            bad.measure_scales(torch.zeros(3, 1), PROMPTS)
    good = WeightedReward({"my:f": lambda clips, prompts: [1, 2, 3]}, {"my:f": 1.0})
    assert good.measure_scales(torch.zeros(3, 1), PROMPTS) == {"my:f": (2, 1)}


def test_a_reward_module_that_ends_the_program_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("quits.py").write_text("raise SystemExit(0)")
    with pytest.raises(UserError, match="--reward quits:f: cannot import it .SystemExit"):
        load_rewards(["quits:f=1"], "cpu")
    assert "quits.py" in capsys.readouterr().err                # the traceback


# ------------------------------------------------------------------ generator, fork, sampler

def one_pass(model: Generator, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Without a cache: all chunks x [N, L, ...] at times t [N, L] in one pass with the block-causal
    mask -> predictions [N, L, ...] and keys and values, each [N, layers, heads, tokens, width of a
    head]. Written anew."""
    N, L, frames, C, S, W = *x.shape[:5], model.width
    side, K = S // arcopo.PATCH, model.tokens
    words = model.begin(PROMPTS).words
    angle = 1000 * t[..., None] * 1e4 ** (-torch.arange(128) / 128)
    condition = model.time(torch.cat([angle.cos(), angle.sin()], -1)) + words[:, None]  # [N, L, W]
    modulation = model.modulation(condition).view(N, L, 1, 6, W)
    y = x.view(N, L, frames, C, side, arcopo.PATCH, side, arcopo.PATCH)
    y = torch.einsum("nlfcapbq->nlabfcpq", y).reshape(N, L, K, -1)
    y = model.patch(y) + model.position[:L] + words[:, None, None]
    chunk = torch.arange(L).repeat_interleave(K)
    mask, keys, values = chunk[:, None] >= chunk, [], []
    for block in model.blocks:
        a, b, c, d, e, f = (modulation + block.table).unbind(3)
        z = F.layer_norm(y, (W,)) * (1 + b) + a
        q, k, v = block.qkv(z).view(N, L * K, 3, model.heads, -1).transpose(1, 3).unbind(2)
        q, k = (F.rms_norm(u, u.shape[-1:]) for u in (q, k))
        z = F.scaled_dot_product_attention(q, k, v, mask)
        y = y + c * block.out(z.transpose(1, 2).reshape(N, L, K, W))
        z = F.layer_norm(y, (W,)) * (1 + e) + d
        y = y + f * block.down(F.gelu(block.up(z)))
        keys.append(k)
        values.append(v)
    a, b = (condition[:, :, None] + model.table).unbind(2)
    y = model.head(F.layer_norm(y, (W,)) * (1 + b[:, :, None]) + a[:, :, None])
    y = y.view(N, L, side, side, frames, C, arcopo.PATCH, arcopo.PATCH)
    y = torch.einsum("nlabfcpq->nlfcapbq", y).reshape(N * L, frames * C, S, S)
    return (y + model.smooth(y)).view(x.shape), torch.stack(keys, 1), torch.stack(values, 1)


def test_cached_prediction_equals_one_pass_with_the_block_causal_mask():
    model, clean = tiny(), 2 * make_clips(PROMPTS, seeded(0)).unflatten(1, (CHUNKS, -1)) - 1
    nn.init.normal_(model.smooth[2].weight, std=0.1)        # zero at first
    noisy, t = torch.randn(clean.shape, generator=seeded(2)), torch.rand(3, 4, generator=seeded(1))
    context, together = model.begin(PROMPTS), pretrain.predict_all(model, noisy, t, clean, PROMPTS)
    for p in range(CHUNKS):
        x = torch.cat([clean[:, :p], noisy[:, p : p + 1]], 1)
        times = torch.cat([torch.zeros(3, p), t[:, p : p + 1]], 1)
        found = model.predict(noisy[:, p], t[:, p], context)
        assert torch.equal(found, together[:, p])
        assert torch.allclose(found, one_pass(model, x, times)[0][:, p], atol=1e-5)
        before, kept = context, tree_map(torch.clone, context)
        context = model.extend(context, clean[:, p])
        assert all(tree_leaves(tree_map(torch.equal, before, kept)))    # extend changes a copy
    for layers, whole in zip(zip(*context.kv), one_pass(model, clean, torch.zeros(3, 4))[1:]):
        assert torch.allclose(torch.stack(layers, 1), whole, atol=1e-5)
    x[:, 2] = 0                                             # the past has an effect
    assert not torch.allclose(found, one_pass(model, x, times)[0][:, 3], atol=1e-3)


def test_the_shipped_base_is_good_and_imperfect():
    model = arcopo.load_generator()
    clips = sample(model, HELD_OUT_PROMPTS, draw_noise(model, 24, seeded(0)))
    scores = judge(clips, HELD_OUT_PROMPTS)
    assert 0.5 < scores["all_right"].mean() < 0.9 and scores["motion_quality"].mean() > 0.45
    assert 0.6 < scores["visual"].mean() < 0.8


@pytest.mark.parametrize("kind, flow, pivot", [
    ("initial", False, 0), ("initial", False, 3), ("solver", False, 2), ("initial", True, 2)])
def test_nothing_but_the_pivots_own_noise_differs(kind, flow, pivot):
    """Each branch is what plain sampling gives from the shared noise with that tensor exchanged."""
    model, noise = tiny(flow=flow), draw_noise(tiny(flow=flow), 3, seeded(0))
    own = {name: x[:, pivot, None].expand(-1, 4, *x.shape[2:])
           for name, x in noise._asdict().items()}
    assert torch.equal(branch_noise(noise, pivot, 0.5, 4, seeded(1))[1], own["solver"])
    base = getattr(noise, kind)
    own[kind] = neighbor_noise(base[:, pivot], 0.5, 4, seeded(1)).transpose(0, 1)
    branches, clips = fork(model, PROMPTS, pivot, noise, **own)
    assert torch.equal(branches.states[:, 0], own["initial"])
    for i in range(4):
        changed = base.clone()
        changed[:, pivot] = own[kind][:, i]
        plain = sample(model, PROMPTS, noise._replace(**{kind: changed}))
        assert torch.allclose(plain, clips[:, i], atol=1e-5)
    before, after = (clips[:, 1:] - clips[:, :1]).abs().tensor_split([3 * pivot], 2)    # frames
    assert before.sum() == 0 and after.amax((2, 3, 4, 5)).min() > 1e-3


def test_explore_forks_random_prompts_and_pivots_by_neighbours_of_the_initial_noise():
    model, seen, places = tiny(), [], set()
    scores = lambda clips, prompts: seen.append((clips, prompts)) or brightness(clips, prompts)
    for i in range(12):
        branches, found = explore(model, tiny_method(group=2), PROMPTS, scores, seeded(i))
        first, second = branches.states[:, 0].flatten(2).unbind(1)          # [P, D]
        assert torch.allclose((first * second).mean(1), torch.tensor(0.75), atol=0.08)   # 1 - σ²
        assert seen[-1][1] == [p for p in branches.prompts for _ in range(2)]
        assert torch.equal(found["reward"].flatten(), brightness(*seen[-1])["reward"])
        places |= {branches.prefix.shape[1], *branches.prompts}
    assert places == {0, 1, 2, 3, *PROMPTS}
    with pytest.raises(ValueError, match="prompts 4: must be at most 3"):
        explore(model, tiny_method(prompts=4), PROMPTS, brightness, seeded(0))
    for returned, says in ((None, "NoneType"), ({"reward": 1}, "dict")):
        with pytest.raises(TypeError, match=f"the reward returned {says}; expected"):
            explore(model, tiny_method(), PROMPTS, lambda *a, x=returned: x, seeded(0))


@pytest.mark.parametrize("flow", [False, True])
def test_sampler_re_noises_as_self_forcing_or_takes_euler_steps(flow):
    """From a model that predicts 3. A flow model keeps its noise, the other gets new noise."""
    predict = lambda x, t, context: torch.full_like(x, 3.0)
    model = SimpleNamespace(timesteps=(1.0, 0.5, 0.25), flow=flow, predict=predict)
    initial, solver = torch.randn(2, 5), torch.randn(2, 0 if flow else 2, 5)
    states, candidates = denoise(model, None, initial, solver)
    assert len(states) == len(candidates) == 3 and torch.equal(states[0], initial)
    assert torch.allclose(candidates[-1], torch.full_like(initial, 3.0))
    for i, t in enumerate((0.5, 0.25)):
        noise = initial if flow else solver[:, i]
        assert torch.allclose(states[i + 1], (1 - t) * 3 + t * noise, atol=1e-6)


def test_no_two_random_streams_coincide():
    streams = [("curve",), ("explored", "adapter"), ("explored", 1), ("explored", 1, 1), (1, 23)]
    seeds = (*range(100), 2**31, 2**32, 2**63, -1, 10**18)      # beyond 32 and 63 bits
    drawn = [torch.randint(2**62, (), generator=seeded(seed, *stream)).item()
             for stream in (*streams, (12, 3)) for seed in seeds]
    assert len(set(drawn)) == len(drawn)


# ------------------------------------------------------------------ objective, replay, update

def test_neighbor_noise():
    base = torch.randn(20000, generator=seeded(0))
    for sigma in (0.1, 0.5, 1.0):
        noise = neighbor_noise(base, sigma, 3, seeded(1))
        assert noise.shape == (3, 20000) and (noise.std(1) - 1).abs().max() < 0.03
        share = (noise * base).mean(1) / base.square().mean()
        assert torch.allclose(share, torch.tensor((1 - sigma**2) ** 0.5), atol=0.03)
        assert torch.corrcoef(noise)[0, 1] == pytest.approx(1 - sigma**2, abs=0.03)
    assert torch.equal(neighbor_noise(base, 0.0, 2), base.expand(2, -1))


def test_group_advantages():
    rewards = 5 + torch.randn(7, 12, generator=seeded(0))
    A = group_advantages(rewards)
    assert torch.allclose(A.mean(1), torch.zeros(7), atol=1e-6)
    assert torch.allclose(A.std(1, correction=0), torch.ones(7), atol=1e-5)
    for p in (0.8, 2.0):
        norm = A.abs().pow(p).sum(1, keepdim=True).pow(1 / p)
        assert torch.allclose(group_advantages(rewards, p), A / norm, atol=1e-6)
        for value in (0.1, 1000.1):     # exactly zero, though the mean of 0.1 is not 0.1 in float32
            assert (group_advantages(torch.full((12,), value), p) == 0).all()
        nearly = group_advantages(0.001 * rewards, p, floor=0.1)
        assert nearly.abs().max() < 0.05 * group_advantages(rewards, p).abs().max()
    half = torch.tensor([0.0, 300, 600, 900]).half()        # the squares are beyond float16
    assert torch.equal(group_advantages(half), group_advantages(half.float()))
    rewards[0, :2], rewards[1] = torch.tensor([math.nan, math.inf]), -math.inf      # left out
    found = group_advantages(rewards)
    assert torch.allclose(found[0, 2:], group_advantages(rewards[0, 2:])) and not found[0, :2].any()
    assert (found[1] == 0).all() and torch.equal(found[2:], A[2:])


@pytest.mark.parametrize("clip", [math.inf, 0.05, 10.0])
def test_gradient_is_the_closed_form_at_theta_old_and_finite_differences_elsewhere(clip):
    """∂J/∂x^(θ) = 2/(GτD) Σ A⁽ⁱ⁾ x⁽ⁱ⁾ at θ_old, for any anchor, with or without the clip."""
    G, D, tau, rng = 6, 4, 0.75, seeded(0)
    candidates = torch.randn(G, D, generator=rng, dtype=torch.double)
    A = group_advantages(torch.randn(G, generator=rng, dtype=torch.double))
    expected = 2 / (G * tau * D) * torch.einsum("g,gd->d", A, candidates)
    log_policy = lambda x: surrogate_log_policy(candidates, x, tau)
    for anchor in (candidates[2].clone(), torch.randn(D, generator=rng, dtype=torch.double)):
        J = lambda x, old: clipped_objective(log_policy(x) - old, A, clip)
        anchor.requires_grad_()
        (gradient,) = torch.autograd.grad(J(anchor, log_policy(anchor).detach()), anchor)
        assert torch.allclose(gradient, expected, rtol=1e-10, atol=1e-12)
        away = anchor + 0.2 * torch.randn(D, generator=rng, dtype=torch.double)
        assert torch.autograd.gradcheck(partial(J, old=log_policy(away).detach()), anchor)


def test_clip_stops_the_gradient_only_where_it_was_already_won():
    log_ratio = torch.tensor([0.2, -0.2, 0.2, -0.2], requires_grad=True)
    advantages = torch.tensor([1.0, -1.0, -1.0, 1.0])       # two favourable, two unfavourable
    clipped_objective(log_ratio, advantages, 0.1).backward()
    assert torch.equal(log_ratio.grad == 0, torch.tensor([True, True, False, False]))
    far = torch.tensor([1000.0, 1000.0], requires_grad=True)                # exp overflows
    clipped_objective(far, torch.tensor([1.0, 0.0]), 0.1).backward()
    assert torch.equal(far.grad, torch.zeros(2))


def test_pairs_are_all_steps_with_the_same_random_anchors():
    counts = torch.zeros(5)
    for i in range(1000):
        pairs = draw_pairs(3, 5, 2, seeded(i))
        assert pairs.tolist() == [[t, b] for t in range(3) for b in pairs[:2, 1].tolist()]
        counts[pairs[:2, 1]] += 1       # counts once if the two anchors were one
    assert counts.sum() == 2000 and (counts - 400).abs().max() < 80         # five deviations


def iterated(model, adapter, buffer=None, seed=0, **changes) -> dict:
    """The row of iterate; with a buffer, of iterate_buffered."""
    optimizer = torch.optim.AdamW(adapter.parameters(), 1e-2, weight_decay=0)
    parts = model, adapter, optimizer, tiny_method(**changes)
    if buffer is None:
        return iterate(*parts, TRAIN_PROMPTS, brightness, seeded(seed))
    return iterate_buffered(*parts, buffer, seeded(seed))


def updated(model, adapter, branches, rewards, buffered=False, lr=0.0, **changes) -> dict:
    optimizer, method = torch.optim.SGD(adapter.parameters(), lr), tiny_method(**changes)
    return update(model, adapter, optimizer, branches, rewards, method, seeded(1), buffered)


def gradient(*parts, clip_range: float = math.inf, **changes) -> list[Tensor]:
    """Of one update of these parts: model, adapter, branches, rewards."""
    row = updated(*parts, updates=1, clip_range=clip_range, **changes)
    assert row["skipped"] == 0
    return [p.grad.clone() for p in parts[1].parameters()]


def near(a: list[Tensor], b: list[Tensor], tolerance: float = 1e-4) -> bool:
    """Whether two gradients agree, relative to the largest element."""
    size = max(x.abs().max().item() for x in b)
    return size > 1e-5 and all(torch.allclose(x, y, 0, tolerance * size) for x, y in zip(a, b))


def of_prompts(branches: Fork, rows: list[int]) -> Fork:
    context = tree_map(lambda x: x[rows], branches.context)
    return Fork([branches.prompts[i] for i in rows], branches.prefix[rows], context,
                branches.states[rows], branches.candidates[rows])


@pytest.mark.parametrize("flow", [False, True])
def test_replay_is_the_rollout_and_the_first_ratio_is_exactly_one(flow):
    """Also where a low τ makes rounding large. replay_error tells another model's rollout."""
    model, rewards = tiny(flow=flow), torch.randn(3, 4, generator=seeded(0))
    adapter, other = nonzero(new_adapter(model)), copy.deepcopy(model)
    other.head.weight.data *= 1.01
    with torch.no_grad(), adapter.on(model):
        branches = forked(model)[0]
    step, anchor = draw_pairs(4, 4, 4, seeded(1)).T
    with adapter.on(model):
        replayed = replay(model, branches, step, anchor)
    assert torch.allclose(replayed, branches.candidates[:, step, anchor], atol=1e-5)
    rows = []
    for replaying, tau, lr in ((other, 0.03, 0), (model, 1e-4, 0), (model, 0.03, 0.1)):
        rows.append(updated(replaying, adapter, branches, rewards, lr=lr, tau=tau))
        assert rows[-1]["ratio_first"] == 1 and rows[-1]["skipped"] == 0
    assert rows[2]["clip_fraction"] > 0 and rows[2]["replay_error"] < 1e-4
    assert rows[0]["replay_error"] > 30 * rows[2]["replay_error"]


# ------------------------------------------------------------------ buffer, merging, not finite

def test_the_buffer_is_of_the_reference_and_training_never_changes_what_is_drawn(tmp_path):
    """An entry has memory of its own: a reward may use one tensor again. A draw has one pivot, and
    the entries that a file has. Training leaves out rewards that are not finite."""
    model, own, seen, file = tiny(), torch.zeros(8), set(), tmp_path / "buffer.pt"
    again = lambda clips, prompts: {"reward": own.copy_(clips.flatten(1).mean(1))}
    buffer = tiny_buffer(model, again)
    branches, scores = explore(model, tiny_method(), TRAIN_PROMPTS, brightness, seeded(0))
    for n, group in enumerate(buffer[:2]):
        assert torch.equal(group["scores"]["reward"], scores["reward"][n])
        assert torch.equal(group["candidates"], branches.candidates[n].half())
    for group in buffer:
        group["scores"]["reward"][1] = math.nan
    arcopo.save_whole(buffer, file)
    saved, adapter = torch.load(file, weights_only=True), new_adapter(model)
    for seed in range(4):
        assert iterated(model, adapter, buffer, seed, clip_range=math.inf)["skipped"] == 0
    same = partial(torch.allclose, rtol=0, atol=0, equal_nan=True)
    for i in range(30):
        branches, scores = draw_from(buffer, model, 3, seeded(i))
        context = model.begin(branches.prompts)
        for x0 in branches.prefix.unbind(1):
            context = model.extend(context, x0)
        assert all(tree_leaves(tree_map(torch.equal, context, branches.context)))
        assert 1 <= len(branches.states) <= 3
        for n, value in enumerate(scores["reward"]):
            row = [same(group["scores"]["reward"], value) for group in saved].index(True)
            seen.add(row)
            assert branches.prompts[n] == saved[row]["prompt"]
            for name in ("prefix", "states", "candidates"):
                assert torch.equal(getattr(branches, name)[n], saved[row][name].float())
    assert len(seen) == len(saved) == 6         # every entry is drawn sooner or later


@pytest.mark.parametrize("scores, s", [
    ({0.8: (0.2, 0.51), 1.0: (0.9, 0.49), 0.4: (0.1, 0.6)}, 0.8),       # 1.0 is reward hacking
    ({0.4: (-0.1, 0.9), 0.8: (0.2, 0.4)}, None), ({}, None),            # none improves both
    ({0.4: (0.1, 0.6), 0.8: (0.0, 0.6), 1.0: (0.1, 0.5)}, 0.4),         # a tie is no improvement
    ({0.4: (0.1, 0.6), 0.8: (math.nan, 0.6), 1.0: (0.1, math.nan)}, 0.4)])
def test_the_rule_that_chooses_s(scores, s):
    assert choose_strength(scores, (0.0, 0.5)) == s


def test_hooks_and_merged_weights_are_the_same_adapter_and_undone_exactly():
    """W + (α/r) B A by hand, to rounding; also nested and after an exception."""
    model, changed = tiny(), tiny()
    a, b = (nonzero(Adapter.new(model, 4, 8.0, seeded(i)), i) for i in (1, 2))
    x, context = torch.randn(3, *model.chunk_shape, generator=seeded(0)), model.begin(PROMPTS)
    predict = lambda model=model: model.predict(x, 0.5, context).detach()
    by_hand, features = [predict(changed)], torch.randn(2, model.width)
    for adapter in (a, b):
        for name, (A, B) in adapter.weights.items():
            changed.get_submodule(name).weight.data += (8.0 / 4) * (B @ A).detach()
        by_hand.append(predict(changed))
    assert all((x - y).abs().max() > 0.01 for x, y in zip(by_hand, by_hand[1:]))
    before = copy.deepcopy(model.state_dict())
    for mode, hooks in ((torch.enable_grad, len(a.weights)), (torch.no_grad, 0)):
        with mode(), pytest.raises(KeyError), a.on(model):
            assert sum(len(m._forward_hooks) for m in model.modules()) == hooks
            one = predict()
            with b.on(model):
                assert torch.allclose(predict(), by_hand[2], atol=1e-5)
            with pytest.raises(RuntimeError, match="on already"):
                iterated(model, a)
            assert torch.equal(model.head(input=features), model.head(features))
            assert torch.equal(predict(), one) and torch.allclose(one, by_hand[1], atol=1e-5)
            raise KeyError
        assert torch.equal(predict(), by_hand[0])
        assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


@pytest.mark.parametrize("buffered", [False, True])
@pytest.mark.parametrize("flow", [False, True])
def test_a_branch_that_is_not_finite_stays_out_of_the_update(flow, buffered):
    """The gradient is that of the other prompts and of its group's other branches, its anchors."""
    model = tiny(flow=flow)
    (branches, clips), plain = forked(model), forked(model)[0]
    for x in (branches.candidates[1, 1:, 2], branches.states[1, 2:, 2], clips[1, 2]):
        x.fill_(math.nan)                                       # from its second step on
    rewards = arcopo.score_branches(branches, clips, brightness)["reward"]
    assert rewards.isnan().nonzero().tolist() == [[1, 2]]
    slope = partial(gradient, model, nonzero(new_adapter(model)), buffered=buffered, floor=1e-6,
                    anchors=4)
    whole, one = slope(branches, rewards), slope(of_prompts(branches, [1]), rewards[[1]])
    others = slope(of_prompts(plain, [0, 2]), rewards[[0, 2]])
    assert near([3 * x for x in whole], [x + 2 * y for x, y in zip(one, others)])
    row = updated(model, new_adapter(model), branches, rewards, buffered, anchors=4)
    assert row["replay_error"] < 1e-4
    branches.states[1, :, 2] = 5.0                              # read where it is an anchor alone
    assert all(torch.equal(x, y) for x, y in zip(slope(branches, rewards), whole))
    branches.states[1, :, 1] = 5.0
    assert not near(slope(branches, rewards), whole)


def test_what_is_not_finite_has_no_reward():
    """Whether it is a branch's reward, its chunk or its clip."""
    branches, clips = forked(tiny())
    scores = clips.flatten(2).mean(2)
    scores[0, 1] = branches.candidates[1, :, 1] = clips[2, 1] = math.nan
    reward = lambda clips, prompts: {"reward": scores.flatten()}
    rewards = arcopo.score_branches(branches, clips, reward)["reward"]
    assert rewards.isnan().nonzero().tolist() == [[0, 1], [1, 1], [2, 1]]
    assert branches.candidates.isfinite().all()


@pytest.mark.parametrize("buffered", [False, True])
def test_a_non_finite_gradient_skips_the_update(buffered):
    model = tiny()
    adapter, before = nonzero(new_adapter(model)), nonzero(new_adapter(model))
    adapter.parameters()[0].register_hook(lambda grad: grad * math.inf)
    row = iterated(model, adapter, tiny_buffer(model) if buffered else None, updates=3)
    assert row["skipped"] == 1
    assert all(map(torch.equal, before.parameters(), adapter.parameters()))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("buffered", [False, True])
def test_cuda_agrees_with_the_cpu(buffered):
    model, found, rows = tiny(), [], []
    for device in ("cpu", "cuda"):
        model.to(device)
        adapter, buffer = nonzero(new_adapter(model)), tiny_buffer(model) if buffered else None
        rows.append(iterated(model, adapter, buffer, updates=1))
        branches, clips = forked(model)
        slope = gradient(model, adapter, branches, clips.flatten(2).mean(2), buffered, floor=1e-3)
        found.append([x.cpu() for x in (clips, *slope)])
        assert rows[-1]["skipped"] == 0 and (buffered or rows[-1]["ratio_first"] == 1)
    for x, y in zip(*found):
        assert torch.allclose(x, y, rtol=0.05, atol=1e-3)
    for name in ("reward", "grad_norm"):
        assert rows[0][name] == pytest.approx(rows[1][name], rel=0.05)


@pytest.mark.parametrize("micro", [0, 4])
@pytest.mark.parametrize("buffered", [False, True])
def test_cuda_graphs_change_no_number(buffered, micro, monkeypatch):
    """On a CPU, calls run again instead of a graph, which needs the same hooks and addresses."""
    model, found = tiny(), []
    state = lambda: ([p.data_ptr() for p in model.parameters()],
                     [len(layer._forward_hooks) for layer in model.modules()])

    def keep(call: Callable, example: tuple, **more) -> Callable:
        recorded = state()
        return lambda *inputs: call(*inputs) if state() == recorded else None

    if torch.cuda.is_available():
        record = Mock(wraps=torch.cuda.make_graphed_callables)
        model.to("cuda")
    else:
        record = Mock(side_effect=keep)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", Mock())
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", record)
    buffer = tiny_buffer(model) if buffered else None
    for graphed in (False, True):
        adapter = nonzero(new_adapter(model))
        with arcopo.cuda_graphs(model, adapter) if graphed else nullcontext():
            rows = [iterated(model, adapter, buffer, step, micro=micro) for step in range(4)]
        assert record.called == graphed
        found.append((rows, torch.cat([p.data.flatten() for p in adapter.parameters()])))
    assert found[0][0] == found[1][0] and torch.equal(found[0][1], found[1][1])
    assert not {"predict", "extend"} & vars(model).keys()


@pytest.mark.skipif(torch.__version__ < "2.11" and not torch.cuda.is_available(),
                    reason="the fake GPU of older versions of torch needs a driver")
@pytest.mark.parametrize("name", ["on-policy", "semi", "flow"])
def test_training_runs_on_a_fake_gpu(name, monkeypatch):
    """There, tensors on the wrong device raise. What needs values is stubbed, and counted."""
    waits = []
    results = {"__bool__": True, "__int__": 1, "__index__": 0, "tolist": [0.0] * 99}
    for method, result in results.items():
        stub = lambda x, *_, result=result, **more: waits.append(x.device.type) or result
        monkeypatch.setattr(Tensor, method, stub)
    monkeypatch.setattr(FakeTensor, "tolist", Tensor.tolist)
    monkeypatch.setattr(Tensor, "backward", lambda x: [
        setattr(p, "grad", torch.zeros_like(p)) for p in adapter.parameters()])
    with FakeTensorMode(allow_non_fake_inputs=True):
        with torch.device("cuda"):
            model = Generator(16, 1, 2, flow=name == "flow").requires_grad_(False)
            model.chunks = 2
        adapter = Adapter.new(model, 2, 2.0, seeded(0))
        buffer = tiny_buffer(model) if name == "semi" else None
        waits.clear()
        row = iterated(model, adapter, buffer, seed=1, updates=2)
    assert set(row) >= {"reward", "ratio_first", "grad_norm"}
    assert waits.count("cuda") == 2 + 1             # a decision for each update; the metrics


# ------------------------------------------------------------------ other generators, adapters

class Other(own_model.Signals):
    """Of any latent shape and T = 3; the context before the first chunk is of the prompt's text."""

    timesteps, chunks = (1.0, 0.83, 0.36), 3

    def __init__(self, shape=(3, 16, 2, 2), flow=False):
        super().__init__()
        torch.manual_seed(0)
        self.chunk_shape, self.flow, D = shape, flow, math.prod(shape)
        self.layers = nn.Sequential(nn.Linear(2 * D + 1, 16), nn.Tanh(), nn.Linear(16, D))
        self.requires_grad_(False)

    def begin(self, prompts):
        texts = [torch.randn(self.chunk_shape, generator=seeded(0, p)) for p in prompts]
        return self.extend(None, torch.stack(texts))

    def predict(self, x_t, t, context):
        return super().predict(x_t.flatten(1), t, context).view_as(x_t)

    def extend(self, context, x0):
        return super().extend(context, x0.flatten(1))


@pytest.mark.parametrize("model, dtype", [
    (tiny(), torch.float32), (Other((6,), True), torch.float32), (Other(), torch.bfloat16),
    (Other((2, 3, 2, 2, 2), True), torch.float32)])
def test_training_changes_only_the_adapter_of_any_generator(model, dtype):
    """Predictions may have any dtype. B = 0 at first, so that π_θ is the reference too."""
    predict = model.predict
    model.predict = lambda *inputs: predict(*inputs).to(dtype)
    clips = partial(sample, model, PROMPTS, draw_noise(model, 3, seeded(0)))
    plain, before = clips(), copy.deepcopy(model.state_dict())
    assert forked(model)[0].candidates.dtype == torch.float32
    for buffer in (None, tiny_buffer(model)):
        adapter = new_adapter(model)
        with torch.no_grad(), adapter.on(model):
            assert torch.equal(clips(), plain)
        row = iterated(model, adapter, buffer, seed=1, updates=1)
        assert row["skipped"] == 0 and row["ratio_first"] == 1 and row["grad_norm"] > 0
        with torch.no_grad(), adapter.on(model):
            assert not torch.equal(clips(), plain)
        assert torch.equal(clips(), plain)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("model, buffered", [
    (tiny(), False), (tiny(flow=True), True), (tiny(), True), (Other((6,), True), False),
    (Other((2, 3, 2, 2, 2)), False)])
def test_an_update_is_the_plain_loop_over_prompts_steps_and_anchors(model, buffered):
    """One π_θ(i | s_t) at a time. Buffered: π_old is the base, so the clip leaves terms out."""
    branches, rewards = forked(model)[0], torch.randn(3, 4, generator=seeded(2))
    adapter, times = nonzero(new_adapter(model)), (*model.timesteps, 0.0)

    def log_policy(n: int, t: int, b: int) -> Tensor:
        x_t, context = branches.states[n, t, b], of_prompts(branches, [n]).context
        x = model.predict(x_t[None], times[t], context)[0]
        if model.flow:                          # Eq. 2: x_t - (t - s) v, v = (x_t - x̂₀) / t
            x = x_t - (times[t] - times[t + 1]) * (x_t - x) / times[t]
        return (-(branches.candidates[n, t] - x).flatten(1).square().mean(1) / 0.02).log_softmax(0)

    pairs = draw_pairs(len(model.timesteps), 4, 2, seeded(1)).tolist()
    places = [(n, *pair) for n in range(3) for pair in pairs]
    base = torch.stack([log_policy(*place) for place in places])
    A = group_advantages(rewards, 0.8, 0.5).repeat_interleave(len(pairs), 0)
    with adapter.on(model):
        log_pi = torch.stack([log_policy(*place) for place in places])
    ratio = (log_pi - (base if buffered else log_pi.detach())).exp()
    J = torch.minimum(ratio * A, ratio.clamp(0.99, 1.01) * A).mean()
    gradients = torch.autograd.grad(J, adapter.parameters())
    row = updated(model, adapter, branches, rewards, buffered, updates=1, tau=0.02, quasi_norm=0.8,
                  floor=0.5)
    for p, expected in zip(adapter.parameters(), gradients):        # descent on -J
        assert torch.allclose(-p.grad, expected, rtol=1e-2, atol=1e-3 * expected.abs().max())
    assert (row["ratio_first"] == 1) != buffered and (row["clip_fraction"] > 0.1) == buffered


@pytest.mark.parametrize("model, buffered", [(Other(), False), (tiny(), True)])
def test_slices_and_checkpointing_change_nothing_but_the_memory(model, buffered):
    adapter, plain, expected = nonzero(new_adapter(model)), model.predict, None
    rewards = torch.randn(3, 4, generator=seeded(2))
    saving = partial(checkpoint, plain, use_reentrant=False)
    model.extend = Mock(wraps=model.extend)
    for micro, predict in ((0, plain), (7, plain), (15, plain), (0, saving)):
        model.predict = Mock(wraps=predict)
        branches, clips = forked(model, micro)
        slope = gradient(model, adapter, branches, rewards, buffered, micro=micro)
        expected = expected or (clips, slope)
        assert torch.allclose(clips, expected[0], rtol=1e-3, atol=1e-5) and near(slope, expected[1])
        rows = [len(call.args[0]) for call in model.predict.call_args_list]
        rows += [len(call.args[1]) for call in model.extend.call_args_list]
        assert max(rows) <= (micro or 24)
        model.extend.reset_mock()


def test_lora_is_in_float32_beside_bfloat16_weights():
    model = Other().bfloat16()
    x = torch.randn(5, 2 * 192 + 1, generator=seeded(0)).bfloat16()
    adapter, layer = nonzero(Adapter.new(model, 4, 8.0, seeded(0))), model.layers[0]
    A, B = adapter.weights["layers.0"]
    delta = (x.float() @ A.T @ B.T).bfloat16()
    expected = torch.add(layer(x), delta, alpha=2)
    for mode in (torch.enable_grad, torch.no_grad):     # never merged into bfloat16
        with mode(), adapter.on(model):
            assert torch.equal(layer(x), expected) and A.dtype == torch.float32
    weight = model.float().layers[0].weight
    with torch.no_grad(), torch.autocast("cpu"), adapter.on(model):     # which is bfloat16
        merged = layer.weight
    assert torch.equal(merged, weight + 2 * B @ A)


def test_an_adapter_of_another_base_or_other_times_is_refused(tmp_path):
    model, other, slower, folder = tiny(), tiny(), tiny(), tmp_path / "semi"
    other.fingerprint, slower.timesteps = "bbbb", (1.0, 0.5)
    Adapter.new(model, 2, 2.0).save(folder, model)
    assert Adapter.load(folder, model).alpha == 2
    for place, loading, says in ((tmp_path, model, "there are .*semi$"),
                                 (folder, other, "another base .*; see --base"),
                                 (folder, slower, "another timesteps .*; see --timesteps")):
        with pytest.raises(UserError, match=says):
            Adapter.load(place, loading)


def test_lora_goes_on_the_layers_named_and_one_that_is_never_called_is_told():
    model = tiny()
    linear = {name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    assert set(Adapter.new(model, 2, 2.0).weights) == linear            # not the convolutions
    some = Adapter.new(model, 2, 2.0, targets=r"blocks\.\d+\.(qkv|out)")
    assert set(some.weights) == {f"blocks.{i}.{n}" for i in (0, 1) for n in ("qkv", "out")}
    with pytest.raises(ValueError, match="no nn.Linear"):
        Adapter.new(model, 2, 2.0, targets="smooth.*")
    model.unused = nn.Linear(2, 2).requires_grad_(False)
    with pytest.warns(UserWarning, match="layers .'unused'.: are they used without a call"):
        iterated(model, new_adapter(model))


def test_merged_adapters_equal_both_applied_also_from_the_file_and_in_peft(tmp_path):
    model = tiny()
    a = nonzero(Adapter.new(model, 4, 6.0, seeded(1), r"blocks.*|head"), 1)
    b = nonzero(Adapter.new(model, 3, 1.0, seeded(2), r"blocks.*|head"), 2)
    x, context = torch.randn(3, *model.chunk_shape), model.begin(PROMPTS)
    with a.on(model), Adapter(b.weights, 0.6 * b.alpha).on(model):
        expected = model.predict(x, 0.5, context)
    assert not torch.allclose(model.predict(x, 0.5, context), expected, atol=1e-3)
    merge_adapters((a, 1.0), (b, 0.6)).save(tmp_path / "merged", model)
    with Adapter.load(tmp_path / "merged", model).on(model):
        assert torch.allclose(model.predict(x, 0.5, context), expected, atol=1e-5)
    peft = pytest.importorskip("peft")
    theirs = peft.PeftModel.from_pretrained(model, tmp_path / "merged").base_model.model
    assert torch.allclose(theirs.predict(x, 0.5, context), expected, atol=1e-5)


def test_torch_compile_keeps_the_adapter():
    """Code that was traced with the adapter off is not used with it on, whichever was first."""
    model = tiny()
    adapter, context = nonzero(new_adapter(model)), model.begin(PROMPTS)
    x, off = torch.randn(3, *model.chunk_shape, generator=seeded(0)), nullcontext
    compiled = torch.compile(model.predict, backend="eager")
    for mode in (torch.enable_grad, torch.no_grad):
        for switch in (off, adapter.on, off, adapter.on):
            with mode(), switch(model):
                found, expected = compiled(x, 0.5, context), model.predict(x, 0.5, context)
            assert torch.allclose(found, expected, atol=1e-5)
    assert (expected - model.predict(x, 0.5, context)).abs().max() > 0.1


def test_pefts_own_lora_trains_in_place_of_adapter():
    peft = pytest.importorskip("peft")
    from examples.peft_adapter import PeftAdapter
    model, expected = tiny(), tiny()
    own = Adapter.new(expected, 2, 4.0, seeded(0), targets=r".*qkv|head")
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=r".*qkv|head", lora_dropout=0.0)
    theirs = PeftAdapter(peft.inject_adapter_in_model(config, model))
    for (A, B), layer in zip(own.weights.values(), theirs.layers, strict=True):
        layer.lora_A["default"].weight.data.copy_(A)
        layer.lora_B["default"].weight.data.copy_(B)
    rows = [iterated(expected, own), iterated(model, theirs)]
    assert rows[1]["ratio_first"] == 1 and rows[1]["grad_norm"] > 0
    assert math.isclose(rows[0]["grad_norm"], rows[1]["grad_norm"], rel_tol=1e-3)
    for p, q in zip(own.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-4)


class StandIn(nn.Module):
    """In place of WanDiffusionWrapper and of the network in it, which writes into its caches."""

    patch_size, dim, num_heads = (1, 2, 2), 16, 2
    model = property(lambda self: self)

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.into, self.out = nn.Linear(16, 16), nn.Linear(16, 16)
        self.text, self.time = nn.Linear(32, 16), nn.Linear(1, 16)
        self.blocks = nn.ModuleList(nn.Linear(16, 48) for _ in range(2))
        u = torch.linspace(1, 0, 1001)[:-1]
        self.scheduler = SimpleNamespace(sigmas=5 * u / (1 + 4 * u))

    def forward(self, x, conditional, times, kv_cache, crossattn_cache, current_start):
        t = times[..., None, None, None] / 1000
        text = self.text(conditional["prompt_embeds"]).mean(1)
        patches = F.pixel_unshuffle(x, 2).movedim(2, 4)                     # [1, F, h, w, 16]
        y = (self.into(patches) + self.time(t) + text[:, None, None, None]).flatten(1, 3)
        for block, cache in zip(self.blocks, kv_cache):
            q, k, v = block(y.tanh()).unflatten(2, (3, 2, 8)).unbind(2)
            start = cache["local_end_index"].item()
            assert start == cache["global_end_index"].item() == current_start
            cache["k"][:, start : start + y.shape[1]] = k
            cache["v"][:, start : start + y.shape[1]] = v
            q, k, v = (z.transpose(1, 2) for z in (q, cache["k"], cache["v"]))
            y = y + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        flow = F.pixel_shuffle(self.out(y).view(patches.shape).movedim(4, 2), 2)
        return flow, x - t * flow


@pytest.mark.skipif("SELF_FORCING" not in os.environ, reason="SELF_FORCING: no copy of it")
def test_the_self_forcing_example_on_its_own_code():
    """SELF_FORCING: a folder with github.com/guandeh17/Self-Forcing."""
    command = [sys.executable, "examples/self_forcing.py", "--check", os.environ["SELF_FORCING"]]
    assert "replay error" in subprocess.check_output(command, cwd=HERE, text=True)


def test_the_self_forcing_example_on_a_stand_in():
    model = SelfForcing(StandIn(), Text(), Vae(), (3, 4, 4, 4), 3)
    assert model.timesteps == pytest.approx((1, 0.9375, 0.8333, 0.625), abs=1e-4)
    context = model.extend(model.begin(["a", "b"]), torch.randn(2, 3, 4, 4, 4)).repeat(3)
    shared = [past[0][0][0].data_ptr() for past in context.pasts]
    assert len(set(shared)) == 2 and shared[0] == shared[1]     # nothing was copied
    check(model, ["a cat", "a dog", "a boat"])


def test_the_diffusers_example_on_diffusers_own_code(tmp_path, monkeypatch):
    """Also: diffusers' load_lora_weights applies an adapter as `on` does."""
    pytest.importorskip("diffusers", minversion="0.39")
    from diffusers.models.transformers import transformer_anyflow_far
    from examples import check_diffusers_far as far
    model = far.AnyFlowFAR(far.tiny((1, 3, 2)), (8, 8))
    far.compare(model, ["a cat"])
    monkeypatch.setattr(transformer_anyflow_far, "dispatch_attention_fn", far.dense)
    clips = partial(sample, model, ["a cat"], draw_noise(model, 1, seeded(0)))
    adapter, plain = nonzero(Adapter.new(model, 4, 6.0, seeded(0), r".*(attn|ffn).*")), clips()
    with torch.no_grad(), adapter.on(model):
        expected = clips()
    merge_adapters((adapter, 1.0)).save(tmp_path, model)        # α = r, as diffusers reads no α
    weights = load_file(tmp_path / "adapter_model.safetensors")
    model.outside[0].load_lora_weights({name.removeprefix(arcopo.PEFT): x
                                        for name, x in weights.items()})
    assert torch.allclose(clips(), expected, atol=1e-5) and (expected - plain).abs().max() > 0.01
    model = far.AnyFlowFAR(far.tiny((3, 3, 3)), (8, 8))
    model.decode = lambda latents: model.frames(latents).transpose(1, 2)[:, :, :3]
    check(model, ["a cat", "a dog", "a boat"], iterations=3)


def test_own_model_learns():
    before, after = own_model.main(40)
    assert after > before / 2       # the reward is at most 0


# ------------------------------------------------------------------ script

TINY = ["--group", 3, "--anchors", 2, "--prompts", 2, "--rank", 2, "--alpha", 2, "--judge-samples",
        1, "--judge-every", 2, "--floor", 1e-6]
BLUE = ["--reward", f"{__name__}:blue=1"]                               # needs no CLIP
SEMI = [*TINY, *BLUE, "--buffer-reward", BLUE[1], "--buffer-groups", 3]
RECIPE = [*SEMI, "--sweep", "0.5"]
ON = ["--method", "on-policy", *TINY, *BLUE]
LINES = {"recipe": RECIPE, "on-policy": ON}
LEFT = {"settings.json", "judged.csv", "models.gif", "report.md"}       # by each run
IMPORTING = os.environ | {"PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}    # this file, by name
little = partial(tiny, width=16, layers=1, timesteps=(1.0, 0.4))


class Crash(BaseException):
    """What kill -9 is to a process."""


def blue(clips: Tensor, prompts: list[str]) -> Tensor:
    assert clips.shape[1:] == (12, 3, 32, 32) and len(clips) == len(prompts)
    return clips[:, :, 2].mean((1, 2, 3))


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("base") / "base.safetensors"
    pretrain.save_generator(little(), file)
    return file


def hurry(patch: pytest.MonkeyPatch) -> None:
    """Few prompts, and no bars, so that stderr has the errors alone."""
    patch.setattr(arcopo, "JUDGE_PROMPTS", {k: p[:4] for k, p in reward.JUDGE_PROMPTS.items()})
    patch.setattr(arcopo, "TRAIN_PROMPTS", TRAIN_PROMPTS[:8])
    patch.setattr(arcopo, "progress", partial(arcopo.tqdm, disable=True))


@pytest.fixture
def small(base, monkeypatch) -> Path:
    """The base, in a test that is in a hurry."""
    hurry(monkeypatch)
    return base


def left(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir() if ".checkpoint.pt" not in file.name}


def ending(folder: Path) -> dict:
    """All that a run must end with, whatever happened to it: tables without seconds, adapters."""
    tables = {file.name: [row | {"seconds": ""} for row in read(file)]
              for file in sorted(folder.glob("*.csv"))}
    return tables | {str(file.relative_to(folder)): file.read_bytes()
                     for file in sorted(folder.glob("*/adapter_*"))}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, base) -> tuple[Path, str]:
    """A run with the shipped CLIP, and its stdout."""
    folder = tmp_path_factory.mktemp("recipe") / "run"
    more = ["--steps", 2, "--buffer-groups", 3, "--sweep", "0.5", "--base", base, "--out", folder]
    command = [*map(str, [sys.executable, HERE / "arcopo.py", *TINY, *more])]
    return folder, subprocess.check_output(command, cwd=folder.parent, text=True)


def test_the_recipe_writes_what_the_readme_says(recipe, base):
    folder, out = recipe
    names = [name + end for name in ("on-policy", "semi") for end in (".csv", "-curve.csv", "")]
    assert left(folder) == LEFT | {*names, "buffer", "merged"}
    rows = read(folder / "on-policy.csv")
    columns = ("step reward ta mq not_finite deviation flat_groups replay_error "
               "ratio_first clip_fraction grad_norm skipped seconds")
    assert list(rows[0]) == columns.split() == list(read(folder / "semi.csv")[0])
    assert [(row["step"], float(row["ratio_first"])) for row in rows] == [("1", 1), ("2", 1)]
    judged = read(folder / "judged.csv")
    assert [row["model"] for row in judged] == ["base", "on-policy", "semi", "s = 0.5"]
    both = [(float(row["reward"]), float(row["judge"])) for row in judged]
    s = choose_strength({0.5: both[3]}, both[0])
    assert f"| {'semi' if s is None else 's = 0.5'} * " in out and out.count(" * ") == 1
    saved = json.loads((folder / "settings.json").read_text())
    assert saved["settings"]["base"] == str(base)
    mean, std = saved["reward_scales"]["ta"]                            # the buffer: of TA alone
    buffer = [group for first in (0, 2)
              for group in torch.load(folder / "buffer" / f"{first}.pt", weights_only=True)]
    for scores in (group["scores"] for group in buffer):
        assert torch.allclose(scores["reward"], (scores["ta"] - mean) / std)
    assert len(buffer) == 3 and iio.imread(folder / "models.gif").shape[0] == 12


def test_scores_of_a_prompts_clips_and_their_change_from_the_base():
    prompts = [p for p in PROMPTS for _ in range(2)]
    clips, change = make_clips(prompts, seeded(0)), torch.randn(3, 2, generator=seeded(1))
    found, each = reward.evaluate(clips, prompts, brightness), judge(clips, prompts)
    assert torch.allclose(found["reward"], clips.mean((1, 2, 3, 4)).view(3, 2))
    half = [(each[name][::2] - each[name][1::2]) / 2 for name in "xy"]      # of two: the deviation
    assert torch.allclose(found["spread"], torch.hypot(*half)[:, None].expand(3, 2), atol=1e-4)
    trained = found | {"reward": found["reward"] + change}
    row = arcopo.judged_rows({"base": found, "trained": trained})[1]
    assert row["Δ reward"] == pytest.approx(change.mean().item(), abs=1e-6)
    assert row["± reward"] == pytest.approx(change.mean(1).std().item() / 3**0.5, rel=1e-5)


def test_clips_are_streamed_with_an_adapter(recipe, base, tmp_path, monkeypatch):
    adapter, save_gif = recipe[0] / "on-policy", Mock(wraps=arcopo.save_gif)
    line = ["--sample", PROMPTS[0], "--base", base, "--samples", 2, "--adapter", adapter,
            "--device", "cpu", "--out", tmp_path / "c.gif"]
    monkeypatch.setattr(arcopo, "save_gif", save_gif)
    assert arcopo.main(line) == 0
    assert iio.imread(tmp_path / "c.gif").shape == (12, 8 * 34, 2 * 8 * 34, 3)
    model = arcopo.load_generator(base)
    noise = draw_noise(model, 2, seeded(0, "sampling"))
    with torch.no_grad(), Adapter.load(adapter, model).on(model):
        clips = sample(model, [PROMPTS[0]] * 2, noise)
    assert torch.equal(save_gif.call_args.args[0], clips)
    assert not torch.equal(clips, sample(model, [PROMPTS[0]] * 2, noise))


def test_a_reward_of_ones_own_is_in_every_table(tmp_path, small, monkeypatch):
    """Of a module in the current folder that imports its neighbour and writes into its inputs."""
    (tmp_path / "neighbour.py").write_text("def mean(clips): return clips[:, :, 2].mean((1, 2, 3))")
    (tmp_path / "my_rewards.py").write_text(
        "def spoils(clips, prompts):\n"
        "    from neighbour import mean\n"
        "    value = mean(clips)\n"
        "    clips.zero_()\n"
        "    prompts.clear()\n"
        "    return value\n"
        "spoils.model = None\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [folder for folder in sys.path if folder])
    mine, own = "my_rewards:spoils", f"{__name__}:blue"
    more = ["--reward", f"{mine}=0.5,{own}=1", "--buffer-reward", f"{mine}=1", "--out", "run"]
    assert arcopo.main([*RECIPE, *more, "--steps", 1, "--base", small]) == 0
    for file in ("on-policy", "semi", "on-policy-curve", "semi-curve", "judged"):
        row = read(tmp_path / "run" / f"{file}.csv")[0]
        assert row[mine] == row[own] != "0.0" and "reward" in row and "vq" not in row


# ------------------------------------------------------------------ resume, torchrun, errors

@pytest.fixture(scope="module")
def whole(tmp_path_factory, base) -> dict[str, dict]:
    """The endings of runs of 3 iterations that were never killed."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        hurry(patch)
        for name, line in LINES.items():
            assert arcopo.main([*line, "--steps", 3, "--base", base, "--out", folder / name]) == 0
    return {name: ending(folder / name) for name in LINES}


def killed(main: Callable, line: list, place, name: str, call: int) -> None:
    """main(line) in a process that ends before this call of place.name."""
    deadly = Mock(wraps=getattr(place, name), side_effect=[DEFAULT] * (call - 1) + [Crash])
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Crash):
        patch.setattr(place, name, deadly)
        main(line)


@pytest.mark.parametrize("kind, place, name, call", [
    ("on-policy", os, "replace", 2), ("on-policy", arcopo, "save_whole", 1),
    ("on-policy", arcopo, "save_whole", 2), ("on-policy", arcopo, "save_file", 2),
    ("on-policy", arcopo, "iterate", 3), ("on-policy", arcopo, "write_report", 1),
    ("recipe", arcopo, "save_whole", 6), ("recipe", arcopo, "save_whole", 8),
    ("recipe", arcopo, "write_report", 1)])
def test_a_killed_run_ends_as_if_it_never_was(kind, place, name, call, tmp_path, small, whole):
    line = [*LINES[kind], "--steps", 3, "--base", small, "--out", tmp_path / "run"]
    killed(arcopo.main, line, place, name, call)
    assert arcopo.main(["--resume", tmp_path / "run"]) == 0
    assert ending(tmp_path / "run") == whole[kind]


def test_a_run_can_be_extended(tmp_path, small, whole, capsys):
    """It equals one that was long from the start: the point of the curve at the old end is gone."""
    out = tmp_path / "run"
    assert arcopo.main([*RECIPE, "--steps", 1, "--base", small, "--out", out]) == 0
    assert [row["step"] for row in read(out / "semi-curve.csv")] == ["0", "1"]
    killed(arcopo.main, ["--resume", out, "--steps", 3], arcopo, "iterate_buffered", 2)
    assert arcopo.main(["--resume", out]) == 0
    assert ending(out) == whole["recipe"]
    assert refused(["--resume", out, "--steps", 2], "3 are done; --resume it", capsys)


def test_a_killed_run_can_be_ended_where_it_stopped(tmp_path, small):
    """With the adapter and the point of the curve of its last iteration."""
    line = [*ON, "--base", small, "--judge-every", 9, "--steps"]
    killed(arcopo.main, [*line, 4, "--out", tmp_path / "run"], arcopo, "iterate", 3)
    assert arcopo.main(["--resume", tmp_path / "run", "--steps", 2]) == 0
    assert arcopo.main([*line, 2, "--out", tmp_path / "short"]) == 0
    assert ending(tmp_path / "run") == ending(tmp_path / "short")


def test_a_reward_that_fails_once_costs_one_iteration(tmp_path, small, whole, monkeypatch):
    """The base's clips, the judging at step 0 and iteration 1 are its calls before."""
    out, failing = tmp_path / "run", [DEFAULT] * 3 + [RuntimeError("no connection")]
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules[__name__], "blue", Mock(wraps=blue, side_effect=failing))
        assert arcopo.main([*ON, "--steps", 3, "--base", small, "--out", out]) == 2
    saved = torch.load(out / "on-policy.checkpoint.pt", weights_only=True)
    assert len(saved["rows"]) == 1
    assert arcopo.main(["--resume", out]) == 0
    assert ending(out) == whole["on-policy"]


def test_tables_are_appended_to(tmp_path, small, monkeypatch):
    """Each iteration deletes the table: former rows are not written again."""
    table = tmp_path / "run" / "on-policy.csv"
    deleting = Mock(wraps=arcopo.iterate, side_effect=lambda *a, **k: table.unlink() or DEFAULT)
    monkeypatch.setattr(arcopo, "iterate", deleting)
    assert arcopo.main([*ON, "--steps", 3, "--base", small, "--out", table.parent]) == 0
    assert [row["step"] for row in read(table)] == ["3"]


def content(folder: Path) -> dict:
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def refused(line: list, says: str, capsys) -> bool:
    """Whether main(line) ends with exit code 2 and one line on stderr."""
    capsys.readouterr()
    code = arcopo.main(line)
    out, error = capsys.readouterr()
    assert error.startswith("arcopo: ") and error.count("\n") == 1 and says in error and not out
    return code == 2


def test_resume_takes_settings_of_the_machine_alone(tmp_path, small, capsys, monkeypatch):
    """In another folder. The run died in its second iteration, and keeps its reward's scales."""
    out, own = tmp_path / "run", Path(shutil.copy(small, tmp_path))
    monkeypatch.chdir(tmp_path)
    line = [*ON, "--base", own.name, "--out", out]
    killed(arcopo.main, [*line, "--steps", 2], arcopo, "iterate", 2)
    before = content(out)
    assert refused(line, f"--out {out}", capsys)
    monkeypatch.chdir(small.parent)
    for other in ("--lr 0.1", "--group 4", "--reward ta=1", "--method semi",
                  "--base base.safetensors", "--sweep 3"):
        assert refused(["--resume", out, *other.split()], other.split()[0], capsys)
    assert refused(["--resume", tmp_path], f"--resume {tmp_path}", capsys)
    pretrain.save_generator(little(flow=True), own)
    assert refused(["--resume", out], "the weights of --base have changed", capsys)
    shutil.copy(small, own)
    assert content(out) == before
    monkeypatch.setattr(WeightedReward, "measure_scales", None)
    assert arcopo.main(["--resume", out, *"--micro 2 --device cpu --judge-samples 2".split()]) == 0
    assert len(read(out / "on-policy.csv")) == 2
    assert float(read(out / "judged.csv")[0]["spread"]) >= 0            # of two clips
    assert "since --resume" in (out / "report.md").read_text(encoding="utf-8")


def test_a_run_that_is_killed_by_a_signal_resumes(tmp_path, base):
    line, out = [*ON, "--base", base, "--steps"], tmp_path / "run"
    command = [sys.executable, HERE / "arcopo.py", *line, 1000, "--out", out]
    process = subprocess.Popen([*map(str, command)], env=IMPORTING, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    table = out / "on-policy.csv"
    while process.poll() is None and not (table.exists() and len(read(table)) > 1):
        time.sleep(0.02)
    process.kill()
    assert process.wait(timeout=60) == -9
    saved = torch.load(out / "on-policy.checkpoint.pt", weights_only=True)
    steps = len(saved["rows"]) + 1
    assert arcopo.main(["--resume", out, "--steps", steps]) == 0
    assert arcopo.main([*line, steps, "--out", tmp_path / "whole"]) == 0
    assert ending(out) == ending(tmp_path / "whole")


def change_by_updates(groups: slice, broken: bool = False) -> Tensor:
    """Of all parameters, by two updates on these of four groups; broken: the last one overflows."""
    model = tiny()
    adapter, rewards = nonzero(new_adapter(model)), torch.randn(4, 4, generator=seeded(2))
    flat = lambda: torch.cat([p.detach().flatten() for p in adapter.parameters()])
    start, branches = flat(), forked(model, prompts=TRAIN_PROMPTS[:4])[0]
    if broken:
        branches.candidates[-1] = 1e30
    branches = of_prompts(branches, [*range(4)[groups]])
    row = updated(model, adapter, branches, rewards[groups], lr=1.0)
    assert row["skipped"] == broken
    return flat() - start


def one_of_two_processes() -> None:
    """What each process does in the test below, started by torchrun."""
    folder, base = map(Path, sys.argv[1:])
    alone = change_by_updates(slice(4))
    torch.distributed.init_process_group("gloo")
    own = slice(2 * arcopo.RANK, 2 * arcopo.RANK + 2)
    change, of_rank_0 = change_by_updates(own), torch.empty_like(alone)
    assert alone.abs().max() > 1e-4 and torch.allclose(change, alone, rtol=1e-3, atol=1e-6)
    torch.distributed.broadcast(of_rank_0.copy_(change), 0)
    assert torch.equal(change, of_rank_0) and not change_by_updates(own, broken=True).any()
    line = [*RECIPE, "--steps", 2, "--base", base, "--device", "cpu", "--out"]
    hurry(pytest.MonkeyPatch())
    assert arcopo.main([*line, folder / "whole"]) == 0
    torch.distributed.barrier()
    killed(arcopo.main, [*line, folder / "killed"], arcopo, "iterate_buffered", 2)
    torch.distributed.barrier()
    assert arcopo.main(["--resume", folder / "killed"]) == 0
    torch.distributed.destroy_process_group()


def test_two_processes_are_one_with_the_groups_of_both(tmp_path, small, capsys):
    """A gradient that is not finite on one skips the update on both; one writes."""
    start = f"import {__name__} as tests; tests.one_of_two_processes()"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               "--no-python", sys.executable, "-c", start, tmp_path, small]
    out = subprocess.check_output(command, env=IMPORTING, text=True)
    whole = ending(tmp_path / "whole")
    assert whole == ending(tmp_path / "killed") and len(whole["on-policy.csv"]) == 2
    assert {float(row["ratio_first"]) for row in whole["on-policy.csv"]} == {1.0}
    assert out.count("Run folder") == 2                     # of one process, in two runs
    alone = tmp_path / "alone"
    assert arcopo.main([*ON, "--steps", 2, "--base", small, "--out", alone]) == 0
    assert read(alone / "on-policy.csv")[0]["reward"] != whole["on-policy.csv"][0]["reward"]
    assert refused(["--resume", tmp_path / "whole"], "as many processes as before, 2", capsys)


def test_a_buffered_method_runs_alone_also_with_a_flow_model(tmp_path, small):
    flow, out = tmp_path / "flow.safetensors", tmp_path / "run"
    pretrain.save_generator(little(flow=True), flow)
    assert arcopo.main([*SEMI, "--method", "semi", "--steps", 1, "--base", flow, "--out", out]) == 0
    assert left(out) == LEFT | {"semi", "semi.csv", "semi-curve.csv", "buffer"}
    assert [row["model"] for row in read(out / "judged.csv")] == ["base", "semi"]


@pytest.mark.parametrize("change", [2, -2])
def test_the_report_says_if_the_choice_is_worse_than_the_base(change, tmp_path, capsys):
    zeros = {name: torch.zeros(24, 1) for name in ("reward", "judge", "all_right", "area")}
    moved = change + torch.randn(24, 1, generator=seeded(0))
    scores = {"base": zeros, "semi": zeros | {"reward": moved, "judge": moved}}
    clips = {name: torch.zeros(24, 12, 3, 32, 32) for name in scores}
    judged = arcopo.judged_rows(scores)
    arcopo.write_report(tmp_path, tiny_settings(judge_samples=1), clips, judged, 1.0, "semi")
    report = capsys.readouterr().out
    assert ("Semi alone does not either" in report) == (change < 0)
    assert max(map(len, report.splitlines())) <= 100 and "Δ judge" in report


@pytest.mark.parametrize("value", [0.1, math.nan])
def test_rewards_that_never_vary_are_told(value, tmp_path, small, monkeypatch, capsys):
    """Twelve times 0.1 has a mean that is not exact."""
    plain = WeightedReward.__call__
    monkeypatch.setattr(WeightedReward, "__call__", lambda *a: {
        name: torch.full_like(x, value) for name, x in plain(*a).items()})
    line = [*ON, "--group", 12, "--steps", 1, "--base", small, "--out", tmp_path / "run"]
    assert refused(line, "on-policy learned nothing", capsys)
    assert read(tmp_path / "run" / "on-policy.csv")[0]["flat_groups"] == "1.0"


def test_metrics_are_means_over_the_updates_that_have_rewards():
    rows = [{"reward": torch.tensor(x)} for x in (1.0, math.nan, 2.0)]
    assert arcopo.average_rows(rows) == {"reward": 1.5}


def test_rewards_that_are_not_finite_are_reported(tmp_path, small, monkeypatch, capsys):
    plain = WeightedReward.__call__
    monkeypatch.setattr(WeightedReward, "__call__", lambda *a: {
        name: x.index_fill(0, torch.tensor(0, device=x.device), math.nan)
        for name, x in plain(*a).items()})
    assert arcopo.main([*ON, "--steps", 2, "--base", small, "--out", tmp_path / "run"]) == 2
    first, last = capsys.readouterr().err.splitlines()
    assert first == (
        "on-policy: rewards or updates that were not finite were left out; see on-policy.csv")
    assert last.startswith("arcopo: scores of base, on-policy are not finite (")


IN_A_GRAPH = RuntimeError("CUDA error: operation failed due to a previous error during capture")
IN_A_GRAPH.__context__ = torch.OutOfMemoryError("CUDA out of memory.")


@pytest.mark.parametrize("error, code, says", [
    (IN_A_GRAPH, 2, "--micro"),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"), 2, "out of memory ("),
    (RuntimeError("CUDA error: out of memory\nCompile with TORCH_USE_CUDA_DSA"), 2, "--micro"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 2, "--micro"),
    (RuntimeError("DefaultCPUAllocator: not enough memory"), 2, "--micro"),
    (MemoryError(), 2, "--micro"), (KeyboardInterrupt(), 130, "interrupted")])
def test_no_memory_and_ctrl_c_are_one_line(error, code, says, tmp_path, small, monkeypatch, capsys):
    monkeypatch.setattr(arcopo, "iterate", Mock(side_effect=error))
    out = tmp_path / "run"
    assert arcopo.main([*ON, "--base", small, "--out", out]) == code
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("arcopo: ") and says in line
    assert line.endswith(f"; continue with --resume {out}")


def test_a_stdout_that_was_closed_is_no_error(tmp_path, base, monkeypatch, capsys):
    """As by `| head`: what is left is flushed when Python ends."""
    reading, writing = os.pipe()
    os.close(reading)
    monkeypatch.setattr(sys, "stdout", open(writing, "w"))
    line = ["--sample", PROMPTS[0], "--base", base, "--device", "cpu", "--out", tmp_path / "c.gif"]
    assert arcopo.main(line) == 0
    sys.stdout.flush()
    assert not capsys.readouterr().err


@pytest.mark.parametrize("line, says", [
    ("--bogus 3", "--bogus"), ("--lr nan", "--lr nan"), ("--group 1", "at least 2"),
    ("--prompts 97", "--prompts 97"), ("--method grpo", "on-policy"), ("--device tpu9", "tpu9"),
    ("--samples 2", "no effect with"), ("--method semi --lr 0.1", "no effect with"),
    ("--reward ta=1,zz=2", "ta, vq, mq"), ("--reward no_such_module:f=1", "ModuleNotFoundError"),
    ("--reward reward:f=1", "rename your file"), ("--clip missing --reward ta=1", "open_clip"),
    ("--clip ViT-B-32:pickled.pt --reward ta=1", "open_clip"), ("--base pickled.pt", "--base"),
    ("--base none", "--base"), ("--base old", "--base"), ("--sample EMPTY", "--sample: is empty"),
    ("--sample purple", "COLOUR one of red"), ("--sample PROMPT --out clip.png", "a .gif file"),
    ("--out pickled.pt/run", "pickled.pt"), ("--sample PROMPT --adapter broken", "no adapter of")])
def test_bad_input_is_one_line_and_writes_nothing(line, says, tmp_path, small, capsys, monkeypatch):
    """Also weights that are a pickle, which is not loaded."""
    class Runs:
        def __reduce__(self):
            return (tmp_path / "ran").touch, ()

    monkeypatch.chdir(tmp_path)
    torch.save(Runs(), "pickled.pt")
    save_file({}, "old", {"arcopo": json.dumps({"record": {"generator": {}}})})   # lacks weights
    Adapter.new(little(), 2, 2.0).save("broken", little())
    Path("broken/adapter_model.safetensors").write_bytes(b"")
    before = content(tmp_path)
    given = [{"PROMPT": PROMPTS[0], "EMPTY": ""}.get(word, word) for word in line.split()]
    assert refused([*SEMI, "--base", small, *given], says, capsys)      # the last value counts
    assert content(tmp_path) == before


# ------------------------------------------------------------------ sources, help and README

def test_lines_of_text_fit_100_columns():
    """Those of code are checked by ruff, in .ci/run."""
    for file in (HERE / "README.md", HERE / "studies" / "EVIDENCE.md"):
        for line in file.read_text(encoding="utf-8").splitlines():
            assert len(line) <= 100, (file, line)


def test_help_tells_every_setting_and_the_papers_value(capsys):
    with pytest.raises(SystemExit, match="0"):
        arcopo.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for f in fields(Settings):
        assert f"{arcopo.flag(f.name)} " in text and f.metadata["text"][:20] in text
        assert not f.metadata["paper"] or f"(paper: {f.metadata['paper']})" in text


def test_readme_names_what_exists():
    """The code in its tables, its options and links, and the commands that are timed."""
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    symbols = re.findall(r"^\|.*(?:Eq|Alg|Sec)\..*", readme, re.MULTILINE)
    names = {name for row in symbols for name in re.findall(r"`([A-Za-z_][\w.]*)`", row)}
    assert len(names) > 10
    for name in names:
        home = arcopo if hasattr(arcopo, name.split(".")[0]) else reward
        assert attrgetter(name)(home) is not None, name
    known = {arcopo.flag(f.name) for f in fields(Settings)}
    known |= {"--help", "--nproc-per-node", "--check"}      # of argparse, torchrun and examples/
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", readme)) <= known
    assert all(f"python {line} " in readme for line in measure.COMMANDS.values())
    for page in tables.FILES:
        for link in re.findall(r"\]\((?!http)([^)#\s]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), (page, link)


def test_the_readmes_python_runs(recipe, base):
    """Its blocks, with the small base and run; a block may use those before it."""
    blocks = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.DOTALL)
    code = "\n".join(blocks).replace("runs/smoke", str(recipe[0]))
    code = code.replace("load_generator()", f"load_generator({str(base)!r})")
    assert blocks and subprocess.check_output([sys.executable, "-c", code], cwd=HERE, text=True)


# ------------------------------------------------------------------ studies, published rewards

def test_sde_ascends_the_log_densities_of_its_re_noisings():
    """Branches differ in the solver noise alone. The first step, where all ratios are 1."""
    model, adapter = tiny(), nonzero(new_adapter(tiny()))
    noise = draw_noise(model, 3, seeded(0))
    initial, solver = sde_grpo.branch_noise(noise, 1, 4, seeded(0, 1))
    related = torch.corrcoef(solver.transpose(0, 1).flatten(1)) - torch.eye(4)
    assert related.abs().max() < 0.02 and abs(solver.std() - 1) < 0.02
    with torch.no_grad(), adapter.on(model):
        branches, clips = fork(model, PROMPTS, 1, noise, initial, solver)
    assert torch.equal(branches.states[:, 0], noise.initial[:, 1, None].expand(initial.shape))
    scores, J = clips.flatten(2).mean(2), 0
    advantages = group_advantages(scores, 0, tiny_method().floor)
    found = sde_grpo.log_densities(model, branches, branches.candidates[:, :-1])
    for i, (t, t_next) in enumerate(zip(model.timesteps, model.timesteps[1:])):
        with adapter.on(model):
            x0 = model.predict(branches.states[:, i].flatten(0, 1), t, branches.context.repeat(4))
        policy = Normal((1 - t_next) * x0, t_next)
        density = policy.log_prob(branches.states[:, i + 1].flatten(0, 1)).flatten(1).mean(1)
        assert torch.allclose(found[:, i].flatten(), density, atol=1e-4)
        J = J + (density.view(3, 4) * advantages).mean() / 3
    gradients = torch.autograd.grad(J, adapter.parameters())
    optimizer = torch.optim.SGD(adapter.parameters(), 0.0)
    row = sde_grpo.update(model, adapter, optimizer, branches, scores, tiny_method(updates=1))
    assert row["ratio_first"] == 1 and row["replay_error"] < 1e-4 and row["clip_fraction"] == 0
    for p, expected in zip(adapter.parameters(), gradients):        # descent on -J
        assert torch.allclose(-p.grad, expected, rtol=1e-3, atol=1e-6)


def test_a_run_of_the_baseline_writes_its_files_and_resumes(tmp_path, small):
    line = ["--group", 3, *TINY[4:], *BLUE, "--steps", 2, "--base", small, "--out"]
    assert sde_grpo.main([*line, tmp_path / "whole"]) == 0
    assert left(tmp_path / "whole") == LEFT | {"sde-grpo", "sde-grpo.csv", "sde-grpo-curve.csv"}
    assert [row["ratio_first"] for row in read(tmp_path / "whole" / "sde-grpo.csv")] == ["1.0"] * 2
    killed(sde_grpo.main, [*line, tmp_path / "killed"], sde_grpo, "iterate", 2)
    assert sde_grpo.main(["--resume", tmp_path / "killed"]) == 0
    assert ending(tmp_path / "killed") == ending(tmp_path / "whole")
    assert arcopo.main(["--resume", tmp_path / "whole"]) == 2           # of another program
    without_noise = [*line, tmp_path / "other", "--timesteps", "1"]
    assert sde_grpo.main(without_noise) == 2 and not (tmp_path / "other").exists()


def test_entropy_changes_only_where_noise_is_redrawn(tmp_path, base, monkeypatch):
    """Of the first branch of a group each; all else is the rollout's noise."""
    monkeypatch.setattr(measure, "HELD_OUT_PROMPTS", PROMPTS)
    spy = Mock(wraps=fork)
    monkeypatch.setattr(measure, "fork", spy)
    assert measure.main(["--what", "entropy", "--base", base, "--out", tmp_path / "run"]) == 0
    rows = read(tmp_path / "run" / "entropy.csv")
    assert len(rows) == len(spy.mock_calls) == 2 * CHUNKS       # the initial and the solver noise
    for row, call in zip(rows, spy.mock_calls):
        pivot, noise, initial, solver = call.args[2:]
        redrawn = [x.std(1).min() > 0 for x in (initial, solver)]
        assert redrawn == [row["source"] == "initial noise", row["source"] == "solver noise 1"]
        shared = (noise.solver, solver) if redrawn[0] else (noise.initial, initial)
        assert torch.equal(shared[0][:, pivot], shared[1][:, 0])
        assert int(row["pivot"]) == pivot + 1 and float(row["deviation"]) > 1e-4, row


def test_the_base_study_measures_groups_by_pivot(tmp_path, small, monkeypatch):
    both = torch.tensor([[0.1, 0.9], [0.5, 0.2]])
    assert measure.correlation(both, 3 - both) == pytest.approx(-1)
    monkeypatch.setattr(measure, "HELD_OUT_PROMPTS", PROMPTS)
    assert measure.main(["--what", "base", "--group", 4, "--base", small, "--out", tmp_path]) == 0
    found = {(row["subject"], row["measure"]): row["value"] for row in read(tmp_path / "base.csv")}
    for pivot in (f"pivot {p + 1}" for p in range(CHUNKS)):
        assert float(found[pivot, "deviation of ta"]) > 0 and (pivot, "area and light") in found


def test_the_base_study_counts_errors_and_orders_by_auc(monkeypatch):
    """Two right clips, two of a wrong colour, one of a wrong shape and motion, an empty one. TA
    prefers other colours and shapes in the first and third."""
    colour, shape = torch.tensor([1, 1, 0, 0, 1, 0.0]), torch.tensor([1, 1, 1, 1, 0, 0.0])
    scores = {"colour": colour, "shape": shape, "direction": shape, "all_right": colour * shape,
              "visual": torch.tensor([0.6, 0.8, 0, 0, 0, 0]), "motion_quality": colour}
    monkeypatch.setattr(measure, "sample_batches", lambda *a: torch.zeros(6))
    monkeypatch.setattr(measure, "judge", lambda *a: scores)
    monkeypatch.setattr(measure, "HELD_OUT_PROMPTS", TRAIN_PROMPTS[:1] * 6)
    ta, others = torch.tensor([[0.9, 0.4, 0.5, 0.1, 0.0, 0.0], [1.0, 0.0, 1.0, 0.0, -1.0, -1.0]])
    reward = lambda clips, texts: {"ta": ta if texts[0] == TRAIN_PROMPTS[0] else others}
    found = measure.errors(tiny(), reward, tiny_settings(judge_samples=1))
    assert found["empty"] == found["wrong for judge and CLIP"] == pytest.approx(1 / 6)
    assert found["crosses of wrong shapes"] == 0            # all are circles
    assert found["AUC, colour"] == 0.75
    assert found["visual if right"] == pytest.approx(0.7)
    assert found["AUC, shape"].isnan()


def test_the_cost_study_counts_every_part(tmp_path, base, monkeypatch):
    """What it counts is the number of rows that pass the network, three times with a gradient."""
    monkeypatch.setattr(measure, "ROUNDS", 1)
    line = ["--what", "cost", "--base", base, *TINY[:8], "--updates", 1, "--out", tmp_path]
    assert measure.main(line) == 0
    assert len(read(tmp_path / "cost.csv")) == 2 * CHUNKS + 4
    model, predicted = arcopo.load_generator(base), []
    once = model.modulation                             # called once in a pass
    once.register_forward_hook(lambda module, given, found: predicted.append(len(given[0])))
    once.register_full_backward_pre_hook(               # a backward pass counts twice
        lambda module, gradients: predicted.append(2 * len(gradients[0])))
    for name, (call, count) in measure.parts(model, tiny_settings()).items():
        predicted.clear()
        call()
        assert sum(predicted) == count, name


def test_merging_appends_the_scaled_adapter_to_the_recipes_table(recipe, tmp_path, monkeypatch):
    folder = shutil.copytree(recipe[0], tmp_path / "run")
    monkeypatch.setattr(merging, "run", lambda settings: None)
    assert merging.main(["--resume", folder]) == 0
    rows = {row["model"]: row for row in read(folder / "judged.csv")}
    assert list(rows) == ["base", "on-policy", "semi", "s = 0.5", "on-policy x 0.5"]
    moved = [float(rows[name]["Δ reward"]) for name in ("on-policy x 0.5", "on-policy")]
    assert 0 < abs(moved[0]) < abs(moved[1])


def test_claims_resumes(tmp_path, small, monkeypatch):
    """What is in the CSVs is not run again; a run that was interrupted leaves nothing there."""
    calls, out = [], tmp_path / "out"

    def run(words: list, **kwargs) -> SimpleNamespace:
        calls.append(words)
        code = 1 if len(calls) == 2 else arcopo.main([*words[2:], *TINY])
        return SimpleNamespace(returncode=code)

    monkeypatch.setattr(claims, "subprocess", SimpleNamespace(run=run))
    monkeypatch.setattr(claims, "RUNS", [
        claims.Run("C1 C2", "ta", "python arcopo.py --method on-policy --seed S --steps 1"),
        claims.Run("C9", "other", "python none.py")])
    line = ["C1", "--seeds", 2, "--out", out, "--extra", f"--base {small} {' '.join(BLUE)}"]
    assert claims.main(line) == 2 and claims.main(line) == 0
    assert [(row["run"], row["seed"], row["model"]) for row in read(out / "results.csv")] == [
        ("ta", seed, model) for seed in "01" for model in ("base", "on-policy")]
    assert [row["step"] for row in read(out / "curves.csv")] == ["0", "1"] * 2
    before = content(out)
    assert claims.main(line) == claims.main(["C2", *line[1:]]) == 0
    assert len(calls) == 3 and calls[1] == calls[2] and content(out) == before


def test_the_tables_of_readme_and_evidence_are_those_of_the_csvs(tmp_path, monkeypatch, capsys):
    assert tables.main(["--check"]) == 0, capsys.readouterr().err
    text = "".join(file.read_text(encoding="utf-8") for file in tables.FILES)
    names = re.findall(r"<!-- (\w+) -->.*?<!-- end -->", text, re.DOTALL)
    assert set(names) == set(tables.TABLES) and len(names) == text.count("<!-- end -->")
    page, empty = tmp_path / "page.md", "In\n<!-- cost -->\n<!-- end -->\n"
    monkeypatch.setattr(tables, "FILES", [page])
    page.write_text(empty)
    assert tables.main(["--check"]) == 2 and page.read_text() == empty
    assert tables.main([]) == tables.main(["--check"]) == 0
    assert f"<!-- cost -->\n{tables.cost()}\n<!-- end -->" in page.read_text(encoding="utf-8")


def test_figures_draws_every_plot_from_the_shipped_csvs(tmp_path):
    pytest.importorskip("matplotlib")
    from studies import figures
    assert figures.main(["--out", tmp_path]) == 0
    shown = {Path(link).name for file in tables.FILES
             for link in re.findall(r"!\[[^]]*\]\(([^)]+)\)", file.read_text(encoding="utf-8"))}
    drawn = {file.name for file in tmp_path.iterdir()}
    assert shown == drawn | {"fork.png", "clips.gif"}                   # which need a run


def test_pretraining_killed_and_resumed_is_the_same_bit_for_bit(tmp_path, monkeypatch):
    few = ["--clip-steps", 2, "--teacher-steps", 4, "--student-steps", 4, "--device", "cpu",
           "--out"]
    whole, again = tmp_path / "whole", tmp_path / "again"
    monkeypatch.setattr(pretrain, "SAVE_EVERY", 2)
    monkeypatch.setattr(pretrain, "BATCH", 2)
    monkeypatch.setattr(pretrain, "Generator", partial(Generator, 16, 1, 1))
    assert pretrain.main([*few, whole]) == 0
    for call in (4, 6):                         # step 4 of the teacher, then of the student
        killed(pretrain.main, [*few, again], pretrain, "draw_batch", call)
    assert pretrain.main([*few, again]) == 0
    assert ending(whole) == ending(again) and len(read(whole / "student.csv")) == 4
    for name, flow in (("teacher.safetensors", True), ("base.safetensors", False)):
        assert (whole / name).read_bytes() == (again / name).read_bytes()
        assert arcopo.load_generator(whole / name).flow == flow
    assert pretrain.main([*few, again, "--seed", 1]) == 2
    clip = ClipReward(str(again / "clip"))
    assert clip.text_alignment(make_clips(PROMPTS, seeded(0)), PROMPTS).isfinite().all()
    assert pretrain.main([*few, tmp_path / "other", "--wrong-captions", 2]) == 2
    assert not (tmp_path / "other").exists()


def test_wrong_captions_show_another_colour_or_shape():
    for share in (0, 1):
        shown = pretrain.wrong_captions(TRAIN_PROMPTS, share, seeded(0))
        differ = reward.attributes(shown) != reward.attributes(TRAIN_PROMPTS)
        assert set(shown) <= set(TRAIN_PROMPTS) and (differ.sum(1) == share).all()
        colours, shapes, motions = differ.sum(0)
        assert motions == 0 and min(colours, shapes) >= 20 * share


@torch.no_grad()
def test_hps_is_a_cosine_on_whole_frames_and_aesthetic_laions_head(tmp_path, monkeypatch):
    import open_clip
    config = json.loads((reward.ASSETS / "clip" / "open_clip_config.json").read_text())
    (tmp_path / "tiny-h.json").write_text(json.dumps(config["model_cfg"] | {"embed_dim": 768}))
    open_clip.add_model_config(tmp_path / "tiny-h.json")
    monkeypatch.setattr(rewards, "MODELS", tmp_path)
    for name in ("hps_model", "aesthetic_model"):       # without their cache
        plain = getattr(rewards, name).__wrapped__
        monkeypatch.setattr(rewards, name, partial(plain, architecture="tiny-h"))
    torch.manual_seed(0)
    model, clips = open_clip.create_model("tiny-h").eval(), make_clips(PROMPTS, seeded(0))
    with pytest.raises(UserError, match="HPSv2"):
        rewards.hps(clips, PROMPTS)
    own = {"epoch": 3, "state_dict": model.state_dict()}
    torch.save(own, tmp_path / "HPS_v2.1_compressed.pt")
    texts = model.encode_text(open_clip.get_tokenizer("tiny-h")(PROMPTS), normalize=True)
    wide = clips[..., 8:24, :]
    for given, seen in ((clips, clips), (wide, F.pad(wide, (0, 0, 8, 8)))):
        frames = unit_features(model, seen).view(3, 12, -1)
        expected = torch.einsum("nfd,nd->nf", frames, texts).mean(1)
        assert torch.allclose(rewards.hps(given, PROMPTS), expected, atol=1e-5)
    save_file(model.state_dict(), tmp_path / "vit_large_patch14_clip_224.openai.safetensors")
    drop, linear = nn.Dropout(), nn.Linear
    head = nn.Sequential(linear(768, 1024), drop, linear(1024, 128), drop, linear(128, 64), drop,
                         linear(64, 16), linear(16, 1)).eval()
    weights = {f"layers.{name}": x for name, x in head.state_dict().items()}
    torch.save(weights, tmp_path / "sac+logos+ava1-l14-linearMSE.pth")
    expected = head(unit_features(model, clips)).view(3, 12).mean(1)
    assert torch.allclose(rewards.aesthetic(clips, PROMPTS), expected, atol=1e-5)
