"""pytest: tests by equivalence; no network, no GPU (tests that need one skip themselves)."""

import copy
import csv
import errno
import fcntl
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import replace
from functools import partial
from operator import attrgetter
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import NamedTuple

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import arcopo
import reward
from arcopo import (Adapter, Fork, Generator, Method, Settings, choose_strength, clipped_objective,
                    collect_buffer, denoise, draw_from, draw_noise, explore, fork, group_advantages,
                    iterate, load_buffer, merge_adapters, methods, neighbor_noise, replay, sample,
                    sample_batches, save_buffer, seeded, surrogate_log_policy, update)
from reward import (CHUNKS, HELD_OUT_PROMPTS, QUALITIES, TRAIN_PROMPTS, ClipReward, UserError,
                    WeightedReward, judge, make_clips)
from studies import cost, entropy, pretrain, sde_grpo, train_clip
from studies.pretrain import encode, save_generator
from studies.sde_grpo import gaussian_log_density

HERE = Path(__file__).resolve().parent
PROMPTS = TRAIN_PROMPTS[:3]


def tiny(seed: int = 0, bf16: bool = False, flow: bool = False) -> Generator:
    torch.manual_seed(seed)
    model = Generator(width=32,
                      layers=2,
                      heads=2,
                      timesteps=(1.0, 0.6, 0.33, 0.14),
                      flow=flow,
                      bf16=bf16).requires_grad_(False)
    nn.init.normal_(model.head.weight, std=0.1)
    nn.init.normal_(model.patch.weight, std=0.2)  # so that the noise, not only the prompt, decides
    return model


def nonzero(adapter: Adapter, seed: int = 1) -> Adapter:
    for A, B in adapter.weights.values():
        B.data.copy_(0.1 * torch.randn(B.shape, generator=seeded(seed)))
    return adapter


def forked(model: Generator,
           pivot: int,
           sigma: float = 0.5,
           group: int = 4,
           seed: int = 0,
           method: str = "on-policy"):
    noise = draw_noise(model, len(PROMPTS), seeded(seed))
    own = tiny_method(method, group=group,
                      sigma=max(sigma, 1e-30)).branch_noise(noise, pivot, seeded(seed, 1))
    return fork(model, PROMPTS, pivot, noise, *own)


def tiny_settings(**changes) -> Settings:
    small = {"group": 4, "anchors": 2, "prompts": 2, "rank": 4, "alpha": 4.0, "clip_range": 1e-2}
    return Settings(**(small | changes))


def tiny_method(name: str, **changes):
    settings = tiny_settings(**changes)
    return (methods(settings) | {"sde-grpo": sde_grpo.sde_grpo(settings)})[name]


# ------------------------------------------------------------------ world, judge, reward


def test_split_is_fixed_and_disjoint():
    assert (len(TRAIN_PROMPTS) == 96 and len(HELD_OUT_PROMPTS) == 24
            and not set(TRAIN_PROMPTS) & set(HELD_OUT_PROMPTS))
    for words in (reward.COLOURS, reward.SHAPES, reward.MOTIONS):
        for word in words:
            assert any(word in p for p in TRAIN_PROMPTS) and any(word in p
                                                                 for p in HELD_OUT_PROMPTS)
    validation = reward.JUDGE_PROMPTS["training"]          # as balanced as those held out
    assert set(validation) <= set(TRAIN_PROMPTS)
    for words in (reward.COLOURS, reward.SHAPES):
        for word in words:
            one, other = (sum(word in p for p in part) for part in (validation, HELD_OUT_PROMPTS))
            assert one == other


def test_judge_is_near_perfect_on_the_sharp_world():
    prompts = (TRAIN_PROMPTS + HELD_OUT_PROMPTS) * 2
    scores = judge(make_clips(prompts, seeded(0), "sharp"), prompts)
    assert scores["all_right"].mean() > 0.99
    assert scores["visual"].min() > 0.9 and scores["visual"].mean() > 0.97
    assert scores["motion_quality"].min() > 0.85 and scores["motion_quality"].mean() > 0.95


def test_judge_is_low_on_the_wrong_prompt():
    right = [reward.prompt_of(c, s, m) for c, s, m in reward.TRIPLES]
    wrong = [reward.prompt_of((c + 1) % 6, (s + 1) % 4, (m + 1) % 5) for c, s, m in reward.TRIPLES]
    scores = judge(make_clips(right, seeded(0), "sharp"), wrong)
    for name in ("colour", "shape", "direction", "text", "all_right"):
        assert scores[name].mean() < 0.02


@pytest.mark.parametrize("quality, visual, motion", [("blurry", 0.8, 1), ("noisy", 0.3, 0.7),
                                                     ("dim", 0.55, 1), ("flickering", 0.7, 0.55)])
def test_judge_is_low_on_degraded_clips(quality, visual, motion):
    """Blur, noise and dimming lower visual; noise and flicker lower motion; text stays right."""
    scores = judge(make_clips(TRAIN_PROMPTS, seeded(0), quality), TRAIN_PROMPTS)
    sharp = judge(make_clips(TRAIN_PROMPTS, seeded(0), "sharp"), TRAIN_PROMPTS)
    assert (scores["visual"].mean() < visual and scores["motion_quality"].mean() < motion
            and scores["text"].mean() > 0.95)
    assert (scores["visual"] < sharp["visual"] - 0.1).all()


def test_judge_gives_nothing_for_empty_and_frozen_clips():
    empty = judge(torch.full((2, 12, 3, 32, 32), 0.06), PROMPTS[:2])
    assert all(empty[name].max() == 0 for name in ("text", "all_right", "visual", "motion_quality"))
    moving = [p for p in TRAIN_PROMPTS if "moving" in p]
    frozen = make_clips(moving, seeded(0), "sharp")[:, :1].expand(-1, 12, -1, -1, -1)
    scores = judge(frozen, moving)
    assert scores["direction"].max() == 0 and scores["displacement"].max() < 0.01


def test_mixed_clips_are_mixed_chunk_by_chunk():
    """The quality of one chunk tells nothing about the next."""
    clips = make_clips(TRAIN_PROMPTS * 2, seeded(0))
    light = clips.amax((2, 3, 4)).unflatten(1, (CHUNKS, -1)).mean(2)
    assert torch.corrcoef(light.T)[0, 1:].abs().max() < 0.2 and light.std(1).mean() > 0.05


@pytest.fixture(scope="module")
def clip():
    return ClipReward()


def test_clip_reward_prefers_the_right_prompt_the_sharp_and_the_steady(clip):
    sharp = make_clips(TRAIN_PROMPTS, seeded(0), "sharp")
    wrong = [
        reward.prompt_of((c + 1) % 6, (s + 1) % 4, m)
        for c, s, m in reward.attributes(TRAIN_PROMPTS).tolist()]
    ta, vq, mq = clip.text_alignment, clip.visual_quality, clip.motion_quality
    often = lambda better: better.float().mean()
    assert often(ta(sharp, TRAIN_PROMPTS) > ta(sharp, wrong)) > 0.99
    for quality in list(QUALITIES)[1:]:
        worse = make_clips(TRAIN_PROMPTS, seeded(0), quality)
        assert often(vq(sharp, TRAIN_PROMPTS) > vq(worse, TRAIN_PROMPTS)) > 0.95
    assert often(mq(sharp, TRAIN_PROMPTS) > mq(worse, TRAIN_PROMPTS)) > 0.95  # flickering


def test_clip_reward_is_open_clips_own_model(clip):
    import open_clip

    folder = HERE / "assets" / "clip"
    model = open_clip.create_model(f"local-dir:{folder}").eval()
    frames = make_clips(PROMPTS, seeded(0))[:, 0]
    mean, std = (torch.tensor(v)[:, None, None]
                 for v in (model.visual.image_mean, model.visual.image_std))
    with torch.no_grad():
        assert torch.allclose(model.encode_image((frames - mean) / std, normalize=True),
                              clip.frame_features(frames))
    for name in (str(folder), str(folder / "open_clip_model.safetensors")):
        assert torch.equal(ClipReward(name).text_features(PROMPTS), clip.text_features(PROMPTS))


