"""Train what is in assets/ from nothing: python -m studies.pretrain

First the CLIP, clip/. Then the teacher, teacher.safetensors: flow matching with teacher forcing.
Then the student, base.safetensors: the teacher's ODE distilled to a few-step consistency model,
along the student's own sampler path and half behind its own chunks (in place of Self-Forcing's DMD
loss). Teacher and student end as a moving average of the weights. A share of the captions is wrong
(wrong_captions). EVIDENCE.md says how long it takes. An interrupted run resumes; the CLIP starts
again.
"""

import json
import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from arcopo import (Generator, Parser, choose_device, denoise, draw_noise, load_generator,
                    save_whole, seeded, write_csv)
from reward import (CHUNK_FRAMES, CHUNKS, COLOURS, FRAMES, MOTIONS, SHAPES, SIZE, TRAIN_PROMPTS,
                    WORDINGS, UserError, attributes, make_clips, prompt_of, worded)
from studies.common import program

FLOW_TIMESTEPS = 1.0, 0.9, 0.75, 0.6, 0.4, 0.2      # how the teacher samples as a base (C7)
TARGET_TIMESTEPS = 1.0, 0.95, 0.9, 0.83, 0.75, 0.65, 0.5, 0.35, 0.2, 0.1, 0.04  # to distil
BATCH, EMA, SAVE_EVERY = 32, 0.998, 100
CLIP_CONFIG = {
    "model_cfg": {
        "embed_dim": 64,
        "vision_cfg": {"image_size": SIZE, "layers": [1, 1, 1, 1], "width": 16},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2,
                     "layers": 2}},
    "preprocess_cfg": {"mean": [0.1] * 3, "std": [0.25] * 3}}
RADII = 3.0, 8.0        # px; wider than in the world (4 to 5.5)


def muon_and_adamw(model: torch.nn.Module, hidden: list[Tensor]) -> list[torch.optim.Optimizer]:
    """Muon for the hidden matrices, AdamW for the rest."""
    chosen = {id(p) for p in hidden}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    return [torch.optim.Muon(hidden, weight_decay=0, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, betas=(0.9, 0.98), weight_decay=0)]


def step_with(optimizers: list[torch.optim.Optimizer], lr: float) -> None:
    """In float32: torch's Muon orthogonalizes in bfloat16, which takes 150 times as long on a CPU
    without bfloat16 instructions."""
    for optimizer in optimizers:
        for parameters in optimizer.param_groups:
            parameters["lr"] = lr
        with patch.object(Tensor, "bfloat16", Tensor.clone):
            optimizer.step()


# ------------------------------------------------------------------ the CLIP

def draw_pairs(quality: str | None, generator: torch.Generator) -> tuple[Tensor, list[str]]:
    """Frames [N, 3, SIZE, SIZE] and captions, which name the quality if there is one: of each
    colour and shape with a random motion, if that is a training prompt."""
    motions = torch.randint(len(MOTIONS), (len(COLOURS), len(SHAPES)), generator=generator)
    drawn = [prompt_of(c, s, motions[c, s]) for c in range(len(COLOURS))
             for s in range(len(SHAPES))]
    prompts = [prompt for prompt in drawn if prompt in TRAIN_PROMPTS]
    clips = make_clips(prompts, generator, quality, RADII)
    frame = torch.randint(FRAMES, (len(clips),), generator=generator)
    captions = [worded(prompt, quality) if quality else prompt for prompt in prompts]
    return clips[torch.arange(len(clips)), frame], captions


def train_clip(out: Path, steps: int, seed: int) -> None:
    """Train a tiny CLIP on frames and captions of the world, and write it in open_clip's format.

    Each caption occurs once in a batch, so no pair is a false negative. Even steps name the quality
    ("a dim red circle moving up"), odd steps do not. Captions name the motion, as prompts do, but
    no single frame shows it. Small changes of brightness and light noise keep "sharp" from meaning
    "without any error".
    """
    import open_clip

    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    out.mkdir(parents=True, exist_ok=True)
    (out / "open_clip_config.json").write_text(json.dumps(CLIP_CONFIG, indent=1) + "\n")
    model = open_clip.create_model(f"local-dir:{out}", load_weights=False)
    tokenizer = open_clip.get_tokenizer(f"local-dir:{out}")
    mean, std = (CLIP_CONFIG["preprocess_cfg"][name][0] for name in ("mean", "std"))
    hidden = [p for name, p in model.named_parameters() if "resblocks" in name and p.ndim == 2]
    optimizers = muon_and_adamw(model, hidden)
    for step in tqdm(range(steps), desc="clip", unit="step"):
        pairs = [draw_pairs(kind, generator) for kind in (WORDINGS if step % 2 == 0 else (None,))]
        images = torch.cat([frames for frames, _ in pairs])
        tokens = tokenizer([caption for _, captions in pairs for caption in captions])
        gain, sigma = torch.rand(2, len(images), 1, 1, 1, generator=generator)
        noise = torch.randn(images.shape, generator=generator)
        images = (images * (0.9 + 0.2 * gain) + 0.05 * sigma * noise).clamp(0, 1)
        with torch.autocast("cpu", torch.bfloat16):
            image = model.encode_image((images - mean) / std, normalize=True)
            text = model.encode_text(tokens, normalize=True)
        logits = model.logit_scale.exp() * image.float() @ text.float().T
        target = torch.arange(len(logits))
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        model.zero_grad()
        loss.backward()
        step_with(optimizers, 2e-3 * min(1, (step + 1) / 30, 2 * (1 - step / steps)))
        model.logit_scale.data.clamp_(0, math.log(100))
    weights = {name: t.half() if t.is_floating_point() else t
               for name, t in model.state_dict().items()}
    save_file(weights, out / "open_clip_model.safetensors")