def test_clip_reward_loads_any_architecture_with_local_weights(tmp_path):
    """ARCH:FILE, as for a downloaded ViT; the frames are resized to what the model wants."""
    import open_clip

    config = train_clip.CLIP_CONFIG["model_cfg"] | {
        "vision_cfg": {"image_size": 48, "layers": 1, "width": 64, "patch_size": 16}}
    (tmp_path / "tiny-vit.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "tiny-vit.json")
    model = open_clip.create_model("tiny-vit")
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    scorer = ClipReward(f"tiny-vit:{tmp_path / 'w.safetensors'}")
    clips = make_clips(PROMPTS, seeded(0))
    for score in (scorer.text_alignment, scorer.visual_quality, scorer.motion_quality):
        assert score(clips, PROMPTS).shape == (3,) and score(clips, PROMPTS).isfinite().all()


def test_weighted_reward_puts_the_components_on_one_scale():
    parts = {
        "ta": lambda clips, prompts: clips[:, 0], "vq": lambda clips, prompts: 1000 * clips[:, 1],
        "mq": lambda clips, prompts: clips[:, 2] / 1000}
    clips = torch.randn(500, 3, generator=seeded(0))
    weighted = WeightedReward(parts, {"ta": 2.0, "vq": 1.0}, clips, [""] * 500)
    z = (clips - clips.mean(0)) / clips.std(0)
    found = weighted(clips, [""] * 500)
    assert torch.allclose(found["reward"], (2 * z[:, 0] + z[:, 1]) / 3, atol=1e-4)
    assert list(found) == ["reward", *parts] and torch.equal(found["mq"], clips[:, 2] / 1000)
    text = weighted.reweighted({"ta": 1.0})(clips, [""] * 500)["reward"]
    assert torch.allclose(text, z[:, 0], atol=1e-5)


@pytest.fixture
def tiny_clip(tmp_path, monkeypatch):
    """An open_clip architecture, "tiny-h", and its weights."""
    import open_clip

    config = json.loads((HERE / "assets" / "clip" / "open_clip_config.json").read_text())
    (tmp_path / "configs").mkdir()
    file = tmp_path / "configs" / "tiny-h.json"
    file.write_text(json.dumps(config["model_cfg"] | {"embed_dim": 768}))
    open_clip.add_model_config(file)
    torch.manual_seed(0)
    monkeypatch.setattr(reward, "MODELS", tmp_path)
    return open_clip.create_model("tiny-h").eval()


def test_hps_is_the_cosine_of_its_checkpoint(tiny_clip, tmp_path):
    """A checkpoint of the form that the HPSv2 repository has: a pickle with a "state_dict"."""
    checkpoint = {"epoch": 3, "state_dict": tiny_clip.state_dict()}
    torch.save(checkpoint, tmp_path / "HPS_v2.1_compressed.pt")
    clips, score = make_clips(PROMPTS, seeded(0)), reward.hps("cpu", "tiny-h")
    scorer = ClipReward(f"tiny-h:{tmp_path / 'HPS_v2.1_compressed.pt'}")
    with torch.no_grad():
        texts = tiny_clip.encode_text(scorer.tokenizer(PROMPTS), normalize=True)
    frames = scorer.frame_features(clips.flatten(0, 1)).view(3, 12, -1)
    expected = torch.einsum("nfd,nd->nf", frames, texts).mean(1)
    assert torch.allclose(score(clips, PROMPTS), expected, atol=1e-5)
    with pytest.raises(UserError, match="open_clip cannot load"):
        torch.save({"state_dict": {"x": torch.zeros(1)}}, tmp_path / "HPS_v2.1_compressed.pt")
        reward.hps("cpu", "tiny-h")


def test_aesthetic_is_laions_head_on_unit_features(tiny_clip, tmp_path):
    save_file(tiny_clip.state_dict(), tmp_path / "vit_large_patch14_clip_224.openai.safetensors")
    sizes = (768, 1024), (1024, 128), (128, 64), (64, 16), (16, 1)
    head = nn.Sequential(  # with the dropout of the original, for the numbers in its keys
        nn.Linear(*sizes[0]), nn.Dropout(), nn.Linear(*sizes[1]), nn.Dropout(),
        nn.Linear(*sizes[2]), nn.Dropout(), nn.Linear(*sizes[3]), nn.Linear(*sizes[4])).eval()
    weights = {f"layers.{name}": x for name, x in head.state_dict().items()}
    torch.save(weights, tmp_path / "sac+logos+ava1-l14-linearMSE.pth")
    score, clips = reward.Aesthetic("cpu", "tiny-h"), make_clips(PROMPTS, seeded(0))
    features = score.clip.frame_features(clips.flatten(0, 1))
    with torch.no_grad():
        expected = head(features).view(3, 12).mean(1)
    assert torch.allclose(score(clips, PROMPTS), expected, atol=1e-5)
    weights["layers.0.bias"] = torch.zeros(3)
    torch.save(weights, tmp_path / "sac+logos+ava1-l14-linearMSE.pth")
    with pytest.raises(UserError, match="not LAION's head"):
        reward.Aesthetic("cpu", "tiny-h")


def test_frames_are_resized_by_the_shorter_side_and_cropped(clip):
    """As open_clip's own transform of the model does."""
    import open_clip
    from torchvision.transforms.functional import to_pil_image

    config = clip.model.visual.preprocess_cfg
    transform = open_clip.transform.image_transform_v2(open_clip.transform.PreprocessCfg(**config),
                                                       is_train=False)
    frames = torch.rand(4, 3, 70, 96, generator=seeded(0)).round(decimals=2)
    frames = torch.nn.functional.avg_pool2d(frames, 5, 1, 2)
    with torch.no_grad():
        pixels = torch.stack([transform(to_pil_image(frame)) for frame in frames])
        expected = clip.model.encode_image(pixels, normalize=True)
    assert torch.cosine_similarity(clip.frame_features(frames), expected).min() > 0.999


@pytest.mark.parametrize("height, width", [(70, 95), (95, 70), (64, 64)])
def test_hps_sees_the_whole_frame(clip, height, width):
    """As in HPSv2's own code: the longer side is resized, what is left is black on both sides."""
    frames, seen = torch.rand(2, 3, height, width, generator=seeded(0)), []
    whole = ClipReward(whole=True)
    whole.model.encode_image = lambda x, normalize: seen.append(x) or torch.zeros(len(x), 1)
    whole.frame_features(frames)
    visual = whole.model.visual
    mean, std = (torch.tensor(v)[:, None, None] for v in (visual.image_mean, visual.image_std))
    size = [round(32 * n / max(height, width)) for n in (height, width)]
    small = nn.functional.interpolate(frames, size, mode="bicubic", antialias=True).clamp(0, 1)
    expected = torch.zeros(2, 3, 32, 32)
    top, left = ((32 - n) // 2 for n in size)
    expected[:, :, top:top + size[0], left:left + size[1]] = small
    assert torch.allclose(seen[0] * std + mean, expected, atol=1e-5)


# ------------------------------------------------------------------ model, sampler, fork


def one_pass(model: Generator, x, t, prompts) -> tuple[torch.Tensor, torch.Tensor]:
    """Without a cache: all chunks x [N, L, ...] at times t [N, L] in one pass with the block-causal
    mask -> predictions [N, L, ...] and keys and values as in Context. Written anew, for fp32."""
    N, L, F, C, S, W = *x.shape[:5], model.width
    side, K = S // arcopo.PATCH, model.tokens
    words = model.begin(prompts).words
    frequency = 1e4**(-torch.arange(128) / 128)
    angle = 1000 * t[..., None] * frequency
    condition = model.time(torch.cat([angle.cos(), angle.sin()], -1)) + words[:, None]  # [N, L, W]
    modulation = model.modulation(condition).view(N, L, 1, 6, W)
    y = x.view(N, L, F, C, side, arcopo.PATCH, side, arcopo.PATCH)
    y = torch.einsum("nlfcapbq->nlabfcpq", y).reshape(N, L, K, -1)
    y = model.patch(y) + model.position[:L] + words[:, None, None]
    chunk = torch.arange(L).repeat_interleave(K)
    mask, kv = chunk[:, None] >= chunk, []
    for block in model.blocks:
        a, b, c, d, e, f = (modulation + block.table).unbind(3)
        z = nn.functional.layer_norm(y, (W,)) * (1 + b) + a
        q, k, v = block.qkv(z).view(N, L * K, 3, model.heads, -1).transpose(1, 3).unbind(2)
        q, k = (nn.functional.rms_norm(u, u.shape[-1:]) for u in (q, k))
        z = nn.functional.scaled_dot_product_attention(q, k, v, mask)
        y = y + c * block.out(z.transpose(1, 2).reshape(N, L, K, W))
        z = nn.functional.layer_norm(y, (W,)) * (1 + e) + d
        y = y + f * block.down(nn.functional.gelu(block.up(z)))
        kv.append(torch.stack([k, v], 1))
    a, b = (condition[:, :, None] + model.table).unbind(2)
    y = model.head(nn.functional.layer_norm(y, (W,)) * (1 + b[:, :, None]) + a[:, :, None])
    y = y.view(N, L, side, side, F, C, arcopo.PATCH, arcopo.PATCH)
    y = torch.einsum("nlabfcpq->nlfcapbq", y).reshape(N * L, F * C, S, S)
    return (y + model.smooth(y)).view(x.shape), torch.stack(kv, 1)


def test_cached_prediction_equals_one_pass_with_the_block_causal_mask():
    model, clean = tiny(), encode(make_clips(PROMPTS, seeded(0)))
    full, kv = one_pass(model, clean, torch.zeros(3, CHUNKS), PROMPTS)
    context = model.begin(PROMPTS)
    for p in range(CHUNKS):
        assert torch.allclose(model.predict(clean[:, p], 0.0, context), full[:, p], atol=1e-5)
        before = context.kv.clone()
        longer = model.extend(context, clean[:, p])
        assert torch.equal(context.kv, before)  # a value: extend changes a copy
        context = longer
    assert torch.allclose(context.kv, kv, atol=1e-5)


def test_prediction_at_a_time_sees_its_own_past_alone():
    """predict_all (pre-training) = one pass over clean past and a noisy chunk, row by row."""
    model, clean = tiny(), encode(make_clips(PROMPTS, seeded(0)))
    t, noisy = (torch.rand(3, CHUNKS,
                           generator=seeded(1)), torch.randn(clean.shape, generator=seeded(2)))
    forced = pretrain.predict_all(model, noisy, t, pretrain.contexts(model, clean, PROMPTS))
    for p in range(CHUNKS):
        x = torch.cat([clean[:, :p], noisy[:, p:p + 1]], 1)
        times = torch.cat([torch.zeros(3, p), t[:, p:p + 1]], 1)
        assert torch.allclose(one_pass(model, x, times, PROMPTS)[0][:, p], forced[:, p], atol=1e-5)
    clean[1], clean[:, 2] = 0, 0  # another row; a later chunk
    other = pretrain.predict_all(model, noisy, t, pretrain.contexts(model, clean, PROMPTS))
    assert torch.allclose(forced[::2, :3], other[::2, :3], atol=1e-6)
    assert not torch.allclose(forced[:, 3], other[:, 3], atol=1e-3)


@pytest.mark.parametrize("flow, bf16", [(False, False), (False, True), (True, False)])
@pytest.mark.parametrize("pivot", range(CHUNKS))
def test_fork(pivot, flow, bf16):
    model = tiny(bf16=bf16, flow=flow)
    branches, clips = forked(model, pivot)
    chunks = clips.unflatten(2, (CHUNKS, -1))  # [P, G, L, ...]
    assert torch.equal(chunks[:, :, :pivot], chunks[:, :1, :pivot].expand_as(chunks[:, :, :pivot]))
    assert (chunks[:, 1:, pivot] != chunks[:, :1, pivot]).any()
    assert torch.allclose(
        model.decode(branches.candidates[:, -1].flatten(0, 1)[:, None]).unflatten(0, (3, 4)),
        chunks[:, :, pivot])
    again, same = forked(model, pivot)
    assert torch.equal(same, clips)  # same seed, same rollout
    assert all(torch.equal(getattr(again, n), getattr(branches, n)) for n in ("states", "prefix"))
    assert not torch.equal(forked(model, pivot, seed=5)[1], clips)


@pytest.mark.parametrize("flow", [False, True])
@pytest.mark.parametrize("pivot", range(CHUNKS))
def test_fork_without_radius_is_plain_sampling(pivot, flow):
    """sigma -> 0 recovers the sampler: every branch is the clip of the base noise."""
    model = tiny(flow=flow)
    clips = sample(model, PROMPTS, draw_noise(model, 3,
                                              seeded(0)))[:, None].expand(-1, 4, -1, -1, -1, -1)
    assert torch.allclose(forked(model, pivot, 0)[1], clips, atol=1e-5)
    assert torch.allclose(forked(model, pivot, 1e-7)[1], clips, atol=1e-4)


def test_nothing_but_the_pivots_initial_noise_differs():
    """Each branch is a plain sample of the shared noise with that one tensor replaced."""
    model, pivot, group = tiny(), 1, 4
    noise = draw_noise(model, 3, seeded(0))
    neighbours = neighbor_noise(noise.initial[:, pivot], 0.5, group, seeded(0, 1))
    clips = forked(model, pivot)[1]
    for i in range(group):
        initial = noise.initial.clone()
        initial[:, pivot] = neighbours[i]
        assert torch.allclose(sample(model, PROMPTS, noise._replace(initial=initial)),
                              clips[:, i],
                              atol=1e-5)


def test_sde_branches_differ_in_the_pivots_solver_noise_alone():
    """Each branch is what plain sampling gives from the shared noise with that tensor exchanged."""
    model, pivot, group = tiny(), 2, 3
    noise = draw_noise(model, 3, seeded(0))
    branches, clips = forked(model, pivot, group=group, method="sde-grpo")
    initial = noise.initial[:, pivot, None].expand(-1, group, -1, -1, -1, -1)
    assert torch.equal(branches.states[:, 0], initial)
    assert all((branches.states[:, i, 1:] != branches.states[:, i, :1]).any() for i in (1, 2, 3))
    solver = noise.solver[:, None].repeat_interleave(group, 1)
    own = neighbor_noise(noise.solver[:, pivot], 1.0, group, seeded(0, 1))
    solver[:, :, pivot] = own.transpose(0, 1)
    for b in range(group):
        plain = sample(model, PROMPTS, noise._replace(solver=solver[:, b]))
        assert torch.allclose(plain, clips[:, b], atol=1e-5)
    assert (clips[:, 1:] - clips[:, :1]).abs().amax((2, 3, 4, 5)).min() > 1e-3


def test_sampler_re_noises_as_self_forcing():
    """With a model that predicts c, every state but the first is (1 - t) c + t noise."""

    class Constant:
        timesteps, flow = (1.0, 0.5, 0.25), False
        predict = staticmethod(lambda x, t, context: torch.full_like(x, 3.0))

    initial, solver = torch.randn(2, 5), torch.randn(2, 2, 5)
    states, predictions = denoise(Constant, None, initial, solver)
    assert torch.equal(states[:, 0], initial) and (predictions == 3).all()
    for i, t in enumerate((0.5, 0.25)):
        assert torch.allclose(states[:, i + 1], (1 - t) * 3 + t * solver[:, i])


def test_the_flow_sampler_solves_its_ode():
    """For Gaussian data the ODE has a closed form, x_0 = m + s x_1; Euler is close to it."""
    m, s = 2.0, 0.5

    class Gaussian:  # E[x0 | x_t] with x_t = (1 - t) x0 + t ε, x0 ~ N(m, s²)
        timesteps, flow = tuple(torch.linspace(1, 0.001, 1000).tolist()), True
        predict = staticmethod(lambda x, t, context: (m + (1 - t) * s**2 / (
            (1 - t)**2 * s**2 + t**2) * (x - (1 - t) * m)))

    initial = torch.randn(2, 5, generator=seeded(0))
    states, outputs = denoise(Gaussian, None, initial, initial[:, None][:, :0])
    assert torch.allclose(outputs[:, -1], m + s * initial, atol=0.01) and torch.equal(
        states[:, 1:], outputs[:, :-1])


def test_the_shipped_base_is_good_imperfect_and_every_pivot_matters(clip):
    model = arcopo.load_generator(HERE / "assets" / "base.safetensors")
    clips = sample(model, HELD_OUT_PROMPTS, draw_noise(model, 24, seeded(0)))
    scores = judge(clips, HELD_OUT_PROMPTS)
    assert scores["all_right"].mean() > 0.85 and scores["motion_quality"].mean() > 0.45
    assert 0.65 < scores["visual"].mean() < 0.8
    parts = {"ta": clip.text_alignment, "vq": clip.visual_quality, "mq": clip.motion_quality}
    scorer = WeightedReward(parts, dict.fromkeys(parts, 1.0), clips, HELD_OUT_PROMPTS)
    for pivot in range(CHUNKS):
        forks = forked(model, pivot, group=6)[1].flatten(0, 1)
        rewards = scorer(forks, [p for p in PROMPTS for _ in range(6)])["reward"].view(-1, 6)
        assert (rewards.std(1, correction=0).mean()
                > 0.03)  # a world whose first chunk decides all gives less than 0.02


def test_the_two_trainings_start_from_different_adapters_and_methods_of_a_kind_share_theirs(
        tmp_path, monkeypatch):
    model, started = tiny(), {}
    new = Adapter.new
    for name in ("on-policy", "semi", "off-policy", "sde-grpo"):
        monkeypatch.setattr(
            Adapter,
            "new",
            lambda *a, **k: started.setdefault(name, new(*a, **k))  # noqa: B023
        )
        method = replace(tiny_method(name), steps=0)
        curve = lambda: {"reward": torch.zeros(1)}
        arcopo.align(name, model, method, None, curve, 1, 1, 0, tmp_path, {})
    first = {name: adapter.parameters()[0] for name, adapter in started.items()}
    assert not torch.equal(first["on-policy"], first["semi"])
    assert torch.equal(first["on-policy"], first["sde-grpo"])
    assert torch.equal(first["semi"], first["off-policy"])


def test_no_two_random_streams_coincide():
    """Those of 1,000 runs, of pre-training and of studies; seeds beyond 32 and 63 bits too."""
    streams = [(name,) for name in ("calibration", "judging", "curve", "sampling", "study")]
    streams += [
        (kind, part) for kind in ("explored", "buffered") for part in ("adapter", *range(9))]
    streams += [("buffer", first) for first in range(0, 20, 4)] + [("teacher", 0), ("student", 0)]
    seeds = [
        *range(990), *(2**k for k in (31, 32, 33, 62, 63)), -1, 2**32 + 1, 10**18, 11**18, 12**18]
    drawn = [
        torch.randint(2**62, (2,), generator=seeded(seed, *stream)).tolist() for seed in seeds
        for stream in streams]
    assert len({tuple(numbers) for numbers in drawn}) == len(drawn) == 1000 * 32
    assert not torch.equal(torch.randn(3, generator=seeded(1, 23)),
                           torch.randn(3, generator=seeded(12, 3)))
    assert torch.equal(torch.randn(3, generator=seeded(0, "a")),
                       torch.randn(3, generator=seeded(0, "a")))


def test_hashed_streams_are_random():
    """The generator's state is really filled: mean, deviation and correlation of two streams."""
    x, y = (torch.randn(100_000, generator=seeded(0, "judging", i)) for i in range(2))
    assert abs(x.mean()) < 0.02 and abs(x.std() - 1) < 0.02 and abs((x * y).mean()) < 0.02


# ------------------------------------------------------------------ objective


def test_neighbor_noise():
    base = torch.randn(20000, generator=seeded(0))
    for sigma in (0.1, 0.5, 1.0):
        noise = neighbor_noise(base, sigma, 3, seeded(1))
        assert noise.shape == (3, 20000) and (noise.std(1) - 1).abs().max() < 0.03
        assert torch.allclose((noise * base).mean(1) / base.square().mean(),
                              torch.tensor((1 - sigma**2)**0.5).expand(3),
                              atol=0.03)
    assert torch.equal(neighbor_noise(base, 0.0, 2), base.expand(2, -1))
    with pytest.raises(ValueError):
        neighbor_noise(base, 1.5, 2)


def test_group_advantages():
    rewards = 5 + torch.randn(7, 12, generator=seeded(0))
    A = group_advantages(rewards)
    assert torch.allclose(A.mean(1), torch.zeros(7), atol=1e-6) and torch.allclose(
        A.std(1, correction=0), torch.ones(7), atol=1e-5)
    for p in (0.8, 2.0):
        assert torch.allclose(group_advantages(rewards, p),
                              A / A.abs().pow(p).sum(1, keepdim=True).pow(1 / p),
                              atol=1e-6)
    assert torch.allclose(group_advantages(rewards, 2.0), A / 12**0.5, atol=1e-6)
    for value in (0.1, 1000.1):  # exactly zero, though the mean of 0.1 is not 0.1 in float32
        assert (group_advantages(torch.full(
            (12,), value)) == 0).all() and (group_advantages(torch.full(
                (12,), value), 0.8) == 0).all()
    nearly = 0.001 * rewards
    for p in (0.0, 0.8):
        assert (group_advantages(nearly, p, floor=0.1).abs().max()
                < 0.05 * group_advantages(rewards, p).abs().max())


def objective(anchor, candidates, advantages, tau, old, clip):
    return clipped_objective(surrogate_log_policy(candidates, anchor, tau) - old, advantages, clip)


@pytest.mark.parametrize("own", [True, False])
def test_gradient_at_theta_old_is_the_closed_form(own):
    """∂J/∂x^(θ) = 2/(GτD) Σ A⁽ⁱ⁾ x⁽ⁱ⁾, for any anchor, with or without the clip."""
    G, tau, g = 12, 0.1, seeded(0)
    candidates = torch.randn(G, 60, generator=g, dtype=torch.double)
    anchor = candidates[2].clone() if own else torch.randn(60, generator=g, dtype=torch.double)
    anchor.requires_grad_()
    A = group_advantages(torch.randn(G, generator=g, dtype=torch.double))
    old = surrogate_log_policy(candidates, anchor, tau).detach()
    expected = 2 / (G * tau * 60) * torch.einsum("g,gd->d", A, candidates)
    for clip in (1e-4, math.inf):
        (gradient,) = torch.autograd.grad(objective(anchor, candidates, A, tau, old, clip), anchor)
        assert torch.allclose(gradient, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("clip", [math.inf, 0.05, 10.0])
def test_gradient_elsewhere_agrees_with_finite_differences(clip):
    G, tau, g = 6, 0.75, seeded(0)
    candidates = torch.randn(G, 4, generator=g, dtype=torch.double)
    A = group_advantages(torch.randn(G, generator=g, dtype=torch.double))
    anchor = torch.randn(4, generator=g, dtype=torch.double, requires_grad=True)
    away = anchor + 0.2 * torch.randn(4, generator=g, dtype=torch.double)
    old = surrogate_log_policy(candidates, away, tau).detach()
    assert torch.autograd.gradcheck(lambda x: objective(x, candidates, A, tau, old, clip), anchor)


def test_clip_stops_the_gradient_only_where_it_was_already_won():
    log_ratio = torch.tensor([0.2, -0.2, 0.2, -0.2], requires_grad=True)
    advantages = torch.tensor([1.0, -1.0, -1.0, 1.0])  # two favourable, two unfavourable
    clipped_objective(log_ratio, advantages, 0.1).backward()
    assert torch.equal(log_ratio.grad == 0, torch.tensor([True, True, False, False]))
    log_ratio.grad = None
    clipped_objective(log_ratio, advantages, math.inf).backward()
    assert torch.allclose(log_ratio.grad, log_ratio.exp().detach() * advantages / 4)
    far = torch.tensor([1000.0, 1000.0], requires_grad=True)        # exp overflows
    clipped_objective(far, torch.tensor([1.0, 0.0]), 0.1).backward()
    assert torch.equal(far.grad, torch.zeros(2))


def test_a_wide_clip_is_no_clip_and_eq_3_holds():
    g = seeded(0)
    log_ratio, A = 0.3 * torch.randn(12, generator=g), torch.randn(12, generator=g)
    assert clipped_objective(log_ratio, A, 100.0) == clipped_objective(log_ratio, A, math.inf)
    terms = [
        min(r * a,
            min(max(r, 0.9), 1.1) * a) for r, a in zip(log_ratio.exp().tolist(), A.tolist())]
    assert clipped_objective(log_ratio, A, 0.1).item() == pytest.approx(sum(terms) / 12, rel=1e-5)


def test_a_small_step_moves_the_anchor_toward_the_advantage_weighted_sum():
    g = seeded(0)
    candidates, A = torch.randn(12, 50, generator=g), group_advantages(torch.randn(12, generator=g))
    anchor = candidates[0].clone().requires_grad_()
    old = surrogate_log_policy(candidates, anchor, 2.0).detach()
    objective(anchor, candidates, A, 2.0, old, 1e-4).backward()
    step, weighted = 0.01 * anchor.grad, A @ candidates
    assert torch.cosine_similarity(step, weighted, dim=0) > 0.9999
    moved = surrogate_log_policy(candidates, (anchor + step).detach(), 2.0) - old
    assert (moved * A).sum() > 0  # probability goes to where the advantage is


def test_log_policies_are_the_plain_function_for_each_step_prompt_and_anchor():
    model, method = tiny(), tiny_method("on-policy", tau=0.5)
    branches = forked(model, 1)[0]
    with nonzero(Adapter.new(model, 4, 4.0, seeded(0))).on(model):
        pairs = method.draw_pairs(4, seeded(1))
        batched = method.log_policies(model, branches, *pairs.T)
        assert batched.shape == (3, 8, 4) and len(set(map(tuple, pairs.tolist()))) == 8
        for k, (t, b) in enumerate(pairs.tolist()):
            x0 = model.predict(branches.states[:, t, b], model.timesteps[t], branches.context)
            for p in range(3):
                d = (branches.candidates[p, t] - x0[p]).flatten(1).square().mean(1)
                assert torch.allclose(batched[p, k], (-d / 0.5).log_softmax(0), atol=1e-4)


def test_tau_does_not_depend_on_the_size_of_a_chunk():
    candidates, anchor = torch.randn(6, 8, generator=seeded(0)), torch.randn(8, generator=seeded(1))
    small = surrogate_log_policy(candidates, anchor, 0.03)
    large = surrogate_log_policy(candidates.repeat(1, 50), anchor.repeat(50), 0.03)
    assert torch.allclose(small, large, rtol=1e-5)


def test_gaussian_log_density_is_that_of_torch_distributions():
    x, mean = torch.randn(2, 3, 4, generator=seeded(0), dtype=torch.double)
    for std in (0.3, torch.tensor([0.1, 0.5, 1.0, 2.0], dtype=torch.double)):
        assert torch.allclose(gaussian_log_density(x, mean, std),
                              torch.distributions.Normal(mean, std).log_prob(x),
                              rtol=1e-6)


def test_sde_log_policies_are_those_of_each_re_noising():
    """Under the rollout's policy: the log-density of each re-noised state, for T - 1 steps."""
    model = tiny()
    branches = forked(model, 1, method="sde-grpo")[0]
    method = tiny_method("sde-grpo")
    log_policies = method.log_policies(model, branches, *method.draw_pairs(4, seeded(0)).T)
    assert log_policies.shape == (3, 3, 4)
    for i, s in enumerate(model.timesteps[1:]):
        mean = (1 - s) * branches.candidates[:, i]
        expected = (torch.distributions.Normal(mean, s).log_prob(branches.states[:, i + 1]).mean(
            (2, 3, 4, 5)))
        assert torch.allclose(log_policies[:, i], expected, atol=1e-4)


def test_the_flow_anchor_is_an_euler_step_of_the_current_policy():
    """Eq. 2 for FM: x_s^(θ) = x_t - (t - s) v, v = (x_t - x̂₀) / t; the finished chunk at s = 0."""
    model = tiny(flow=True)
    branches = forked(model, 1)[0]
    with nonzero(Adapter.new(model, 4, 4.0, seeded(0))).on(model):
        replayed = replay(model, branches, torch.arange(4), torch.full((4,), 2))
        for i, (t, s) in enumerate(zip(model.timesteps, (*model.timesteps[1:], 0.0))):
            x_t = branches.states[:, i, 2]
            v = (x_t - model.predict(x_t, t, branches.context)) / t
            assert torch.allclose(replayed[:, i], x_t - (t - s) * v, atol=1e-5)
            assert not torch.allclose(replayed[:, i], branches.candidates[:, i, 2], atol=1e-3)


# ------------------------------------------------------------------ adapter, update and methods


def brightness(clips, prompts):
    return {"reward": clips.mean((1, 2, 3, 4))}


def trainer(model: Generator,
            adapter: Adapter,
            lr: float = 1e-2,
            method: str = "on-policy",
            reward=brightness,
            buffer=None,
            **changes):
    """step -> the row of iterate."""
    method = tiny_method(method, **changes)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr, weight_decay=0)

    def groups(generator):
        if method.buffered:
            return draw_from(buffer, model, method.prompts, generator)
        return explore(model, method, TRAIN_PROMPTS, reward, method.prompts, generator)

    return lambda step: iterate(model, adapter, optimizer, method, groups, seeded(0, step))


def tiny_buffer(model: Generator, size: int = 6) -> arcopo.Buffer:
    return collect_buffer(model, tiny_method("semi"), TRAIN_PROMPTS, brightness, size, 0)


@pytest.mark.parametrize("flow, bf16", [(False, False), (False, True), (True, False)])
@pytest.mark.parametrize("anchors", [1, 2, 3, 4])
def test_replay_is_the_rollout_and_the_first_ratio_is_exactly_one(flow, bf16, anchors):
    model = tiny(bf16=bf16, flow=flow)
    adapter = nonzero(Adapter.new(model, 4, 4.0, seeded(0)))
    rewards = torch.randn(3, 4, generator=seeded(0))
    with adapter.on(model):
        branches = forked(model, 1)[0]
        pairs = torch.cartesian_prod(torch.arange(4), torch.arange(anchors)).T
        replayed = replay(model, branches, *pairs)
        stored = branches.candidates[:, pairs[0], pairs[1]]
        assert torch.allclose(replayed, stored, atol=0.05 if bf16 else 1e-5)
    optimizer = torch.optim.AdamW(adapter.parameters(), 1e-3)
    method = tiny_method("on-policy", anchors=anchors)
    row = update(model, adapter, branches, rewards, method, optimizer, 2, seeded(1))
    assert row["ratio_first"] == 1 and row["clip_fraction"] > 0 and row["skipped"] == 0
    assert row["replay_error"] < (0.3 if bf16 else 1e-4)


@pytest.mark.parametrize("method", [*arcopo.METHODS, "sde-grpo"])
def test_replay_error_shows_that_replay_and_rollout_disagree(method):
    """Rounding if they agree; much more if the rollout was another model's, or in bf16."""
    model, other, coarse = tiny(), tiny(), tiny(bf16=True)
    for p in other.head.parameters():
        p.data *= 1.01
    method, errors = tiny_method(method), []
    for rollouts in (model, other, coarse):
        noise = draw_noise(rollouts, 3, seeded(0))
        own = method.branch_noise(noise, 1, seeded(1))
        branches = fork(rollouts, PROMPTS, 1, noise, *own)[0]
        adapter = Adapter.new(model, 4, 4.0, seeded(0))
        optimizer = torch.optim.SGD(adapter.parameters(), 0.1)
        rewards = torch.randn(3, 4, generator=seeded(0))
        row = update(model, adapter, branches, rewards, method, optimizer, 1, seeded(1))
        errors.append(row["replay_error"])
    assert errors[0] < 1e-4 and min(errors[1:]) > 30 * errors[0]


@pytest.mark.parametrize("method", [*arcopo.METHODS, "sde-grpo"])
def test_every_method_changes_only_the_adapter(method):
    model = tiny()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    adapter = Adapter.new(model, 4, 4.0, seeded(0))
    start = [p.detach().clone() for p in adapter.parameters()]
    noise = draw_noise(model, 3, seeded(0))
    clips = sample(model, PROMPTS, noise)
    with adapter.on(model):
        assert torch.equal(sample(model, PROMPTS, noise), clips)  # B = 0: the base itself
    row = trainer(model, adapter, method=method, buffer=tiny_buffer(model))(0)
    with adapter.on(model):
        assert not torch.equal(sample(model, PROMPTS, noise), clips)
    assert torch.equal(sample(model, PROMPTS, noise), clips) and row["skipped"] == 0
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert any(not torch.equal(a, b) for a, b in zip(start, adapter.parameters()))


def test_the_buffer_comes_from_the_reference():
    """An entry is the fork of the base itself, with the reward of its clips."""
    model, method = tiny(), tiny_method("semi")
    branches, scores = explore(model, method, TRAIN_PROMPTS, brightness, 2, seeded(0, "buffer", 0))
    for n, group in enumerate(tiny_buffer(model, size=2)):
        assert torch.equal(group["reward"], scores["reward"][n])
        assert group["prompt"] == branches.prompts[n]
        for name in ("prefix", "states", "candidates"):
            assert torch.equal(group[name], getattr(branches, name)[n].half())


def test_the_context_of_a_drawn_group_is_that_of_the_rollout_but_for_rounding():
    model = tiny()
    for i in range(4):
        branches, scores = draw_from(tiny_buffer(model), model, 3, seeded(i))
        context = model.begin(branches.prompts)
        for x0 in branches.prefix.unbind(1):
            context = model.extend(context, x0)
        assert torch.equal(context.kv, branches.context.kv)
    found, _ = explore(model, tiny_method("semi"), TRAIN_PROMPTS, brightness, 2, seeded(2))
    half = found._replace(prefix=found.prefix.half())
    group = {name: getattr(half, name)[:1] for name in ("prefix", "states", "candidates")}
    one = {name: x[0] for name, x in group.items()} | {"prompt": found.prompts[0]}
    drawn, _ = draw_from([one | {"reward": torch.zeros(4)}], model, 1, seeded(0))
    assert found.prefix.shape[1] > 0
    assert torch.allclose(drawn.context.kv, found.context.kv[:1], rtol=0.01, atol=0.01)
    assert not torch.equal(drawn.context.kv, found.context.kv[:1])


def test_the_buffer_never_changes(tmp_path):
    model, about = tiny(), {"base": "x", "group": 4}
    buffer = tiny_buffer(model)
    tensors = lambda b: [x for group in b for x in group.values() if isinstance(x, torch.Tensor)]
    before, versions = copy.deepcopy(buffer), [x._version for x in tensors(buffer)]
    save_buffer(buffer, tmp_path / "buffer.safetensors", about)
    step = trainer(model, Adapter.new(model, 4, 4.0, seeded(0)), method="off-policy", buffer=buffer)
    for i in range(8):
        step(i)
    assert versions == [x._version for x in tensors(buffer)]  # torch counts writes in place
    for other in (buffer, load_buffer(tmp_path / "buffer.safetensors", model, about)):
        assert [group["prompt"] for group in other] == [group["prompt"] for group in before]
        assert all(torch.equal(x, y) for x, y in zip(tensors(other), tensors(before), strict=True))
    with pytest.raises(UserError, match="made with base x, not y"):
        load_buffer(tmp_path / "buffer.safetensors", model, about | {"base": "y"})


def test_a_buffer_with_rewards_that_are_not_finite_is_read_back(tmp_path):
    """As a NaN clip gives them: training leaves them out, so a file may have them."""
    model, file = tiny(), tmp_path / "buffer.safetensors"
    buffer = tiny_buffer(model, 2)
    for name in ("reward", "ta"):
        buffer[0][name] = torch.full((4,), math.nan)
        buffer[1][name] = torch.ones(4)
    save_buffer(buffer, file, {"group": 4})
    again = load_buffer(file, model, {"group": 4})
    assert again[0]["ta"].isnan().all() and torch.equal(again[1]["ta"], buffer[1]["ta"])


def test_a_clip_that_is_not_finite_has_no_reward_whatever_the_reward_says():
    model, method = tiny(), tiny_method("on-policy")
    model.decode = lambda latents: torch.cat([latents[:1] * math.nan, latents[1:]])
    constant = lambda clips, prompts: {"reward": torch.ones(len(clips))}
    scores = explore(model, method, PROMPTS, constant, 2, seeded(0))[1]
    assert scores["reward"][0, 0].isnan() and scores["reward"].isfinite().sum() == 7


def test_draws_return_unchanged_entries_of_one_pivot():
    model, seen = tiny(), set()
    buffer = tiny_buffer(model, 12)
    assert len(buffer) == 12
    for i in range(60):
        branches, scores = draw_from(buffer, model, 3, seeded(i))
        pivot = branches.prefix.shape[1]
        assert 1 <= len(branches.states) <= 3
        assert branches.context.kv.shape[4] == pivot * model.tokens
        for n in range(len(branches.states)):
            same = [torch.equal(group["reward"], scores["reward"][n]) for group in buffer]
            row = same.index(True)
            seen.add(row)
            assert branches.prompts[n] == buffer[row]["prompt"]
            for name in ("prefix", "states", "candidates"):
                assert torch.equal(getattr(branches, name)[n], buffer[row][name].float())
    assert len(seen) == 12  # every entry is drawn sooner or later


def test_with_the_adapter_at_zero_the_ratio_of_semi_is_one_and_then_moves_away():
    model = tiny()
    step = trainer(model,
                   Adapter.new(model, 4, 4.0, seeded(0)),
                   method="semi",
                   buffer=tiny_buffer(model),
                   updates=1)
    rows = [step(i) for i in range(3)]
    assert (rows[0]["ratio_first"] == 1
            and rows[2]["ratio_first"] != 1)  # against π_ref, not against itself


def test_semi_and_off_policy_differ_by_the_clip_alone():
    model = tiny()
    on, semi, off = methods(tiny_settings()).values()
    assert off == replace(semi, clip_range=math.inf)
    assert semi == replace(on, buffered=True, lr=Settings.buffer_lr)
    adapters = {}
    for method, clip in (("off-policy", 1e-2), ("semi", math.inf), ("semi", 1e-2)):
        adapter = adapters[method, clip] = Adapter.new(model, 4, 4.0, seeded(0))
        step = trainer(model, adapter, method=method, buffer=tiny_buffer(model), clip_range=clip)
        for i in range(3):
            step(i)
    off, unclipped, semi = (adapter.parameters() for adapter in adapters.values())
    assert all(
        torch.equal(a, b)
        for a, b in zip(off, unclipped)) and not all(torch.equal(a, b) for a, b in zip(off, semi))


def test_the_clip_keeps_semi_near_the_reference():
    """With the clip the ratio to the reference stays near 1; without it, it does not."""
    model, buffer, ratios = tiny(), tiny_buffer(tiny()), {}
    for method in ("semi", "off-policy"):
        step = trainer(model,
                       Adapter.new(model, 4, 4.0, seeded(0)),
                       3e-3,
                       method,
                       buffer=buffer,
                       clip_range=1e-4)
        ratios[method] = [abs(step(i)["ratio_first"] - 1) for i in range(15)][-5:]
    assert sum(ratios["semi"]) < sum(ratios["off-policy"]) / 3


def test_the_rule_that_chooses_s():
    nan, base = math.nan, (0.0, 0.5)
    assert (choose_strength({0.4: (0.1, 0.6), 0.8: (0.2, 0.51), 1.0: (0.9, 0.49)},
                            base) == 0.8)  # 1.0 is reward hacking
    assert choose_strength({1.0: (0.9, 0.9), 0.4: (0.1, 0.6)}, base) == 1.0  # whatever the order
    assert choose_strength({0.4: (-0.1, 0.9), 0.8: (0.2, 0.4)}, base) is None  # none improves both
    assert choose_strength({}, base) is None
    assert (choose_strength({0.4: (0.1, 0.6), 0.8: (0.0, 0.6), 1.0: (0.1, 0.5)},
                            base) == 0.4)  # a tie is no gain
    assert choose_strength({0.4: (0.1, 0.6), 0.8: (nan, 0.6), 1.0: (0.1, nan)}, base) == 0.4
    assert choose_strength({0.4: (0.1, 0.6)}, (nan, 0.5)) is None


def test_merging_two_adapters_equals_applying_both(tmp_path):
    model, noise = tiny(), draw_noise(tiny(), 3, seeded(0))
    a, b = (nonzero(Adapter.new(model, 4, 8.0, seeded(1)),
                    1), nonzero(Adapter.new(model, 2, 1.0, seeded(2)), 2))
    with a.on(model), Adapter(b.weights, 0.6 * b.alpha).on(model):
        both = sample(model, PROMPTS, noise)
    about = {"base": "", "timesteps": list(model.timesteps)}
    merge_adapters((a, 1.0), (b, 0.6)).save(tmp_path / "merged", about)
    with Adapter.load(tmp_path / "merged", model).on(model):
        assert torch.allclose(sample(model, PROMPTS, noise), both, atol=1e-5)
    with a.on(model):
        alone = sample(model, PROMPTS, noise)
    with merge_adapters((a, 1.0), (b, 0.0)).on(model):
        assert torch.allclose(sample(model, PROMPTS, noise), alone, atol=1e-5)
    assert not torch.allclose(both, alone, atol=1e-2)


def test_an_adapter_is_a_change_of_the_weights():
    model, noise = tiny(), draw_noise(tiny(), 3, seeded(0))
    adapter = nonzero(Adapter.new(model, 4, 8.0, seeded(1)))
    with adapter.on(model):
        beside = sample(model, PROMPTS, noise)
    for name, (A, B) in adapter.weights.items():
        model.get_submodule(name).weight.data += (8.0 / 4) * (B @ A).detach()
    assert torch.allclose(sample(model, PROMPTS, noise), beside, atol=1e-4)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_rewards_that_are_not_finite_are_left_out(bad):
    """A branch without a finite reward has no advantage, and its group's others keep theirs."""
    rewards = torch.randn(3, 6, generator=seeded(0))
    expected = group_advantages(rewards[:, 1:])
    broken = rewards.clone()
    broken[0, 0], broken[1] = bad, bad
    given = broken.clone()
    found = group_advantages(broken)
    assert torch.allclose(found[0, 1:], expected[0], atol=1e-6) and found[0, 0] == 0
    assert (found[1] == 0).all() and torch.equal(found[2], group_advantages(rewards[2]))
    assert torch.equal(broken.isfinite(), given.isfinite())  # nothing was written to


def test_a_group_without_rewards_changes_nothing_for_the_others():
    """One prompt of NaN: the update is that of the other prompt alone, at half the weight."""
    model, results = tiny(), []
    for scores in (brightness, None):
        adapter = nonzero(Adapter.new(model, 4, 4.0, seeded(0)))
        optimizer = torch.optim.SGD(adapter.parameters(), 1.0)
        with adapter.on(model):
            branches, clips = forked(model, 1)
        rewards = clips.mean((2, 3, 4, 5))
        if scores is None:
            branches = Fork(branches.prompts[:2], *(x[:2] for x in (branches.prefix,)),
                            arcopo.Context(*(x[:2] for x in branches.context)), branches.states[:2],
                            branches.candidates[:2])
            rewards = rewards[:2]
        else:
            rewards = torch.cat([rewards[:2], torch.full((1, 4), math.nan)])
        method = tiny_method("on-policy", clip_range=math.inf)
        row = update(model, adapter, branches, rewards, method, optimizer, 1, seeded(1))
        assert row["skipped"] == 0
        results.append([p.grad.clone() for p in adapter.parameters()])
    assert all(torch.allclose(3 * a, 2 * b, atol=1e-6) for a, b in zip(*results))


@pytest.mark.parametrize("where", ["text", "prefix", "all branches"])
def test_a_prompt_that_is_not_finite_is_skipped_alone(where):
    """The update is that of the other prompts, at two thirds of the weight."""
    model, results = tiny(), []
    method = tiny_method("on-policy", clip_range=math.inf, floor=1e-6)
    begin, predict = model.begin, model.predict
    bad = lambda prompts: torch.tensor([p == PROMPTS[1] for p in prompts])

    def broken_begin(prompts):
        context = begin(prompts)
        context.words[bad(prompts)] = math.nan
        return context

    def broken_predict(x_t, t, context):
        x0 = predict(x_t, t, context)
        wanted = begin(PROMPTS[1:2]).words
        pivot = context.kv.shape[4] // model.tokens
        if where == "all branches" or pivot == 0:
            x0[(context.words == wanted).all(1)] *= math.nan
        return x0

    model.begin, model.predict = ((broken_begin, predict) if where == "text" else
                                  (begin, broken_predict))
    adapter = nonzero(Adapter.new(model, 4, 4.0, seeded(0)))
    optimizer = torch.optim.SGD(adapter.parameters(), 1.0)
    with adapter.on(model):     # a stream whose pivot is not the first chunk
        branches, scores = explore(model, method, PROMPTS, brightness, 3, seeded(3))
    model.begin, model.predict = begin, predict
    alive = scores["reward"].isfinite().all(1)
    assert branches.prefix.shape[1] > 0 and alive.sum() == 2
    assert scores["reward"].isnan().sum() == method.group
    rows = alive.nonzero()[:, 0].tolist()
    alone = Fork([branches.prompts[i] for i in rows], branches.prefix[rows],
                 arcopo.Context(*(x[rows] for x in branches.context)), branches.states[rows],
                 branches.candidates[rows])
    for group, rewards in ((branches, scores["reward"]), (alone, scores["reward"][rows])):
        row = update(model, adapter, group, rewards, method, optimizer, 1, seeded(1))
        assert row["skipped"] == 0
        results.append([p.grad.clone() for p in adapter.parameters()])
        for p, g in zip(adapter.parameters(), results[-1]):
            p.data += g         # undo the step
    size = max(b.abs().max().item() for b in results[1])
    assert size > 1e-4 and all(
        torch.allclose(3 * a, 2 * b, atol=1e-4 * size) for a, b in zip(*results))


def test_a_branch_that_is_not_finite_stays_out_of_the_update():
    """NaN in the pivot chunk of one branch, as from a numerical overflow."""
    model = tiny()
    noise = draw_noise(model, 3, seeded(0))
    initial, solver = tiny_method("on-policy").branch_noise(noise, 1, seeded(1))
    initial = initial.clone()
    initial[1, 2] = math.nan
    branches, clips = fork(model, PROMPTS, 1, noise, initial, solver)
    rewards = clips.mean((2, 3, 4, 5))
    assert rewards.isnan().nonzero().tolist() == [[1, 2]]
    adapter = nonzero(Adapter.new(model, 4, 4.0, seeded(0)))
    optimizer = torch.optim.AdamW(adapter.parameters(), 1e-3)
    method = tiny_method("on-policy", anchors=4)
    row = update(model, adapter, branches, rewards, method, optimizer, 2, seeded(1))
    assert row["skipped"] == 0 and row["ratio_first"] == 1 and math.isfinite(row["grad_norm"])


def test_a_run_of_rewards_that_are_not_finite_moves_nothing():
    model = tiny()
    adapter = nonzero(Adapter.new(model, 4, 4.0, seeded(0)))
    before = [p.detach().clone() for p in adapter.parameters()]
    broken = lambda clips, prompts: {"reward": torch.full((len(clips),), math.nan)}
    row = trainer(model, adapter, reward=broken)(0)
    assert row["not_finite"] == 8 and row["flat_groups"] == 1
    assert all(torch.equal(a, b) for a, b in zip(before, adapter.parameters()))


def test_a_non_finite_gradient_skips_the_update():
    model = tiny()
    adapter = nonzero(Adapter.new(model, 4, 4.0, seeded(0)))
    before = [p.detach().clone() for p in adapter.parameters()]
    adapter.parameters()[0].register_hook(lambda grad: grad * float("inf"))
    row = trainer(model, adapter)(0)
    assert row["skipped"] == 2 and all(
        torch.equal(a, b) for a, b in zip(before, adapter.parameters()))


@pytest.mark.parametrize("flow", [False, True])
def test_a_few_iterations_raise_a_simple_reward(flow):
    model = tiny(flow=flow)
    adapter = Adapter.new(model, 4, 8.0, seeded(0))
    prompts, noise = TRAIN_PROMPTS[:12], draw_noise(model, 12, seeded(7))
    before = brightness(sample(model, prompts, noise), prompts)["reward"]
    step = trainer(model, adapter, 3e-3, group=6, floor=1e-6)
    for i in range(30):
        step(i)
    with adapter.on(model):
        after = brightness(sample(model, prompts, noise), prompts)["reward"]
    change = after - before
    assert change.mean() > 3 * change.std() / len(change)**0.5 > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("bf16", [False, True])
def test_cuda_agrees_with_the_cpu(bf16):
    model = tiny(bf16=bf16)
    on_cpu = forked(model, 1)[1]
    assert torch.allclose(forked(model.cuda(), 1)[1].cpu(), on_cpu, atol=0.05 if bf16 else 1e-3)
    for method in [*arcopo.METHODS, "sde-grpo"]:
        row = trainer(model,
                      nonzero(Adapter.new(model, 4, 4.0, seeded(0))),
                      method=method,
                      buffer=tiny_buffer(model))(0)
        assert row["skipped"] == 0 and (row["ratio_first"] == 1 or tiny_method(method).buffered)


class Transfers(TorchDispatchMode):
    """Where in arcopo.py a tensor goes from one device to another."""

    def __init__(self):
        super().__init__()
        self.places = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if name in ("_to_copy", "copy_", "lift_fresh"):
            source, target = (args[0], out) if name != "copy_" else (args[1], args[0])
            if source.device != target.device:
                names = [
                    frame.name for frame in traceback.extract_stack()
                    if Path(frame.filename).name == "arcopo.py"]
                self.places.append(names[-1] if names else "")
        return out


@pytest.mark.parametrize("name", ["on-policy", "semi", "off-policy", "sde-grpo", "flow"])
def test_every_method_runs_on_a_fake_gpu(name, monkeypatch):
    """On torch's fake CUDA device, tensors on the wrong device raise. What needs values is
    stubbed; its calls are counted: one decision an update, the metrics once."""
    waits = []

    def stub(result):

        def call(x, *rest, **more):
            if x.device.type == "cuda":
                waits.append(traceback.extract_stack()[-2].name)
            return result(x) if callable(result) else result

        return call

    for function, result in {
            "__bool__": True, "__int__": 1, "__index__": 0,
            "tolist": lambda x: [0.0] * x.numel()}.items():
        monkeypatch.setattr(torch.Tensor, function, stub(result))
    monkeypatch.setattr(FakeTensor, "tolist", torch.Tensor.tolist)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"):
        model = Generator(16, 1, 2, flow=name == "flow").requires_grad_(False)
        model.chunks = 2
        plain = dict(group=3, anchors=2, prompts=2, rank=2, alpha=2.0)
        kinds = {
            "semi": Method(**plain, buffered=True), "sde-grpo": sde_grpo.SdeGrpo(**plain),
            "off-policy": Method(**plain, buffered=True, clip_range=math.inf)}
        method = kinds.get(name, Method(**plain))
    with FakeTensorMode(allow_non_fake_inputs=True):
        adapter = Adapter.new(model, 2, 2.0, seeded(0))

        def backward(x):
            for p in adapter.parameters():
                p.grad = torch.zeros_like(p)

        monkeypatch.setattr(torch.Tensor, "backward", backward)
        optimizer = torch.optim.AdamW(adapter.parameters(), 1e-3)
        brightness = lambda clips, prompts: {"reward": clips.flatten(1).mean(1)}
        groups = partial(explore, model, method, TRAIN_PROMPTS, brightness, 2)
        if method.buffered:
            buffer = collect_buffer(model, method, TRAIN_PROMPTS, brightness, 2, 0)
            groups = partial(draw_from, buffer, model, 2)
        waits.clear()
        with Transfers() as transfers:
            row = iterate(model, adapter, optimizer, method, groups, seeded(1))
    assert set(row) >= {"reward", "ratio_first", "grad_norm"}
    loops = {"denoise", "rollout", "forward", "replay", "extend", "surrogate_log_policy"}
    assert transfers.places and not loops & set(transfers.places)
    assert len(waits) <= method.updates + 1


# ------------------------------------------------------------------ other generators


class Cache(NamedTuple):
    """Key and value buffers with room for all chunks, and how far they are written."""

    text: torch.Tensor  # [N, W]
    k: torch.Tensor  # [N, chunks * tokens, W]
    v: torch.Tensor
    end: int

    def repeat(self, times: int) -> "Cache":
        return Cache(*(x.repeat_interleave(times, 0) for x in self[:3]), self.end)


class Other(nn.Module):
    """A generator of another kind: any latent shape, its first axis are tokens; times in 0..1000
    with a shift of 5, preallocated caches, checkpointed blocks, prompts that are free text."""

    def __init__(self, shape=(3, 16, 2, 2), flow=False, chunks=3, checkpointed=False):
        super().__init__()
        torch.manual_seed(0)
        self.chunk_shape, self.chunks, self.flow = shape, chunks, flow
        self.checkpointed = checkpointed
        self.tokens = shape[0] if len(shape) > 1 else 1
        shift = lambda u: 5 * u / (1 + 4 * u)
        self.timesteps = tuple(shift(step / 1000) for step in (1000, 500, 100))
        self.solver_steps = 0 if flow else 2
        W, D = 16, math.prod(shape) // self.tokens
        self.into, self.qkv, self.out = nn.Linear(D, W), nn.Linear(W, 3 * W), nn.Linear(W, D)
        self.time = nn.Linear(1, W)
        self.requires_grad_(False)

    device = property(lambda self: self.into.weight.device)

    def begin(self, prompts):
        text = torch.stack([torch.randn(16, generator=seeded(0, p)) for p in prompts])
        empty = torch.zeros(len(prompts), self.chunks * self.tokens, 16)
        return Cache(text, empty, empty, 0)

    def blocks(self, x, time, text, k, v, end):
        y = torch.tanh(self.into(x) + self.time(time)[:, None] + text[:, None])
        q, key, value = self.qkv(y).chunk(3, 2)
        k, v, stop = k.clone(), v.clone(), end + self.tokens
        k[:, end:stop], v[:, end:stop] = key, value
        y = y + (q @ k[:, :stop].mT / 4).softmax(-1) @ v[:, :stop]
        return self.out(y), k, v

    def forward(self, x, t, context):
        t = torch.as_tensor(t, dtype=torch.float32).expand(len(x))[:, None]
        rows = x.reshape(len(x), self.tokens, -1)
        arguments = rows, (1000 * t) / 500 - 1, *context
        if self.checkpointed:
            again = torch.utils.checkpoint.checkpoint
            y, k, v = again(self.blocks, *arguments, use_reentrant=False)
        else:
            y, k, v = self.blocks(*arguments)
        t = t[:, :, None]
        return ((1 - t) * rows + t * y).view_as(x), k, v

    def predict(self, x_t, t, context):
        return self(x_t, t, context)[0]

    def extend(self, context, x0):
        return Cache(context.text, *self(x0, 0.0, context)[1:], context.end + self.tokens)

    @staticmethod
    def decode(latents):
        return latents


def level(clips, prompts):
    return {"reward": clips.flatten(1).mean(1)}


SHAPES_OF_LATENTS = [(6,), (2, 5), (3, 2, 4), (3, 16, 2, 2), (2, 3, 2, 2, 2)]


@pytest.mark.parametrize("flow", [False, True])
@pytest.mark.parametrize("shape", SHAPES_OF_LATENTS, ids=str)
def test_the_core_runs_on_another_generator_of_any_latent_shape(shape, flow):
    model, prompts = Other(shape, flow), ["one", "two", "three", "four"]
    before = {name: x.clone() for name, x in model.state_dict().items()}
    noise = draw_noise(model, 4, seeded(0))
    names = [*arcopo.METHODS] + ["sde-grpo"] * (not flow)
    for name in names:
        method = tiny_method(name, prompts=3)
        buffer = collect_buffer(model, method, prompts, level, 5, 0)
        adapter = nonzero(Adapter.new(model, 4, 4.0, seeded(0)))
        optimizer = torch.optim.AdamW(adapter.parameters(), 1e-2, weight_decay=0)
        groups = lambda g: (draw_from(buffer, model, 3, g)
                            if method.buffered else explore(model, method, prompts, level, 3, g))
        row = iterate(model, adapter, optimizer, method, groups, seeded(1))
        assert row["skipped"] == 0 and row["grad_norm"] > 0
        assert method.buffered or row["ratio_first"] == 1
        with adapter.on(model):
            assert sample(model, prompts, noise).shape == (4, 3, *shape)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


@pytest.mark.parametrize("flow", [False, True])
@pytest.mark.parametrize("shape", SHAPES_OF_LATENTS, ids=str)
def test_each_prompt_gets_its_own_times_whatever_the_shape(shape, flow):
    """Log-policies of a batch of prompts are those of each prompt by itself."""
    model, prompts = Other(shape, flow), ["one", "two", "three"]
    for name in ["on-policy"] + ["sde-grpo"] * (not flow):
        method = tiny_method(name)
        noise = draw_noise(model, 3, seeded(0))
        whole, _ = fork(model, prompts, 1, noise, *method.branch_noise(noise, 1, seeded(1)))
        pairs = method.draw_pairs(3, seeded(2))
        with nonzero(Adapter.new(model, 4, 4.0, seeded(0))).on(model):
            together = method.log_policies(model, whole, *pairs.T)
            for n in range(3):
                context = Cache(*(x[n:n + 1] for x in whole.context[:3]), whole.context.end)
                own = [x[n:n + 1] for x in (whole.states, whole.candidates)]
                one = Fork(prompts[n:n + 1], whole.prefix[n:n + 1], context, *own)
                for k, pair in enumerate(pairs):
                    alone = method.log_policies(model, one, *pair[None].T)
                    assert torch.allclose(alone[0, 0], together[n, k], atol=1e-5)


@pytest.mark.parametrize("method", ["on-policy", "semi", "sde-grpo"])
@pytest.mark.parametrize("model", [Other(), tiny()], ids=["other", "miniature"])
def test_slices_change_nothing_but_the_memory(model, method):
    """micro rows at a time: the same branches, clips, ratios and gradient, to rounding."""
    found = []
    for micro in (0, 3, 7, 15):  # of 15, the slices are not equal
        chosen = tiny_method(method, prompts=3, micro=micro)
        noise = draw_noise(model, 3, seeded(0))
        own = chosen.branch_noise(noise, 1, seeded(1))
        branches, clips = fork(model, PROMPTS, 1, noise, *own, micro)
        adapter = nonzero(Adapter.new(model, 4, 4.0, seeded(0)))
        optimizer = torch.optim.SGD(adapter.parameters(), 0.1)
        rewards = torch.randn(3, 4, generator=seeded(2))
        row = update(model, adapter, branches, rewards, chosen, optimizer, 2, seeded(3))
        found.append([clips, branches.candidates, *adapter.parameters()])
        assert row["skipped"] == 0
    for other in found[1:]:
        assert all(torch.allclose(x, y, rtol=1e-3, atol=1e-5) for x, y in zip(other, found[0]))


def test_gradient_checkpointing_gives_the_same_gradient():
    found = []
    for checkpointed in (False, True):
        model = Other(checkpointed=checkpointed)
        adapter = nonzero(Adapter.new(model, 4, 4.0, seeded(0)))
        method, noise = tiny_method("on-policy"), draw_noise(model, 2, seeded(0))
        with adapter.on(model):
            own = method.branch_noise(noise, 1, seeded(1))
            branches, clips = fork(model, ["a", "b"], 1, noise, *own)
        optimizer = torch.optim.SGD(adapter.parameters(), 0.0)
        rewards = level(clips.flatten(0, 1), [])["reward"].view(2, -1)
        row = update(model, adapter, branches, rewards, method, optimizer, 2, seeded(2))
        assert row["ratio_first"] == 1 and row["grad_norm"] > 0
        found.append([p.grad for p in adapter.parameters()])
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(*found))


def test_the_context_is_never_written_to():
    model = Other()
    context = model.extend(model.begin(["a", "b"]), torch.randn(2, *model.chunk_shape))
    before = copy.deepcopy(context)
    noise = draw_noise(model, 2, seeded(0))
    arcopo.rollout(model, context, noise, 1, 3)
    assert all(torch.equal(x, y) for x, y in zip(context[:3], before[:3]))


def test_lora_is_in_float32_beside_bfloat16_weights(tmp_path):
    model = Other().bfloat16()
    x = torch.randn(5, model.into.in_features, generator=seeded(0)).bfloat16()
    adapter = nonzero(Adapter.new(model, 4, 8.0, seeded(0)))
    A, B = adapter.weights["into"]
    assert all(p.dtype == torch.float32 for p in adapter.parameters())
    with adapter.on(model):
        delta = 2 * (x.float() @ A.T @ B.T)
        assert torch.equal(model.into(x), model.into.forward(x) + delta.bfloat16())
    model.fingerprint = ""
    adapter.save(tmp_path, {"base": "", "timesteps": list(model.timesteps)})
    for name, pair in Adapter.load(tmp_path, model).weights.items():
        assert all(torch.equal(x, y) for x, y in zip(pair, adapter.weights[name]))


def test_adapters_of_ones_own_model_are_saved_and_loaded(tmp_path):
    """Of any module with linear layers: no fingerprint, no times, no record."""
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
    adapter = nonzero(Adapter.new(model, 2, 4.0, seeded(0)))
    adapter.save(tmp_path, {})
    x = torch.randn(7, 3, generator=seeded(1))
    with adapter.on(model):
        expected = model(x)
    with Adapter.load(tmp_path, model).on(model):
        assert torch.equal(model(x), expected)
    assert not torch.equal(model(x), expected)
    base = arcopo.load_generator()
    Adapter.new(base, 2, 2.0).save(tmp_path, {})
    with pytest.raises(UserError, match="other weights"):
        Adapter.load(tmp_path, base)


def test_the_buffer_does_not_share_memory_with_what_a_reward_returns():
    own = torch.zeros(8)  # a reward may use one tensor again and again
    again = lambda clips, prompts: {"reward": own.copy_(clips.flatten(1).mean(1))}
    buffer = collect_buffer(Other(), tiny_method("semi"), ["a", "b"], again, 4, 0)
    expected = collect_buffer(Other(), tiny_method("semi"), ["a", "b"], level, 4, 0)
    for one, other in zip(buffer, expected, strict=True):
        assert torch.equal(one["reward"], other["reward"])


def test_lora_goes_on_the_layers_named_and_on_nothing_else():
    model = tiny()
    linear = {name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    assert set(Adapter.new(model, 2, 2.0).weights) == linear
    some = Adapter.new(model, 2, 2.0, targets=r"blocks\.\d+\.(qkv|out)")
    assert set(some.weights) == {f"blocks.{i}.{n}" for i in (0, 1) for n in ("qkv", "out")}
    with pytest.raises(UserError, match="no nn.Linear"):
        Adapter.new(model, 2, 2.0, targets="smooth.*")  # convolutions
    unused = Adapter.new(nn.ModuleDict({"a": model, "b": nn.Linear(2, 2)}), 2, 2.0, seeded(0))
    inner = {name[2:]: pair for name, pair in unused.weights.items() if name.startswith("a.")}
    inner["position_"] = unused.weights["b"]
    model.add_module("position_", nn.Linear(2, 2))  # never called: no gradient
    adapter = nonzero(Adapter(inner, 2.0))
    assert trainer(model, adapter)(0)["grad_norm"] > 0


@pytest.mark.parametrize("merged", [False, True])
def test_adapters_are_files_that_peft_loads(tmp_path, merged):
    """With peft installed (pip install peft): PeftModel gives the output that `on` gives."""
    model, folder, about = tiny(), tmp_path / "adapter", {"base": "", "timesteps": []}
    new = lambda rank, seed: nonzero(Adapter.new(model, rank, 6.0, seeded(seed), r"blocks.*|head"))
    adapter = new(4, 0)
    if merged:
        adapter = merge_adapters((adapter, 0.7), (new(3, 1), 1.0))
    adapter.save(folder, about)
    adapter.save(tmp_path / "again", about)
    assert len(list(folder.iterdir())) == 2
    for file in folder.iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    assert config["peft_type"] == "LORA"
    for name, (A, B) in adapter.weights.items():
        a, b = (tensors.pop(f"base_model.model.{name}.lora_{x}.weight") for x in "AB")
        assert a.shape == (config["r"], A.shape[1]) and b.shape == (B.shape[0], config["r"])
        ours = adapter.alpha / adapter.rank * B @ A
        assert torch.allclose(config["lora_alpha"] / config["r"] * b @ a, ours, atol=1e-7)
        assert re.fullmatch(config["target_modules"], name)
    assert not tensors
    peft = pytest.importorskip("peft")
    x, context = torch.randn(3, *model.chunk_shape), model.begin(PROMPTS)
    with adapter.on(model):
        expected = model.predict(x, 0.5, context)
    plain = model.predict(x, 0.5, context)
    found = peft.PeftModel.from_pretrained(model, folder).base_model.model.predict(x, 0.5, context)
    assert torch.allclose(found, expected, atol=1e-5)
    assert not torch.allclose(found, plain, atol=1e-3)


class Network(nn.Module):
    """What examples/self_forcing.py uses of CausalWanModel: it writes into the caches it is given,
    at their indexes, and attends to what is written."""

    def __init__(self, channels: int = 4):
        super().__init__()
        self.patch_size, self.dim, self.num_heads, self.num_frame_per_block = (1, 2, 2), 16, 2, 1
        self.into, self.out = nn.Linear(4 * channels, 16), nn.Linear(16, 4 * channels)
        self.blocks = nn.ModuleList(nn.Linear(16, 48) for _ in range(2))
        self.text, self.time = nn.Linear(32, 16), nn.Linear(1, 16)

    def forward(self, x, t, text, caches, current_start):
        patches = nn.functional.pixel_unshuffle(x, 2).movedim(2, 4)  # [1, F, h, w, 4C]
        y = self.into(patches) + self.time(t[..., None].to(x) / 1000)[:, :, None, None]
        y = (y + self.text(text).mean(1)[:, None, None, None]).flatten(1, 3)
        for block, cache in zip(self.blocks, caches):
            q, k, v = block(y.tanh()).unflatten(2, (3, 2, 8)).unbind(2)
            start = cache["local_end_index"].item()
            assert start == cache["global_end_index"].item() == current_start
            cache["k"][:, start:start + y.shape[1]] = k
            cache["v"][:, start:start + y.shape[1]] = v
            q, k, v = (z.transpose(1, 2) for z in (q, cache["k"], cache["v"]))
            z = nn.functional.scaled_dot_product_attention(q, k, v)
            y = y + z.transpose(1, 2).flatten(2)
        y = self.out(y).view(patches.shape).movedim(4, 2)
        return nn.functional.pixel_shuffle(y, 2)


class StandIn(nn.Module):
    """In place of Self-Forcing's WanDiffusionWrapper."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.model = Network()
        u = torch.linspace(1, 0, 1001)[:-1]
        self.scheduler = SimpleNamespace(sigmas=5 * u / (1 + 4 * u))

    def forward(self, x, conditional, times, kv_cache, crossattn_cache, current_start):
        text = conditional["prompt_embeds"]
        flow = self.model(x, times, text, kv_cache, current_start)
        return flow, x - times[..., None, None, None] / 1000 * flow


@pytest.mark.skipif("SELF_FORCING" not in os.environ, reason="SELF_FORCING: no copy of it")
def test_the_self_forcing_example_on_its_own_code():
    """SELF_FORCING: a folder with github.com/guandeh17/Self-Forcing."""
    command = [sys.executable, "examples/self_forcing.py", "--check", os.environ["SELF_FORCING"]]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 0 and "replay error" in done.stdout, done.stderr


def test_the_self_forcing_example_on_a_stand_in(capsys):
    """Where there is no copy of the real code."""
    from examples import check_self_forcing
    from examples.self_forcing import SelfForcing, memory

    text, vae = check_self_forcing.Text(), check_self_forcing.Vae()
    model = SelfForcing(StandIn(), text, vae, (3, 4, 4, 4), 3)
    assert model.timesteps == pytest.approx((1, 0.9375, 0.8333, 0.625), abs=1e-4)
    check_self_forcing.check(model, ["a cat", "a dog", "a boat"])
    assert "replay error" in capsys.readouterr().out
    context = model.extend(model.begin(["a", "b"]), torch.randn(2, 3, 4, 4, 4)).repeat(3)
    shared = [past[0][0][0].data_ptr() for past in context.pasts]
    assert len(set(shared)) == 2 and shared[0] == shared[2]  # nothing was copied
    assert sum(size for name, size in memory().items() if "CPU" not in name) < 80
    half = SelfForcing(StandIn().bfloat16(), text, vae, (3, 4, 4, 4), 3)  # text in float32
    assert half.begin(["a"]).texts[0].dtype == torch.bfloat16
    adapter = nonzero(Adapter.new(half, 4, 4.0, seeded(0)))
    optimizer, method = torch.optim.SGD(adapter.parameters(), 0.1), tiny_method("on-policy")
    groups = lambda g: explore(half, method, ["a", "b"], level, 2, g)
    row = iterate(half, adapter, optimizer, method, groups, seeded(0))
    assert row["ratio_first"] == 1 and row["grad_norm"] > 0 and row["skipped"] == 0


def test_own_model_learns():
    from examples import own_model

    before, after = own_model.main(40)
    assert after > before / 2  # the reward is at most 0


# ------------------------------------------------------------------ the script


def script(*arguments, cwd):
    return subprocess.run([sys.executable, HERE / "arcopo.py", *map(str, arguments)],
                          cwd=cwd,
                          capture_output=True,
                          text=True)


@pytest.fixture(scope="module")
def tiny_base(tmp_path_factory):
    file = tmp_path_factory.mktemp("base") / "base.safetensors"
    save_generator(tiny(), file)
    return file


TINY = [
    "--group", 3, "--anchors", 2, "--prompts", 2, "--rank", 2, "--alpha", 2, "--judge-samples", 2,
    "--judge-every", 2]
BUFFER = ["--buffer-groups", 3]
LEFT = {"settings.json", "judged.csv", "models.gif", "report.md"}


def left(folder: Path) -> set[str]:
    """Files of a run but for the state of its trainings."""
    return {f.name for f in folder.iterdir() if "checkpoint" not in f.name and f.name != ".lock"}


def read(file: Path) -> list[dict]:
    return list(csv.DictReader(open(file, newline="")))


def test_script_runs_the_recipe_and_samples_from_its_adapter(tmp_path, tiny_base):
    done = script("--steps", 3, "--base", tiny_base, "--out", "run", *TINY, *BUFFER, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "run"
    ends = ".csv", "-curve.csv", ""
    trained = {f"{name}{end}" for name in ("on-policy", "semi") for end in ends}
    assert left(folder) == LEFT | trained | {"buffer.safetensors", "merged"}
    rows = read(folder / "on-policy.csv")
    assert len(rows) == 3 and all(float(row["ratio_first"]) == 1 for row in rows)
    columns = "step pivot reward ta vq mq ratio_first clip_fraction flat_groups grad_norm seconds"
    assert set(columns.split()) <= set(rows[0])
    assert [row["step"] for row in read(folder / "semi-curve.csv")] == ["0", "2", "3"]
    assert {"reward", "ta", "vq", "mq"} <= set(read(folder / "semi.csv")[0])
    judged = {row["model"]: row for row in read(folder / "judged.csv")}
    sweep = ["s = 0.4", "s = 0.6", "s = 0.8", "s = 1"]
    assert list(judged) == ["base", "semi", *sweep, "on-policy"]
    both = {name: (float(row["reward"]), float(row["judge"])) for name, row in judged.items()}
    s = choose_strength({float(name[4:]): both[name] for name in sweep}, both["base"])
    assert ("semi *" if s is None else f"s = {s:g} *") in done.stdout
    assert "both reward and judge over the base" in done.stdout
    model = arcopo.load_generator(tiny_base)
    reference = sample_batches(model, TRAIN_PROMPTS, seeded(0, "calibration"), 0)
    parts = {"ta": ClipReward().text_alignment}
    text = WeightedReward(parts, {"ta": 1.0}, reference, TRAIN_PROMPTS)
    method = tiny_method("semi", group=3)
    method.sigma, generator = Settings.sigma, seeded(0, "buffer", 0)
    _, scores = explore(model, method, TRAIN_PROMPTS, text, 2, generator)
    stored = load_file(folder / "buffer.safetensors")
    for i in range(2):  # TA alone
        assert torch.allclose(stored[f"{i}.reward"], scores["reward"][i], atol=1e-4)
    names = ("on-policy", "semi", "merged")
    on, semi, merged = (Adapter.load(folder / name, model) for name in names)
    for name, (A, B) in merge_adapters((semi, 1.0), (on, s or 0.0)).weights.items():
        assert torch.allclose(B @ A, merged.weights[name][1] @ merged.weights[name][0], atol=1e-7)
    saved = json.loads((folder / "settings.json").read_text())
    assert saved["settings"]["group"] == 3 and saved["run"]["base"] == model.fingerprint
    assert {"commit", "code", "torch", "device", "date"} <= set(saved["run"])
    assert saved["run"]["command"].startswith("arcopo.py --steps 3 --base ")
    record = reward.read_weights(folder / "semi" / "adapter_model.safetensors", "")[1]
    found = {name: record[name] for name in ("method", "step", "steps", "seed", "base")}
    expected = {"method": "semi", "step": 3, "steps": 3, "seed": 0, "base": model.fingerprint}
    assert found == expected
    record = reward.read_weights(folder / "merged" / "adapter_model.safetensors", "")[1]
    assert record | expected | {"method": record["method"]} == record
    assert record["method"].startswith("merged, s")
    assert iio.imread(folder / "models.gif").shape[0] == 12
    report = (folder / "report.md").read_text(encoding="utf-8")
    assert report in done.stdout
    assert all(word in report for word in ("| base", "Δ reward", "prompts"))
    sampling = ["--sample", PROMPTS[0], "--base", tiny_base, "--adapter", folder / "merged"]
    assert script(*sampling, "--out", "c.gif", cwd=tmp_path).returncode == 0
    assert iio.imread(tmp_path / "c.gif").shape[0] == 12
    (snippet,) = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.DOTALL)
    snippet = snippet.replace("load_generator()", f"load_generator({str(tiny_base)!r})")
    snippet = snippet.replace("runs/smoke", str(folder))
    done = subprocess.run([sys.executable, "-c", snippet], cwd=HERE, capture_output=True, text=True)
    assert done.stdout.startswith("tensor(0."), done.stderr
    semi = ["--method", "semi", "--steps", 1, "--base", tiny_base, "--out", "again"]
    again = script(*semi, "--buffer", folder / "buffer.safetensors", *TINY, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert left(tmp_path / "again") == LEFT | {"semi.csv", "semi-curve.csv", "semi"}


def test_settings_can_be_chosen_on_training_prompts(tmp_path, tiny_base, capsys):
    """--judge-prompts changes what is judged, not what is trained."""
    for name in reward.JUDGE_PROMPTS:
        assert arcopo.main(["--steps", 1, "--method", "on-policy", "--judge-prompts", name,
                            "--base", tiny_base, "--out", tmp_path / name, *TINY]) == 0
        assert f"24 {name} prompts" in capsys.readouterr().out
    held_out, training = (tmp_path / name for name in ("held-out", "training"))
    one, other = (load_file(folder / "on-policy" / "adapter_model.safetensors")
                  for folder in (held_out, training))
    assert all(torch.equal(one[name], other[name]) for name in one)
    model = arcopo.load_generator(tiny_base)
    prompts = [prompt for prompt in reward.JUDGE_PROMPTS["training"] for _ in range(2)]
    clips = sample_batches(model, prompts, seeded(0, "judging"), 0)
    expected = judge(clips, prompts)["area"].mean().item()
    found, other = (float(read(folder / "judged.csv")[0]["area"]) for folder in
                    (training, held_out))
    assert math.isclose(found, expected, rel_tol=1e-3) and found != other


def test_compare_judges_every_adapter():
    model = tiny()
    adapters = {name: Adapter.new(model, 2, 2.0, seeded(0, name)) for name in arcopo.METHODS}
    score = lambda: (torch.zeros(1), {name: torch.zeros(1) for name in ("reward", "judge")})
    chosen, models, clips, results = arcopo.compare(model, adapters, [0.5, 1.0], score)
    names = ["base", "semi", "s = 0.5", "s = 1", "on-policy", "off-policy"]
    assert [*models] == [*clips] == [*results] == names and chosen == "semi"


def test_a_reward_of_ones_own_trains_and_is_in_every_table(tmp_path, tiny_base, monkeypatch,
                                                           capsys):
    """Of a module in the current folder, with prompts of one's own."""
    (tmp_path / "my_rewards.py").write_text(
        "def blue(clips, prompts):\n"
        "    assert clips.shape[1:] == (12, 3, 32, 32) and len(clips) == len(prompts)\n"
        "    return clips[:, :, 2].mean((1, 2, 3))\n")
    (tmp_path / "prompts.txt").write_text("\n".join([*TRAIN_PROMPTS[:5], "", TRAIN_PROMPTS[0]]))
    mine = ["--reward", "ta=1,my_rewards:blue=0.5", "--buffer-reward", "my_rewards:blue=1"]
    common = ["--steps", 1, "--base", tiny_base, "--out", "run", "--prompts-file", "prompts.txt"]
    done = script(*common, *mine, *TINY, *BUFFER, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for file in ("on-policy.csv", "on-policy-curve.csv", "semi-curve.csv", "judged.csv"):
        assert {"reward", "ta", "my_rewards:blue"} <= set(read(tmp_path / "run" / file)[0])
        assert "vq" not in read(tmp_path / "run" / file)[0]
    record = reward.read_weights(tmp_path / "run" / "buffer.safetensors", "")[1]
    assert set(record["prompts"]) <= set(TRAIN_PROMPTS[:5])
    assert record["reward"] == {"my_rewards:blue": 1.0}
    reused = ["--method", "semi", "--buffer", "run/buffer.safetensors", *mine, *TINY]
    others = script(*common[:4], *reused, "--out", "others", cwd=tmp_path)
    assert others.returncode == 2 and "made with training prompts" in others.stderr
    few = script(*common[:-1], tmp_path / "few.txt", cwd=tmp_path)
    assert few.returncode == 2 and few.stderr.count("\n") == 1
    monkeypatch.syspath_prepend(tmp_path)
    for i, wrong in enumerate(("lambda clips, prompts: clips", "lambda clips: 1",
                               "lambda c, p: None")):
        (tmp_path / f"wrong{i}.py").write_text(f"blue = {wrong}\n")
        line = [*common[:4], "--reward", f"wrong{i}:blue=1", "--out", tmp_path / "wrong"]
        assert arcopo.main(line) == 2 and not (tmp_path / "wrong").exists()
        error = capsys.readouterr().err
        assert f"wrong{i}:blue" in error and error.count("\n") == 1


def signed(saved: str) -> str:
    """A settings.json with the checksum that it should have."""
    content = json.loads(saved)
    content.pop("checksum")
    return json.dumps(content | {"checksum": reward.checksum({}, content)})


class Crash(BaseException):
    """What kill -9 is to a process."""


def unfinished(folder: Path) -> dict:
    """All that a run must end with whatever happened: files by name, without seconds."""
    found = {}
    for file in sorted(folder.rglob("*")):
        name = str(file.relative_to(folder))
        if file.suffix == ".csv":
            drop = lambda row: {k: v for k, v in row.items() if k != "seconds"}
            found[name] = [drop(row) for row in read(file)]
        elif file.suffix in (".safetensors", ".gif") and "checkpoint" not in name:
            found[name] = file.read_bytes()
        elif "checkpoint" in name and not name.endswith(".previous"):
            found[name] = {k: x.tolist() for k, x in load_file(file).items()}
    return found


def test_a_run_killed_anywhere_ends_as_if_it_was_never_killed(tmp_path, tiny_base, monkeypatch,
                                                              capsys):
    """Each write of a file and each iteration is one place to die; every 17th of them is tried,
    before and after the write."""
    arguments = ["--steps", 3, "--save-every", 2, "--base", tiny_base, "--sweep", "0.5"]
    arguments += [*TINY[:-1], 1, *BUFFER]  # --judge-every 1
    count, die_at = [0], [None]

    def deadly(function, after):

        def call(*a, **k):
            count[0] += 1
            dies = count[0] == die_at[0]
            if dies and not after:
                raise Crash
            result = function(*a, **k)
            if dies:
                raise Crash
            return result

        return call

    monkeypatch.setattr(reward.os, "replace", deadly(reward.os.replace, False))
    monkeypatch.setattr(arcopo, "iterate", deadly(arcopo.iterate, True))
    monkeypatch.setattr(arcopo, "explore", deadly(arcopo.explore, True))
    assert arcopo.main([*arguments, "--out", tmp_path / "whole"]) == 0
    whole, places = unfinished(tmp_path / "whole"), count[0]
    assert places > 40
    for i, place in enumerate(range(3, places, 17)):
        out = tmp_path / f"killed{i}"
        count[0], die_at[0] = 0, place
        with pytest.raises(Crash):
            arcopo.main([*arguments, "--out", out])
        die_at[0] = None
        assert arcopo.main(["--resume", out]) == 0
        again = unfinished(out)
        assert again.keys() == whole.keys()
        assert not [name for name in whole if whole[name] != again[name]]
    capsys.readouterr()
    assert arcopo.main(["--resume", out]) == 2 and "complete" in capsys.readouterr().err


def test_resume_refuses_what_it_cannot_go_on_with(tmp_path, tiny_base, monkeypatch, capsys):
    listed = tmp_path / "prompts.txt"
    listed.write_text("\n".join(TRAIN_PROMPTS))
    arguments = ["--method", "on-policy", "--steps", 2, "--save-every", 1, "--base", tiny_base,
                 "--prompts-file", listed]
    out = tmp_path / "run"
    plain, calls = arcopo.iterate, []

    def dies(*a):
        calls.append(1)
        if len(calls) == 2:
            raise Crash
        return plain(*a)

    monkeypatch.setattr(arcopo, "iterate", dies)
    with pytest.raises(Crash):
        arcopo.main([*arguments, "--out", out, *TINY])

    def refused(says: str, *more) -> None:
        before = {f: f.read_bytes() for f in out.rglob("*") if f.is_file()}
        capsys.readouterr()
        assert arcopo.main(["--resume", out, *more]) == 2
        error = capsys.readouterr().err.splitlines()
        assert says in error[-1] and not [line for line in error if "Traceback" in line]
        assert before == {f: f.read_bytes() for f in out.rglob("*") if f.is_file()}

    refused("from the run", "--lr", 0.1)
    with open(out / ".lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        refused("another process")
    saved = (out / "settings.json").read_text()
    code = reward.version()["code"]
    (out / "settings.json").write_text(saved.replace('"group": 3', '"group": 4'))
    refused("settings.json was changed")
    (out / "settings.json").write_text(signed(saved.replace(code, "0" * 16)))
    refused("changed since")
    (out / "settings.json").write_text(signed(saved.replace('"group"', '"troupe"')))
    refused("other settings")
    (out / "settings.json").write_text(saved)
    save_generator(tiny(seed=3), tiny_base)  # another base in the same place
    refused("--base has changed")
    save_generator(tiny(), tiny_base)
    listed.write_text("\n".join(TRAIN_PROMPTS[1:]))
    refused("--prompts-file has changed")
    listed.write_text("\n".join(TRAIN_PROMPTS))
    with monkeypatch.context() as patch:
        alignment = reward.ClipReward.text_alignment
        patch.setattr(reward.ClipReward, "text_alignment", lambda *a: alignment(*a) * 1.1)
        refused("reward ta has changed")
    newest, older = (out / f"on-policy.checkpoint.safetensors{e}" for e in ("", ".previous"))
    whole = newest.read_bytes()
    newest.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    kept = older.read_bytes()
    older.write_bytes(kept[:100])
    refused("damaged")
    older.write_bytes(kept)
    assert arcopo.main(["--resume", out]) == 0  # from the one before
    assert "going back" in capsys.readouterr().err and len(read(out / "on-policy.csv")) == 2


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path, tiny_base):
    command = [sys.executable, HERE / "arcopo.py", "--method", "on-policy", "--steps", "1000"]
    command += ["--base", tiny_base, "--out", "run", *TINY]
    process = subprocess.Popen([*map(str, command)],
                               cwd=tmp_path,
                               stderr=subprocess.PIPE,
                               stdout=subprocess.PIPE)
    rows = tmp_path / "run" / "on-policy.csv"
    while not (rows.exists() and len(read(rows)) > 2) and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 130 and b"Traceback" not in error
    assert error.decode().strip().splitlines()[-1].endswith("continue with --resume run")
    record = reward.read_weights(tmp_path / "run" / "on-policy.checkpoint.safetensors", "")[1]
    assert len(record["state"]["rows"]) == len(read(rows))


def share_of_an_update(part: slice, spoiled: bool = False) -> list[torch.Tensor]:
    """Parameters after two updates on these of four groups; spoiled: the last one overflows."""
    model, prompts = tiny(), TRAIN_PROMPTS[:4]
    method, noise = tiny_method("on-policy"), draw_noise(model, 4, seeded(0))
    branches, _ = fork(model, prompts, 1, noise, *method.branch_noise(noise, 1, seeded(1)))
    if spoiled:
        branches.candidates[-1] = 1e30
    context = type(branches.context)(*(x[part] for x in branches.context))
    branches = Fork(prompts[part], branches.prefix[part], context, branches.states[part],
                    branches.candidates[part])
    rewards = torch.randn(4, 4, generator=seeded(2))[part]
    adapter = nonzero(Adapter.new(model, 4, 4.0, seeded(3)))
    optimizer = torch.optim.SGD(adapter.parameters(), 1.0)
    row = update(model, adapter, branches, rewards, method, optimizer, 2, seeded(4))
    assert row["skipped"] == 2 * spoiled
    return [p.detach() for p in adapter.parameters()]


def one_of_two_processes(folder: Path, base: Path) -> None:
    """What each process does in the test below, started by torchrun."""
    rank = reward.RANK
    torch.distributed.init_process_group("gloo")
    share = slice(2 * rank, 2 * rank + 2)
    parts = [share_of_an_update(share, spoiled) for spoiled in (False, True)]
    torch.save(parts, folder / f"{rank}.pt")
    arguments = ["--method", "on-policy", "--steps", 3, "--save-every", 1, "--base", base]
    arguments += ["--device", "cpu", *TINY]
    assert arcopo.main([*arguments, "--out", folder / "whole"]) == 0
    plain, calls = arcopo.iterate, []

    def dies(*a):
        calls.append(1)
        if len(calls) == 3:
            raise Crash
        return plain(*a)

    arcopo.iterate = dies
    with pytest.raises(Crash):
        arcopo.main([*arguments, "--out", folder / "killed"])
    arcopo.iterate = plain
    torch.distributed.barrier()
    assert arcopo.main(["--resume", folder / "killed"]) == 0
    torch.distributed.destroy_process_group()


def test_two_processes_are_one_with_the_groups_of_both(tmp_path, tiny_base):
    """The update is that of one process to rounding, a gradient that is not finite on one skips
    it on both, one writes, and a run resumes."""
    code = ("import sys; from pathlib import Path; import test_arcopo; "
            "test_arcopo.one_of_two_processes(*map(Path, sys.argv[1:]))")
    (tmp_path / "worker.py").write_text(code)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run([*torchrun, tmp_path / "worker.py", tmp_path, tiny_base],
                          env=os.environ | {"PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"},
                          capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    both = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    alone = share_of_an_update(slice(0, 4))
    before = [p.detach() for p in nonzero(Adapter.new(tiny(), 4, 4.0, seeded(3))).parameters()]
    for a, b, expected, start in zip(both[0][0], both[1][0], alone, before):
        assert torch.equal(a, b)
        assert torch.allclose(a - start, expected - start, rtol=1e-3, atol=1e-6)
    assert any(not torch.equal(x, start) for x, start in zip(alone, before))
    for spoiled in (both[0][1], both[1][1]):
        assert all(torch.equal(x, start) for x, start in zip(spoiled, before))
    whole, killed = (unfinished(tmp_path / name) for name in ("whole", "killed"))
    assert whole == killed
    assert {float(row["ratio_first"]) for row in whole["on-policy.csv"]} == {1.0}
    assert done.stdout.count("Run folder") == 2  # of one process, in two runs


@pytest.mark.parametrize("method", ["on-policy", "off-policy", "sde-grpo"])
def test_each_method_runs_alone(method, tmp_path, tiny_base, capsys):
    arguments = ["--steps", 1, "--base", tiny_base, "--out", tmp_path / "run", *TINY]  # not strings
    if method == "sde-grpo":
        assert sde_grpo.main([*arguments, "--anchors", 3]) == 0
    else:
        more = BUFFER if method == "off-policy" else []
        assert arcopo.main(["--method", method, *arguments, *more]) == 0
    files = left(tmp_path / "run") - {"buffer.safetensors"}
    assert files == LEFT | {f"{method}.csv", f"{method}-curve.csv", method}
    assert [row["model"] for row in read(tmp_path / "run" / "judged.csv")] == ["base", method]


def test_a_run_that_is_not_finite_says_so(tmp_path, tiny_base, capsys, monkeypatch):
    plain = WeightedReward.__call__
    monkeypatch.setattr(
        WeightedReward, "__call__", lambda self, clips, prompts: {
            name: value * math.nan for name, value in plain(self, clips, prompts).items()})
    arguments = ["--method", "on-policy", "--steps", 1, "--base", tiny_base]
    assert arcopo.main([*arguments, "--out", tmp_path / "run", *TINY]) == 1
    assert "6 rewards left out" in capsys.readouterr().err


def test_a_flow_model_trains_by_the_same_command(tmp_path, capsys):
    save_generator(tiny(flow=True), tmp_path / "teacher.safetensors")
    arguments = [
        "--steps", 1, "--base", tmp_path / "teacher.safetensors", "--out", tmp_path / "run", *TINY,
        *BUFFER]
    assert arcopo.main([str(a) for a in arguments]) == 0
    assert (tmp_path / "run" / "merged" / "adapter_model.safetensors").is_file()
    assert sde_grpo.main([*arguments[:5], tmp_path / "no"]) == 2
    assert "no noise" in capsys.readouterr().err and not (tmp_path / "no").exists()


@pytest.mark.parametrize("flow", [False, True])
def test_the_entropy_study_measures_a_change_only_where_noise_is_redrawn(flow, tmp_path,
                                                                         monkeypatch):
    monkeypatch.setattr(entropy, "HELD_OUT_PROMPTS", PROMPTS)
    save_generator(tiny(flow=flow), tmp_path / "base.safetensors")
    assert entropy.main(["--base", tmp_path / "base.safetensors", "--out", tmp_path / "run"]) == 0
    rows = list(csv.DictReader(open(tmp_path / "run" / "entropy.csv")))
    assert len(rows) == (2 if flow else 5) * CHUNKS
    for row in rows:  # rows of a batch may round differently
        for column in ("pivot_chunk", "from_pivot_on", "reward"):
            assert (float(row[column]) < 1e-4) == (row["source"] == "nothing"), row


def test_the_base_study(tmp_path, tiny_base, monkeypatch):
    """Its correlations are numpy's; sharp clips score higher than training clips."""
    from studies import base

    x, y, z = torch.randn(3, 5, 4, generator=seeded(0)).double()
    x, y = x + z, y - z
    flat = lambda w: (w - w.mean(1, keepdim=True)).flatten().numpy()
    assert np.isclose(base.correlation(x, y), np.corrcoef(flat(x), flat(y))[0, 1])
    rest = [w - flat(z) * np.dot(w, flat(z)) / np.dot(flat(z), flat(z)) for w in (flat(x), flat(y))]
    assert np.isclose(base.partial_correlation(x, y, z), np.corrcoef(*rest)[0, 1])
    monkeypatch.setattr(base, "HELD_OUT_PROMPTS", PROMPTS)
    monkeypatch.setattr(base, "TRAIN_PROMPTS", TRAIN_PROMPTS[:6])
    assert base.main(["--base", tiny_base, "--out", tmp_path / "run"]) == 0
    found = {(row["subject"], row["measure"]): float(row["value"])
             for row in read(tmp_path / "run" / "base.csv")}
    for name in base.SCORES[1:]:
        assert found["sharp clips", name] > found["training clips", name]
    assert all(found[f"pivot {p + 1}", "deviation"] > 0 for p in range(CHUNKS))
    assert all(abs(value) <= 1 for (_, measure), value in found.items()
               if measure.endswith("area"))         # its clips are all equally bright


def test_the_cost_study_counts_every_part(tmp_path, tiny_base, capsys, monkeypatch):
    """What it counts is the number of rows that predict gets; its report names the limit."""
    monkeypatch.setattr(cost, "SCALES", [("group", 6), ("width", 32)])
    monkeypatch.setattr(cost, "ROUNDS", 1)
    assert cost.main(["--base", tiny_base, "--out", tmp_path / "run", *TINY[:10]]) == 0
    rows = {row["part"]: row for row in read(tmp_path / "run" / "cost.csv")}
    assert len(rows) == 3 * CHUNKS + 7 + 2 + 3
    assert all(float(row["operations"]) > 0 for name, row in rows.items() if name != "prefix 1")
    assert "| share reached" in capsys.readouterr().out
    model, predicted = arcopo.load_generator(tiny_base), [0]
    plain = model.forward

    def counting(x, t, context):
        predicted[0] += len(x) * (3 if torch.is_grad_enabled() else 1)
        return plain(x, t, context)

    model.forward = counting
    it = cost.Iteration(model, tiny_settings(), anchors=2)
    parts, counted = cost.measure(it, brightness), cost.counts(model, it.method)
    for name, call in parts.items():
        predicted[0] = 0
        call()
        if name in counted:
            assert predicted[0] == counted[name], name


def test_the_durations_study_runs_the_commands_of_the_readme(tmp_path, monkeypatch):
    from studies import durations

    called = []

    def call(words):
        called.append(words)
        out = Path(words[words.index("--out") + 1]) if "--out" in words else tmp_path / "none"
        out.mkdir(exist_ok=True)
        (out / "buffer.safetensors").write_bytes(bytes(2_000_000))
        for stage, seconds in (("teacher", 3), ("student", 5)):
            reward.write_rows(out / f"{stage}.csv", [{"seconds": seconds}] * 2)
        return 1.5

    monkeypatch.setattr(durations, "run", call)
    assert durations.main(["--out", tmp_path / "run"]) == 0
    assert [" ".join(words).partition(" --out")[0] for words in called[:3]] == [
        "python arcopo.py --steps 100", "pytest",
        "python arcopo.py --steps 2 --judge-samples 1 --buffer-groups 4"]
    rows = {row["what"]: row for row in read(tmp_path / "run" / "durations.csv")}
    assert rows["the recipe"]["value"] == "1.5" and float(rows["the recipe's buffer"]["value"]) == 2
    assert rows["student, bf16"]["value"] == "5.0" and float(rows["`assets/`"]["value"]) > 20
    assert durations.main(["--out", tmp_path / "run"]) == 2             # it is not empty


def test_studies_run_as_modules(tmp_path):
    runs = {"tables": ["--check"], "train_clip": ["--steps", 1, "--out", tmp_path / "clip"]}
    for name, more in runs.items():
        command = [sys.executable, "-m", f"studies.{name}", *map(str, more)]
        done = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_lines_fit_100_columns():
    for file in [f for part in ("", "studies/", "examples/") for f in HERE.glob(f"{part}*.py")]:
        long = [i + 1 for i, line in enumerate(file.read_text().splitlines()) if len(line) > 100]
        assert not long, (file, long)


def test_imports_go_one_way():
    """studies, examples -> arcopo -> reward; the code of the method does not name the studies."""
    for name, banned in (("arcopo.py", "studies|examples|test_arcopo"),
                         ("reward.py", "studies|examples|arcopo|test_arcopo")):
        lines = [
            line for line in (HERE / name).read_text().splitlines()
            if re.match(r"\s*(import|from)\s", line)]
        assert len(lines) > 5 and not [
            line for line in lines if re.search(rf"\b({banned})\b", line)]


def test_muon_runs_in_float32():
    """Equal to its polynomial on the singular values; in bfloat16 the error is 3 %."""
    torch.manual_seed(0)
    gradient = torch.randn(24, 40)
    weight = nn.Parameter(torch.zeros(24, 40))
    weight.grad = gradient.clone()
    muon = torch.optim.Muon([weight], weight_decay=0, momentum=0, nesterov=False)
    train_clip.step_with([muon], 1.0)
    u, s, v = torch.linalg.svd(gradient.double() / gradient.double().norm(), full_matrices=False)
    a, b, c = muon.defaults["ns_coefficients"]
    for _ in range(muon.defaults["ns_steps"]):
        s = a * s + b * s**3 + c * s**5
    assert torch.allclose(-weight.double(), u * s @ v, atol=1e-4)
    assert torch.equal(weight.grad, gradient)


def test_pretraining_resumes_to_the_same_weights(tmp_path, monkeypatch):
    """Interrupted in either stage, a resumed run ends with the same weights, bit for bit."""
    few = [
        "--teacher-steps", 4, "--student-steps", 4, "--batch", 2, "--width", 16, "--layers", 1,
        "--heads", 1, "--device", "cpu"]
    run = lambda out, *more: pretrain.pretrain(
        pretrain.parse(["--out", tmp_path / out, *few, *more]))
    monkeypatch.setattr(pretrain, "SAVE_EVERY", 2)
    run("whole")
    plain, calls = pretrain.draw_batch, []

    def dies(*arguments):
        calls.append(1)
        if len(calls) in (4, 10):
            raise KeyboardInterrupt
        return plain(*arguments)

    monkeypatch.setattr(pretrain, "draw_batch", dies)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run("broken")
    run("broken")
    assert len(calls) == 8 + 2 + 2  # two died, two were not yet saved
    for name in ("teacher", "base"):
        a, b = (load_file(tmp_path / out / f"{name}.safetensors") for out in ("whole", "broken"))
        assert all(torch.equal(a[k], b[k]) for k in a)
    with pytest.raises(UserError, match="other settings"):
        run("broken", "--batch", 3)


def broken_files(folder: Path, tiny_base: Path) -> dict[str, Path]:
    names = "truncated flipped other misshapen timeless infinite tensorless afile headless"
    files = {name: folder / f"{name}.safetensors" for name in ["missing", *names.split()]}
    whole = tiny_base.read_bytes()
    files["truncated"].write_bytes(whole[:5000])
    files["flipped"].write_bytes(whole[:-100] + bytes([whole[-100] ^ 1]) + whole[-99:])
    save_file({"x": torch.zeros(2)}, files["other"])
    tensors, shape = load_file(tiny_base), {"width": 32, "layers": 2, "heads": 2}
    write = lambda name, more, **about: reward.write_weights(files[name], tensors | more, about)
    times = {"timesteps": [1.0, 0.5]}
    write("misshapen", {"head.bias": torch.zeros(7)}, generator=shape | times)
    write("timeless", {}, generator=shape | {"timesteps": []})
    write("headless", {}, generator=shape | times | {"heads": "2"})
    write("infinite", {"head.bias": tensors["head.bias"] * math.nan}, generator=shape | times)
    reward.write_weights(files["tensorless"], {"x": torch.zeros(2)}, {"prompts": 3})
    base = arcopo.load_generator(tiny_base)
    about = {"base": base.fingerprint, "timesteps": list(base.timesteps)}
    folders = {name: folder / name for name in ("foreign", "timed", "misfit", "huge", "folder")}
    Adapter.new(base, 4, 4.0).save(folders["foreign"], about | {"base": "another"})
    Adapter.new(base, 4, 4.0).save(folders["timed"], about)
    adapter = Adapter.new(base, 4, 4.0)
    adapter.weights["head"] = (torch.zeros(4, 31), adapter.weights["head"][1])
    adapter.save(folders["misfit"], about)
    adapter = Adapter.new(base, 4, 4.0)
    adapter.weights["head"] = tuple(x.double() + 1e300 for x in adapter.weights["head"])
    adapter.save(folders["huge"], about)
    folders["folder"].mkdir()
    files["afile"].write_text("in the way")
    (folder / "held_out.txt").write_text(HELD_OUT_PROMPTS[0])
    (folder / "pink.txt").write_text("a red circle moving left\na pink circle moving up")
    (folder / "empty.txt").write_text("\n\n")
    return files | folders | {"here": folder}


BAD = [(["--sample", "a pink circle moving right"], "pink"),
       (["--sample", "circle red a"], "not of the world"), (["--bogus", "3"], "--bogus"),
       (["--lr", "-1"], "--lr"), (["--lr", "nan"], "--lr"), (["--lr", "x"], "--lr"),
       (["--seed", "-1"], "--seed"), (["--anchors", "0"], "--anchors"),
       (["--group", "1"], "--group"), (["--group", "3"], "--anchors"), (["--sigma", "0"], "(0, 1]"),
       (["--sigma", "1.1"], "(0, 1]"), (["--steps", "0"], "--steps"), (["--steps",
                                                                        "-5"], "--steps"),
       (["--quasi-norm", "3"], "--quasi-norm"), (["--precision", "fp8"], "bf16"),
       (["--device", "tpu9"], "--device"), (["--device", "meta"], "--device"),
       (["--reward", "ta=1,zz=2"], "ta, vq, mq"), (["--reward", "ta=-1"], "ta, vq, mq"),
       (["--reward", "ta=0"], "ta, vq, mq"), (["--reward", "ta"], "ta, vq, mq"),
       (["--reward", "ta=1,ta=2"], "different NAMEs"), (["--reward", "ta=1e300"], "1e6"),
       (["--quasi-norm", "0.01"], "[0.1, 2]"),
       (["--prompts", "97"], "96 training prompts"),
       (["--targets", "a{{99999999999}}"], "too large"),
       (["--sweep", "0.4,0.40000001"], "six digits"),
       (["--reward", "no_such_module:f=1"], "ModuleNotFoundError"),
       (["--reward", "math:no_such=1"], "AttributeError"),
       (["--reward", "math:sqrt=1"], "failed (TypeError"),
       (["--reward", "hps=1"], "huggingface.co/xswu/HPSv2"),
       (["--reward", "aesthetic=1"], "vit_large_patch14_clip_224.openai"),
       (["--prompts-file", "{missing}"], "cannot be read"),
       (["--prompts-file", "{here}/held_out.txt", "--prompts", 1], "is held out"),
       (["--prompts-file", "{here}/pink.txt", "--prompts", 2], "pink"),
       (["--prompts-file", "{here}/empty.txt"], "has 0 different"),
       (["--targets", "nothing"], "no nn.Linear"), (["--targets", "("], "--targets"),
       (["--micro", "2"], "at least --prompts"),
       (["--resume", "{missing}"], "not the folder of a run"),
       (["--resume", "{folder}", "--lr", "0.1"], "from the run"), (["--lr", "1e39"], "--lr"),
       (["--seed", "9223372036854775808"], "--seed"), (["--group", "2147483648"], "--group"),
       (["--judge-samples", "2147483648"], "--judge-samples"), (["--out", "a\0b"], "null byte"),
       (["--base", "{flipped}"], "checksum"), (["--base", "{headless}"], "not a generator"),
       (["--adapter", "{missing}"], "--sample"),
       (["--method", "on-policy", "--sweep", "1"], "no effect with --method on-policy"),
       (["--method", "semi", "--lr", "0.1"], "no effect with --method semi"),
       (["--method", "off-policy", "--clip-range", "0.1"], "no effect"),
       (["--sample", PROMPTS[0], "--steps", "3"], "no effect with --sample"),
       (["--base", "{missing}"], "no such file"), (["--base", "{truncated}"], "safetensors"),
       (["--base", "{other}"], "not a file of this project"),
       (["--base", "{misshapen}"], "head.bias"), (["--base", "{timeless}"], "timesteps"),
       (["--base", "{infinite}"], "not finite"), (["--rank", "99999999"], "--rank"),
       (["--sample", PROMPTS[0], "--adapter", "{missing}"], "no such file"),
       (["--sample", PROMPTS[0], "--adapter", "{folder}"], "no such file"),
       (["--sample", PROMPTS[0], "--adapter", "{huge}"], "float64"),
       (["--sample", PROMPTS[0], "--adapter", "{misfit}"], "head"),
       (["--sample", PROMPTS[0], "--adapter", "{timed}", "--timesteps", "1,0.4"], "other times"),
       (["--sample", PROMPTS[0], "--adapter", "{foreign}"], "other weights"),
       (["--buffer-reward", "tb=1"], "--buffer-reward"), (["--sample", ""], "--sample"),
       (["--sample", PROMPTS[0], "--method", "semi"], "no effect"),
       (["--method", "grpo"], "on-policy"), (["--sweep", "0.4;1"], "--sweep"),
       (["--sweep", "0"], "--sweep"), (["--clip-range", "0"], "--clip-range"),
       (["--clip-range", "nan"], "--clip-range"), (["--timesteps", "1,x"], "--timesteps"),
       (["--timesteps", "1,0.5,0.6"], "--timesteps"), (["--timesteps", "0.9,0.5"], "--timesteps"),
       (["--buffer", "{missing}"], "no such file"),
       (["--buffer", "{other}"], "not a file of this project"),
       (["--buffer", "{tensorless}"], "made with"), (["--timesteps", "1,nan"], "--timesteps"),
       (["--buffer", "{missing}", "--method", "on-policy"], "no effect"),
       (["--buffer-groups", "0"], "--buffer-groups"), (["--out", "{afile}/run"], "is a file"),
       (["--sample", PROMPTS[0], "--out", "{afile}/c.gif"], "is a file"),
       (["--out", "."], "not empty"), (["--out", "{afile}"], "is a file"),
       (["--sample", PROMPTS[0], "--out", "clip.mp4"], ".gif"),
       (["--clip", "{missing}"], "open_clip"), (["--clip", "NoSuch:tag"], "NoSuch"),
       (["--clip", "ViT-B-32:nosuchtag"], "laion2b"), (["--clip",
                                                        "ViT-B-32:{afile}.pt"], "neither"),
       (["--clip", "ViT-B-32:{other}"], "cannot load"),
       (["--clip", "{other}"], "open_clip_config.json")]


@pytest.mark.parametrize("arguments, says", BAD, ids=[" ".join(map(str, a)) for a, _ in BAD])
def test_bad_input_is_one_line_exit_code_2_and_nothing_written(arguments, says, tmp_path, tiny_base,
                                                               capsys, monkeypatch):
    files = broken_files(tmp_path, tiny_base)
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    arguments = [str(a).format(**files) for a in arguments]
    if "--base" not in arguments and "--resume" not in arguments:
        arguments += ["--base", str(tiny_base)]
    assert arcopo.main(arguments) == 2
    out, error = capsys.readouterr()
    assert error.count("\n") == 1 and error.startswith("arcopo: ") and says in error and not out
    assert sorted(tmp_path.rglob("*")) == before and files["afile"].read_text() == "in the way"


@pytest.mark.parametrize("arguments, says",
                         [(["--steps", "0"], "--steps"), (["--bogus"], "--bogus"),
                          (["--seed", "-1"], "--seed"), (["--out", "{afile}"], "is a file"),
                          (["--out", ""], "empty"), (["--out=--"], "not a value")])
def test_bad_input_of_the_studies(arguments, says, tmp_path, tiny_base, capsys):
    files = broken_files(tmp_path, tiny_base)
    for study in (train_clip, pretrain, entropy, sde_grpo):
        more = [
            a.replace("--steps", "--teacher-steps") if study is pretrain else a for a in arguments]
        assert study.main([a.format(**files) for a in more]) == 2
        out, error = capsys.readouterr()
        assert error.count("\n") == 1 and error.startswith(study.__name__.split(".")[-1] + ": ")
        assert says in error.replace("--teacher-steps", "--steps") and not out


def test_terminals_without_unicode_do_not_crash_it(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert arcopo.main(["--help"]) == 0
    sys.stdout.flush()
    assert b"--sigma" in sys.stdout.buffer.getvalue()


def test_retraining_the_clip_writes_what_open_clip_loads(tmp_path):
    assert train_clip.main(["--steps", 2, "--out", tmp_path / "clip"]) == 0
    scorer = ClipReward(str(tmp_path / "clip"))
    assert scorer.text_alignment(make_clips(PROMPTS, seeded(0)), PROMPTS).shape == (3,)


def test_weights_never_load_through_pickle(tmp_path, tiny_base):

    class Runs:

        def __reduce__(self):
            return (Path(tmp_path / "ran").touch, ())

    torch.save(Runs(), tmp_path / "base.pt")
    with pytest.raises(UserError, match="safetensors"):
        arcopo.load_generator(tmp_path / "base.pt")
    with pytest.raises(UserError, match="cannot load"):
        ClipReward(f"ViT-B-32:{tmp_path / 'base.pt'}")
    assert not (tmp_path / "ran").exists()
    code = (HERE / "arcopo.py").read_text() + (HERE / "reward.py").read_text()
    assert code.count("torch.load(") == code.count("weights_only=True)") == 1


# ------------------------------------------------------------------ hostile input

HOSTILE = ["", " ", "nan", "-inf", "inf", "-1", "0", "0.5", "3", "1e39", "1e-320", "9" * 30, "1_0"]
HOSTILE += ["2.0", "0x10", "a\0b", "\udcff", "é", "(", "a{99999999999}", "%s", "-", "--", "5"]
HOSTILE += ["/dev/null", "ta=1", "ta=1,ta=2", "ta=1e300", "ta=1e-320", "sys:exit=1", "1,0.5", "1,1"]
HOSTILE += ["0.4,0.40000001", "cuda:99", "cpu", "semi", "bf16", "..", "x" * 300, "a\nb", "--lr"]
STRANGE = [None, "2", "", 0, -1, 3, 2.0, 1e9, 10**9, True, [], {}, math.nan, 1e308, "x", [None]]


class Started(BaseException):
    """A command line was accepted: its training would start."""


def test_a_fuzz_of_command_lines(tmp_path, tiny_base, capsys, monkeypatch):
    """Each setting arrives as it was given, or one line says why not and nothing is written."""

    def starts(*a, **k):
        raise Started

    scorer = SimpleNamespace(weights={}, scales={}, hashes=dict, reweighted=lambda weights: scorer)
    monkeypatch.setattr(arcopo, "WeightedReward", lambda *a: scorer)
    monkeypatch.setattr(arcopo, "sample_batches", lambda *a: None)
    for name in ("align", "collect_buffer", "save_gif"):
        monkeypatch.setattr(arcopo, name, starts)
    monkeypatch.chdir(tmp_path)
    random, count, accepted = Random(0), 0, 0
    names = [name for name in Settings.__dataclass_fields__ if name != "out"]
    modes = [[], ["--method", "on-policy"], ["--method", "semi"], ["--sample", PROMPTS[0]]]
    for name in names * 8:
        count += 1
        mode, out = random.choice(modes), tmp_path / f"{count}.gif"
        text = random.choice([*HOSTILE, "0.5", "3", "3", "5", "5", "ta=1", "semi"])
        line = [*mode, "--base", tiny_base, f"--{name.replace('_', '-')}={text}", "--out", out]
        try:
            code = arcopo.main(line)
        except Started:
            code, accepted = 0, accepted + 1
        error = capsys.readouterr().err
        if code == 0:
            value = getattr(arcopo.parse(line), name)
            assert value == type(value)(text), line
        else:
            assert code == 2 and error.count("\n") == 1 and error.startswith("arcopo: "), line
            assert not out.exists() and "Traceback" not in error, line
        shutil.rmtree(out, ignore_errors=True)
    assert count > 250 and accepted > 10 and not list(tmp_path.iterdir())


def spoiled(data: bytes, random: Random) -> bytes:
    """Truncated, one bit flipped, a part zeroed or removed, or bytes added."""
    at, how = random.randrange(len(data)), random.randrange(6)
    rest = data[at + random.randrange(1, 99):]
    parts = {0: b"", 1: bytes(len(data) - at - len(rest)) + rest, 2: rest}
    flipped = bytes([data[at] ^ 1 << random.randrange(8)]) + data[at + 1:]
    return data[:at] + (random.randbytes(9) + data[at:] if how == 3 else parts.get(how, flipped))


def misfits(tensors: dict, random: Random) -> list[dict]:
    """Tensors that no loader may take, whatever their checksum."""
    name = random.choice(sorted(tensors))
    x, rest = tensors[name], {n: x for n, x in tensors.items() if n != name}
    wrong = [torch.stack([x, x]), x.double() * 0 + 1e300, x.int(), x[None], x * math.nan]
    if name.endswith("reward"):
        wrong.pop()  # a reward may be not finite
    more = tensors | {"x": x.clone()}
    return [{}, rest, rest | {"x": x}, more, *(rest | {name: z} for z in wrong)]


@pytest.fixture(scope="module")
def loaders(tmp_path_factory):
    """{kind: (a good file, its loader)}; a loader returns a hash of all that it has read."""
    folder, model = tmp_path_factory.mktemp("files"), tiny()
    for name in ("base", "teacher"):
        shutil.copy(HERE / "assets" / f"{name}.safetensors", folder / f"shipped {name}.safetensors")
    shutil.copytree(HERE / "assets" / "clip", folder / "clip")
    save_generator(model, folder / "base.safetensors")
    model = arcopo.load_generator(folder / "base.safetensors")
    about = {"base": model.fingerprint, "timesteps": list(model.timesteps)}
    nonzero(Adapter.new(model, 2, 2.0)).save(folder / "adapter", about)
    record = about | {"group": 4, "sigma": 0.5}
    save_buffer(tiny_buffer(model, 3), folder / "buffer.safetensors", record)
    parameters = [torch.randn(3, 2).requires_grad_(), torch.randn(2).requires_grad_()]
    optimizer = torch.optim.AdamW(parameters, 0.1)
    sum(x.square().sum() for x in parameters).backward()
    optimizer.step()
    state = {"rows": [{"step": 1}], "curve": []}
    reward.save_checkpoint(folder / "checkpoint.safetensors", parameters, optimizer, state)
    about = {"base": "", "prompts": "", "reward_scales": {}}
    with reward.run_folder(folder / "run", tiny_settings(), about):
        (folder / "prompts.txt").write_text("\n".join(TRAIN_PROMPTS[:9]))
    sizes = list(zip((768, 1024, 128, 64, 16), (1024, 128, 64, 16, 1)))
    layers = nn.ModuleDict({f"{i}": nn.Linear(*n) for i, n in zip((0, 2, 4, 6, 7), sizes)})
    torch.save(layers.state_dict(prefix="layers."), folder / "head.pth")

    def content(tensors: dict, rest=None) -> str:
        return reward.checksum({str(n): x.detach() for n, x in tensors.items()}, {"": rest})

    def base(file):
        model = arcopo.load_generator(file)
        clips = sample(model, PROMPTS[:1], draw_noise(model, 1, seeded(0)))
        return content(model.state_dict() | {"clips": clips}, model.fingerprint)

    def adapter(file):
        found = Adapter.load(file.parent, model)
        return content(dict(enumerate(found.parameters())), found.alpha)

    def buffer(file):
        groups = load_buffer(file, model, record)
        draw_from(groups, model, 2, seeded(0))
        tensors = {f"{i}{n}": x for i, g in enumerate(groups) for n, x in g.items()}
        return content({n: x for n, x in tensors.items() if "prompt" not in n})

    def checkpoint(file):
        fresh = [torch.zeros_like(x).requires_grad_() for x in parameters]
        optimizer = torch.optim.AdamW(fresh, 0.1)
        found = reward.load_checkpoint(file, fresh, optimizer)
        moments = optimizer.state_dict()["state"].items()
        moments = {f"{i}{n}": x for i, own in moments for n, x in own.items()}
        return content(moments | dict(enumerate(fresh)), found)

    def clip(file):
        return content({"": ClipReward(str(file.parent)).frame_features(torch.ones(2, 3, 32, 32))})

    def head(file):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(reward, "downloaded", lambda name, url: file)
            patch.setattr(reward, "ClipReward", lambda *a: SimpleNamespace(model=None))
            return content(dict(enumerate(sum(reward.Aesthetic("cpu").layers, ()))))

    settings = lambda file: content({}, vars(reward.open_run(Settings(resume=str(file.parent)))[0]))
    prompts = lambda file: " ".join(reward.read_prompts(str(file), 2))
    return {
        "base": (folder / "base.safetensors", base),
        "shipped base": (folder / "shipped base.safetensors", base),
        "shipped teacher": (folder / "shipped teacher.safetensors", base),
        "adapter": (folder / "adapter" / "adapter_model.safetensors", adapter),
        "buffer": (folder / "buffer.safetensors", buffer),
        "checkpoint": (folder / "checkpoint.safetensors", checkpoint),
        "shipped clip": (folder / "clip" / "open_clip_model.safetensors", clip),
        "shipped clip's config": (folder / "clip" / "open_clip_config.json", clip),
        "head": (folder / "head.pth", head),
        "settings": (folder / "run" / "settings.json", settings),
        "prompts": (folder / "prompts.txt", prompts)}


def outcome(load, file: Path) -> str:
    """What the loader returns, "" if it refuses the file; all else is an error of the test."""
    try:
        return load(file)
    except UserError as error:
        assert 10 < len(reward.one_line(error)) <= 600
        return ""


def test_a_fuzz_of_damaged_files(loaders, capsys):
    """A damaged file gives what the whole one gives (as where a header has space), or one line."""
    random, count, refused = Random(1), 0, 0
    for kind, (file, load) in loaders.items():
        whole, good = file.read_bytes(), load(file)
        damaged = [spoiled(whole, random) for _ in range(12 if "shipped" in kind else 40)]
        if kind == "shipped clip's config":
            damaged.append(whole.replace(b"0.25", b"0.65", 1))  # one bit of it
        for data in damaged:
            file.write_bytes(data)
            found, count = outcome(load, file), count + 1
            refused += not found
            assert found in ("", good) or kind == "prompts" and found in good, (kind, count)
        file.write_bytes(whole)
        assert load(file) == good
    assert count > 250 and refused > 0.9 * count


def test_a_fuzz_of_files_with_a_valid_checksum(loaders):
    """Tensors that are not those of the table are refused; so are strange entries of the record,
    but for those that make it another base or adapter."""
    random, count = Random(2), 0
    for kind in ("base", "adapter", "buffer", "checkpoint"):
        file, load = loaders[kind]
        whole, good = file.read_bytes(), load(file)
        tensors, record = reward.read_weights(file, "")
        record.pop("checksum")
        reward.write_weights(file, {}, record | {"prompts": []})
        assert not outcome(load, file), kind
        for wrong in misfits(tensors, random) + misfits(tensors, random):
            reward.write_weights(file, wrong, record)
            assert not outcome(load, file), (kind, count)
            count += 1
        entries = record["generator"] if kind == "base" else {} if kind == "checkpoint" else record
        for name, value in [(name, value) for name in entries for value in STRANGE]:
            changed = entries | {name: value}
            changed = record | {"generator": changed} if kind == "base" else changed
            reward.write_weights(file, tensors, changed)
            found, count = outcome(load, file), count + 1
            other = (kind, name) in (("base", "flow"), ("adapter", "alpha"))
            assert found in ("", good) or other, (kind, name, value)
        file.write_bytes(whole)
        assert load(file) == good
    assert count > 250


def test_a_full_disk_leaves_whole_files(tmp_path, tiny_base, monkeypatch, capsys):
    """The error names the file; what was written before is kept, and nothing else is left."""
    model, clips = tiny(), make_clips(HELD_OUT_PROMPTS, seeded(0))
    adapter, buffer = Adapter.new(model, 2, 2.0), tiny_buffer(model, 1)
    scores = reward.evaluate(clips, HELD_OUT_PROMPTS, brightness)
    report = ["reward"], "", {"base": clips}, {"base": scores}, "held-out", "0 minutes"
    optimizer = torch.optim.AdamW(adapter.parameters())
    writers = {
        "rows.csv": lambda file: reward.append_row(file, {"a": 1, "b": 2}),
        "clip.gif": lambda file: reward.save_gif({"": clips[None]}, file),
        "buffer.safetensors": lambda file: save_buffer(buffer, file, {}),
        "state": lambda file: reward.save_checkpoint(file, adapter.parameters(), optimizer, {}),
        "adapter_model.safetensors": lambda file: adapter.save(file.parent, {}),
        "judged.csv": lambda file: reward.write_report(file.parent, *report)}
    for name, write in writers.items():
        write(tmp_path / name)

    def full(number):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(reward.os, "fsync", full)
    before = sorted(file.read_bytes() for file in tmp_path.iterdir())
    assert len(before) == 9
    for name, write in writers.items():
        with pytest.raises(UserError, match=rf"{name}: cannot be written .*No space left"):
            write(tmp_path / name)
        assert before == sorted(file.read_bytes() for file in tmp_path.iterdir())
    line = ["--sample", PROMPTS[0], "--base", tiny_base, "--out", tmp_path / "new.gif"]
    monkeypatch.setattr(sys, "stderr", None)  # closed: neither the bar nor the error line fails
    assert arcopo.main(line) == 2 and not (tmp_path / "new.gif").exists()
    code = (HERE / "arcopo.py").read_text() + (HERE / "reward.py").read_text()
    assert not re.search(r"write_text|write_bytes|imwrite\(file", code)  # all through write_whole


def test_too_little_memory_and_a_reward_that_exits_are_one_line(tiny_base, tmp_path, monkeypatch):

    def fails(*a):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate ...")

    (tmp_path / "exits.py").write_text("raise SystemExit")
    monkeypatch.chdir(tmp_path)
    line = ["--base", tiny_base, "--out", tmp_path / "run"]
    assert arcopo.main([*line, "--reward", "exits:f=1"]) == 2
    monkeypatch.setattr(arcopo, "load_generator", fails)
    assert arcopo.main(line) == 2 and not (tmp_path / "run").exists()


def test_sde_grpo_resumes_with_the_settings_of_the_run(tmp_path, tiny_base, monkeypatch):

    def stops(*a, **k):
        raise Crash

    monkeypatch.setattr(arcopo, "align", stops)
    line = ["--group", 3, "--anchors", 3, "--sde-lr", 0.01, "--base", tiny_base]
    with pytest.raises(Crash):
        sde_grpo.main([*line, "--out", tmp_path / "run"])
    assert arcopo.main(["--resume", tmp_path / "run"]) == 2  # not a run of this program
    found = []
    monkeypatch.setattr(arcopo, "run", lambda settings, own, wrap: found.append(own) or 0)
    assert sde_grpo.main(["--resume", tmp_path / "run"]) == 0
    assert (found[0]["sde-grpo"].group, found[0]["sde-grpo"].lr) == (3, 0.01)


# ------------------------------------------------------------------ README and help


def test_figures_draws_every_plot_from_the_shipped_csvs(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    from studies import figures

    assert figures.main(["--out", tmp_path]) == 0
    shown = set()
    for file in (HERE / "README.md", HERE / "studies" / "EVIDENCE.md"):
        shown |= {
            Path(link).name for link in re.findall(r"!\[[^]]*\]\(([^)]+)\)", file.read_text())}
    drawn = {file.name for file in tmp_path.iterdir()}
    assert shown - drawn == {"models.gif"} and drawn <= shown  # the GIF is arcopo.py's
    assert {f.name for f in (HERE / "assets").glob("*.png")} == drawn


def test_claims_resumes(tmp_path, monkeypatch, tiny_base):
    """A run whose rows are in the CSVs is not run again; an interrupted one leaves none."""
    from studies import claims

    ours = [("C3", "recipe", "python arcopo.py --method on-policy --seed S --steps 1")]
    monkeypatch.setattr(claims, "RUNS", ours)
    extra = " ".join(map(str, ["--base", tiny_base, *TINY]))
    arguments = ["C3", "--seeds", 1, "--out", tmp_path / "out", "--extra", extra]
    assert claims.main(arguments) == 0
    rows = claims.read(tmp_path / "out" / "results.csv")
    assert [(row["run"], row["model"], row["seed"]) for row in rows] == [
        ("recipe", "base", "0"), ("recipe", "on-policy", "0")]
    assert [row["step"] for row in claims.read(tmp_path / "out" / "curves.csv")] == ["0", "1"]
    monkeypatch.setattr(claims, "execute", None)  # would fail if it were called
    assert claims.main(arguments) == claims.main(arguments[:-2]) == 0
    assert claims.main(["C9"]) == 2


def test_the_shipped_evidence_is_whole():
    """Each run in results.csv is one of claims.py and has all of its models for each seed once."""
    from studies import claims

    commands = {(run, line) for _, run, line, *_ in claims.RUNS}
    rows, seeds = claims.read(HERE / "studies" / "results.csv"), {}
    for row in rows:
        assert (row["run"], row["command"]) in commands
        key = row["run"], row["command"], row["model"]
        seeds.setdefault(key, []).append(int(row["seed"]))
    assert {"base", "semi", "s = 1", "on-policy"} <= {row["model"] for row in rows}
    for (run, command, model), found in seeds.items():
        assert len(set(found)) == len(found) and found == seeds[run, command, "base"]
    recipe = [key for key in seeds if key[0] == "recipe"]
    assert recipe and all(seeds[key] == list(range(5)) for key in recipe)


def test_the_tables_of_readme_and_evidence_are_those_of_the_csvs(tmp_path, monkeypatch, capsys):
    from studies import tables

    assert tables.main(["--check"]) == 0, capsys.readouterr().err
    readme = tmp_path / "README.md"
    for text in ((HERE / "README.md").read_text(), (HERE / "studies/EVIDENCE.md").read_text()):
        readme.write_text(text)
        # the last digit of each table or number
        changed = re.sub(r"\d(?=\D*<!-- end -->)", lambda match: str(9 - int(match[0])), text)
        blocks = re.compile(r"<!-- \w+ -->.*?<!-- end -->", re.DOTALL)
        pairs = list(zip(blocks.findall(text), blocks.findall(changed)))
        assert len(pairs) == text.count("<!-- end -->") and all(a != b for a, b in pairs)
        for before, after in pairs:
            assert tables.filled(text.replace(before, after)) == text
        readme.write_text(changed)
        monkeypatch.setattr(tables, "FILES", (readme,))
        assert tables.main(["--check"]) == 2
        assert tables.main([]) == 0 and readme.read_text() == text


def test_readme_names_what_exists():
    """Names in the README's table of symbols, links and settings exist."""
    readme = (HERE / "README.md").read_text()
    rows = [
        line for line in readme.splitlines()
        if line.startswith("|") and re.search(r"Eq\.|Alg\.", line)]
    names = {name for row in rows for name in re.findall(r"`([\w.]+)`", row.split("|")[-2])}
    assert len(names) > 10
    for name in names:
        attrgetter(name)(arcopo)
    headings = {
        "#" + title.lower().replace(" ", "-")
        for title in re.findall(r"^#+ (.+)$", readme, re.MULTILINE)}
    evidence = (HERE / "studies" / "EVIDENCE.md").read_text()
    titles = re.findall(r"^## (.+)$", evidence, re.MULTILINE)
    sections = {title.lower().replace(" ", "-") for title in titles}
    for link in re.findall(r"\]\((?!http)([^)]+)\)", readme):
        file, _, section = link.partition("#")
        known = not section or section in sections
        assert link in headings or (HERE / file).exists() and known, link
    for link in re.findall(r"\]\((?!http)([^)]+)\)", evidence):
        assert (HERE / "studies" / link).exists(), link
    known = {"--" + name.replace("_", "-") for name in Settings.__dataclass_fields__} | {"--help"}
    known |= {"--nproc-per-node", "--check"}  # of torchrun and self_forcing.py
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", readme)) <= known


def test_help_tells_every_setting_and_the_papers_value(capsys):
    with pytest.raises(SystemExit):
        arcopo.parse(["--help"])
    text = capsys.readouterr().out
    assert (all("--" + name.replace("_", "-") in text for name in Settings.__dataclass_fields__)
            and "(paper: 12)" in text)