# ------------------------------------------------------------------ the generators

def wrong_captions(captions: list[str], share: float, generator: torch.Generator) -> list[str]:
    """The prompts that the clips show: for a share of the captions another training prompt, which
    differs in the colour or the shape alone. Captions scraped from the web are unreliable, too;
    so alignment has something to correct."""
    if share == 0:
        return captions             # and draw no random numbers
    every, shown = attributes(TRAIN_PROMPTS), []
    draws = torch.rand(len(captions), 3, generator=generator).tolist()
    for caption, own, (wrong, kind, pick) in zip(captions, attributes(captions), draws):
        differs = every != own                                          # [prompts, 3]
        alone = differs[:, int(kind < 0.5)] & (differs.sum(1) == 1)     # in shape, or in colour
        others = alone.nonzero()[:, 0]
        other = TRAIN_PROMPTS[others[int(pick * len(others))]]
        shown.append(other if wrong < share else caption)
    return shown


def draw_batch(model: Generator, wrong: float, generator: torch.Generator) -> tuple:
    """Prompts, clean clips [N, L, *chunk_shape] of which a share shows something else, and the
    same with slight noise, as the past."""
    index = torch.randint(len(TRAIN_PROMPTS), (BATCH,), generator=generator)
    prompts = [TRAIN_PROMPTS[i] for i in index]
    clips = make_clips(wrong_captions(prompts, wrong, generator), generator)
    clean = (clips * 2 - 1).unflatten(1, (CHUNKS, CHUNK_FRAMES))
    u = 0.1 * torch.rand(BATCH, CHUNKS, 1, 1, 1, 1, generator=generator)
    past = (1 - u) * clean + u * torch.randn(clean.shape, generator=generator)
    return prompts, clean.to(model.device), past.to(model.device)


def save_generator(model: Generator, file: Path) -> None:
    """Write a base that arcopo.load_generator reads, in bfloat16."""
    shape = {"width": model.width, "layers": model.layers, "heads": model.heads,
             "timesteps": model.timesteps, "flow": model.flow}
    tensors = {name: t.bfloat16().cpu() for name, t in model.state_dict().items()}
    save_file(tensors, file, {"arcopo": json.dumps({"record": {"generator": shape}})})


def predict_all(model: Generator, x_t: Tensor, t: Tensor, past: Tensor,
                prompts: list[str]) -> Tensor:
    """predict for each chunk of x_t [N, L, *chunk_shape] at times t [N, L], behind the earlier
    chunks of past, like x_t (teacher forcing)."""
    contexts = [model.begin(prompts)]
    for p in range(model.chunks - 1):
        contexts.append(model.extend(contexts[-1], past[:, p]))
    chunks = [model.predict(x_t[:, p], t[:, p], contexts[p]) for p in range(model.chunks)]
    return torch.stack(chunks, 1)


def flow_matching_loss(model: Generator, wrong: float, generator: torch.Generator) -> Tensor:
    """The error of v = (x_t - x₀)/t, t >= 0.05 in the denominator, behind real past chunks."""
    prompts, clean, past = draw_batch(model, wrong, generator)
    noise = torch.randn(clean.shape, generator=generator).to(clean.device)
    t = torch.sigmoid(0.6 + 1.1 * torch.randn(clean.shape[:2], generator=generator)).to(noise)
    level = t[..., None, None, None, None]
    x_t = (1 - level) * clean + level * noise
    prediction = predict_all(model, x_t, t, past, prompts)
    return ((prediction - clean) / level.clamp_min(0.05)).square().mean()


def distillation_loss(student: Generator, wrong: float, generator: torch.Generator,
                      teacher: Generator) -> Tensor:
    """The student's prediction at a step of its own sampler (the first in every second clip, else a
    random one), against the end of the teacher's ODE from the same initial noise behind the same
    past.

    The target does not depend on the solver noise: the student learns to ignore it. Half of the
    clips are behind the student's own chunks, half behind real ones.
    """
    prompts, _, past = draw_batch(student, wrong, generator)
    noise = draw_noise(student, BATCH, generator)
    times = torch.tensor(student.timesteps, device=student.device)
    step = torch.randint(len(times), (BATCH, CHUNKS), generator=generator)
    step[::2] = 0           # the first step decides colour and shape
    states, targets = [], []
    with torch.no_grad():
        before, teachers = student.begin(prompts), teacher.begin(prompts)
        for p in range(CHUNKS):
            initial, solver = noise.initial[:, p], noise.solver[:, p]
            x_t, x0 = denoise(student, before, initial, solver)
            targets.append(denoise(teacher, teachers, initial, solver)[1][-1])
            states.append(torch.stack(x_t, 1)[torch.arange(BATCH), step[:, p]])
            past[:BATCH // 2, p] = x0[-1][:BATCH // 2]
            before = student.extend(before, past[:, p])
            teachers = teacher.extend(teachers, past[:, p])
    torch.clear_autocast_cache()        # older torch would reuse weights without a gradient
    x_t, target = torch.stack(states, 1), torch.stack(targets, 1)
    prediction = predict_all(student, x_t, times[step], past, prompts)
    return ((prediction - target).square().flatten(2).mean(2) + 0.03**2).sqrt().mean()


def fit(stage: str, model: Generator, loss_of: Callable, steps: int, lr: float, args) -> None:
    """Train one stage, from its checkpoint if there is one; the model ends as the moving average
    of its weights. A step's data depend on seed, stage and step alone."""
    folder = Path(args.out)
    hidden = [m.weight for m in model.blocks.modules() if isinstance(m, nn.Linear)]
    optimizers = muon_and_adamw(model, hidden)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(EMA))
    parts = model, average, *optimizers
    checkpoint, rows = folder / f"{stage}.checkpoint.pt", []
    about = {name: value for name, value in vars(args).items() if name not in ("out", "device")}
    if checkpoint.exists():
        saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
        if saved["about"] != about:
            raise UserError(f"--out {folder}: holds a pre-training with other settings "
                            f"({saved['about']}); name another folder")
        rows = saved["rows"]
        for part, state in zip(parts, saved["states"]):
            part.load_state_dict(state)
    for step in tqdm(range(len(rows), steps), stage, initial=len(rows), total=steps, unit="step"):
        # In bfloat16: half the time, on a CPU that has instructions for it.
        with torch.autocast(model.device.type, torch.bfloat16):
            loss = loss_of(model, args.wrong_captions, seeded(args.seed, stage, step))
        model.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        step_with(optimizers, lr * min(1, (step + 1) / 50, 2 * (1 - step / steps)))
        average.update_parameters(model)
        rows.append({"step": step + 1, "loss": loss.item()})
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
            states = [part.state_dict() for part in parts]
            save_whole({"about": about, "rows": rows, "states": states}, checkpoint)
            write_csv(folder / f"{stage}.csv", rows)
    model.load_state_dict(average.module.state_dict())


def pretrain(args) -> None:
    """clip/, teacher.safetensors and base.safetensors in args.out."""
    steps = args.clip_steps, args.teacher_steps, args.student_steps
    if min(steps) < 1 or not 0 <= args.wrong_captions <= 1:
        raise UserError("expected steps of 1 or more and --wrong-captions from 0 to 1")
    folder, device = Path(args.out), choose_device(args.device)
    if not (folder / "clip" / "open_clip_model.safetensors").exists():
        train_clip(folder / "clip", args.clip_steps, args.seed)
    torch.manual_seed(args.seed)
    teacher = Generator(timesteps=FLOW_TIMESTEPS, flow=True).to(device)
    fit("teacher", teacher, flow_matching_loss, args.teacher_steps, 2e-3, args)
    save_generator(teacher, folder / "teacher.safetensors")
    teacher = load_generator(folder / "teacher.safetensors", device, TARGET_TIMESTEPS)
    student = Generator().to(device)
    student.load_state_dict(teacher.state_dict())
    loss_of = partial(distillation_loss, teacher=teacher)
    fit("student", student, loss_of, args.student_steps, 5e-4, args)
    save_generator(student, folder / "base.safetensors")
    print(f"wrote {folder}; use it with arcopo.py --base {folder}/base.safetensors "
          f"--clip {folder}/clip")


def main(arguments: list | None = None) -> int:
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", default="runs/pretrain", help="folder to write, or to continue")
    parser.add_argument("--clip-steps", type=int, default=600, help="of the CLIP [600]")
    parser.add_argument("--teacher-steps", type=int, default=4000, help="of flow matching [4000]")
    parser.add_argument("--student-steps", type=int, default=1200, help="of distillation [1200]")
    parser.add_argument("--wrong-captions", type=float, default=0.35,
                        help="share of clips of another colour or shape than the caption's [0.35]")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random [0]")
    parser.add_argument("--device", default="auto", help="cpu, cuda ...; auto: cuda if there")
    return program(pretrain, parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
