"""Train the base in assets/ from nothing: python -m studies.pretrain --precision bf16

Stage 1, teacher.safetensors: flow matching with teacher forcing. Stage 2, base.safetensors: the
teacher's ODE distilled to a few-step consistency model, along the student's own sampler path and
half behind its own chunks (in place of Self-Forcing's DMD loss). Both end as a moving average of
the weights. Of a share of the clips the caption is wrong (wrong_captions). EVIDENCE.md says how
long it takes. An interrupted run resumes.
"""

import functools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from arcopo import (TIMESTEPS, Generator, Parser, choose_device, denoise, draw_noise, exit_code,
                    save_whole, seeded, write_csv)
from reward import CHUNK_FRAMES, CHUNKS, TRAIN_PROMPTS, UserError, attributes, make_clips
from studies.train_clip import muon_and_adamw, step_with

FLOW_TIMESTEPS = (1.0, 0.9, 0.75, 0.6, 0.4, 0.2)  # the teacher's Euler steps
DISTILLED_AT = (1.0, 0.5, 0.25, 0.1)  # the student's sampler times in training
EMA, SAVE_EVERY = 0.998, 100
COUNTS = {"teacher_steps": (4000, "steps of flow matching"),
          "student_steps": (1200, "steps of distillation"), "batch": (32, "clips in a batch"),
          "width": (256, "width of the transformer"), "layers": (5, "its layers"),
          "heads": (4, "its attention heads")}


def encode(clips: Tensor) -> Tensor:
    """[N, FRAMES, 3, SIZE, SIZE] in [0, 1] -> latents [N, L, *chunk_shape]."""
    return (clips * 2 - 1).unflatten(1, (CHUNKS, CHUNK_FRAMES))


@functools.cache
def differing(prompt: str, attribute: int) -> list[str]:
    """The training prompts that differ from prompt in this attribute alone: 0 colour, 1 shape."""
    own = attributes([prompt])[0].tolist()
    found = []
    for other, triple in zip(TRAIN_PROMPTS, attributes(TRAIN_PROMPTS).tolist()):
        if [i for i in range(3) if triple[i] != own[i]] == [attribute]:
            found.append(other)
    return found


def wrong_captions(captions: list[str], share: float, generator: torch.Generator) -> list[str]:
    """What the clips show: a share of them another training prompt, of another colour or shape.

    Captions scraped from the web are unreliable; it leaves alignment something to correct.
    """
    if share == 0:
        return captions
    shown = []
    draws = torch.rand(len(captions), 3, generator=generator).tolist()
    for caption, (wrong, kind, pick) in zip(captions, draws):
        attribute = int(kind < 0.5)
        others = differing(caption, attribute) or differing(caption, 1 - attribute)
        if wrong < share and others:
            shown.append(others[int(pick * len(others))])
        else:
            shown.append(caption)
    return shown


def draw_batch(model: Generator, batch: int, generator: torch.Generator,
               wrong: float = 0.0) -> tuple:
    """Prompts, a share of them wrong, clean clips [N, L, *chunk_shape], and the same with slight
    noise, as the past."""
    index = torch.randint(len(TRAIN_PROMPTS), (batch,), generator=generator)
    prompts = [TRAIN_PROMPTS[i] for i in index]
    clean = encode(make_clips(wrong_captions(prompts, wrong, generator), generator))
    u = 0.1 * torch.rand(batch, CHUNKS, 1, 1, 1, 1, generator=generator)
    past = (1 - u) * clean + u * torch.randn(clean.shape, generator=generator)
    return prompts, clean.to(model.device), past.to(model.device)


def save_generator(model: Generator, file: Path) -> None:
    """Write a base that arcopo.load_generator reads, in bfloat16."""
    shape = {"width": model.width, "layers": model.layers, "heads": model.heads,
             "timesteps": model.timesteps, "flow": model.flow}
    tensors = {name: t.bfloat16().cpu() for name, t in model.state_dict().items()}
    save_file(tensors, file, {"arcopo": json.dumps({"record": {"generator": shape}})})


def contexts(model: Generator, clean: Tensor, prompts: list[str]) -> list:
    """The context before each chunk of clean [N, L, *chunk_shape] (teacher forcing)."""
    found = [model.begin(prompts)]
    for p in range(model.chunks - 1):
        found.append(model.extend(found[-1], clean[:, p]))
    return found


def predict_all(model: Generator, x_t: Tensor, t: Tensor, before: list) -> Tensor:
    """predict for each chunk: x_t [N, L, *chunk_shape] at times t [N, L]."""
    chunks = [model.predict(x_t[:, p], t[:, p], before[p]) for p in range(model.chunks)]
    return torch.stack(chunks, 1)


def flow_matching_loss(model: Generator, batch: int, generator: torch.Generator,
                       wrong: float = 0.0) -> Tensor:
    """The error of v = (x_t - x₀)/t, t >= 0.05 in the denominator, behind real past chunks."""
    prompts, clean, past = draw_batch(model, batch, generator, wrong)
    noise = torch.randn(clean.shape, generator=generator).to(clean.device)
    t = torch.sigmoid(0.6 + 1.1 * torch.randn(clean.shape[:2], generator=generator))
    t = t.to(clean.device)
    level = t[..., None, None, None, None]
    x_t = (1 - level) * clean + level * noise
    prediction = predict_all(model, x_t, t, contexts(model, past, prompts))
    return ((prediction - clean) / level.clamp_min(0.05)).square().mean()


def distillation_loss(student: Generator, teacher: Generator, batch: int,
                      generator: torch.Generator, wrong: float = 0.0) -> Tensor:
    """The student's prediction at a random step of its own sampler, against the end of the
    teacher's ODE from the same initial noise behind the same past.

    The target does not depend on the solver noise: the student learns to ignore it. Half of the
    clips are behind the student's own chunks, half behind real ones.
    """
    prompts, _, past = draw_batch(student, batch, generator, wrong)
    noise = draw_noise(student, batch, generator)
    times = torch.tensor(student.timesteps, device=student.device)
    rows, states, targets = torch.arange(batch), [], []
    step = torch.randint(len(times), (batch, CHUNKS), generator=generator)
    with torch.no_grad():
        before, teachers = student.begin(prompts), teacher.begin(prompts)
        for p in range(CHUNKS):
            x_t, points = denoise(student, before, noise.initial[:, p], noise.solver[:, p])
            none = noise.solver[:, p, :0]
            targets.append(denoise(teacher, teachers, noise.initial[:, p], none)[1][:, -1])
            states.append(x_t[rows, step[:, p]])
            past[:batch // 2, p] = points[:batch // 2, -1]
            before = student.extend(before, past[:, p])
            teachers = teacher.extend(teachers, past[:, p])
    x_t, target = torch.stack(states, 1), torch.stack(targets, 1)
    prediction = predict_all(student, x_t, times[step], contexts(student, past, prompts))
    return ((prediction - target).square().flatten(2).mean(2) + 0.03**2).sqrt().mean()


def fit(stage: str, model: Generator, loss_of: Callable, steps: int, lr: float, args) -> None:
    """Train one stage, from its checkpoint if there is one; the model ends as the moving average
    of its weights. A step's data depend on seed, stage and step alone."""
    folder = Path(args.out)
    hidden = [m.weight for m in model.blocks.modules() if isinstance(m, nn.Linear)]
    optimizers = muon_and_adamw(model, hidden)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(EMA))
    parts = {"model": model, "average": average, "muon": optimizers[0], "adamw": optimizers[1]}
    checkpoint, rows = folder / f"{stage}.checkpoint.pt", []
    about = {name: value for name, value in vars(args).items() if name not in ("out", "device")}
    if checkpoint.exists():
        saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
        if saved["about"] != about:
            raise UserError(f"--out {folder}: holds a pre-training with other settings "
                            f"({saved['about']}); name another folder")
        rows = saved["rows"]
        for name, part in parts.items():
            part.load_state_dict(saved[name])
    write_csv(folder / f"{stage}.csv", rows)
    bar = tqdm(range(len(rows), steps), stage, initial=len(rows), total=steps, unit="step")
    for step in bar:
        began = time.perf_counter()
        with torch.autocast(model.device.type, torch.bfloat16, enabled=args.precision == "bf16"):
            loss = loss_of(model, args.batch, seeded(args.seed, stage, step), args.wrong_captions)
        model.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        step_with(optimizers, lr * min(1, (step + 1) / 50, 2 * (1 - step / steps)))
        average.update_parameters(model)
        rows.append({"step": step + 1, "loss": loss.item(), "grad_norm": norm.item(),
                     "seconds": time.perf_counter() - began})
        write_csv(folder / f"{stage}.csv", rows[-1:], "a")
        bar.set_postfix(loss=f"{rows[-1]['loss']:.4f}")
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
            states = {name: part.state_dict() for name, part in parts.items()}
            save_whole(states | {"about": about, "rows": rows}, checkpoint)
    model.load_state_dict(average.module.state_dict())


def pretrain(args) -> int:
    """Both stages -> teacher.safetensors, base.safetensors in args.out."""
    folder, device = Path(args.out), choose_device(args.device)
    torch.manual_seed(args.seed)
    shape = {name: getattr(args, name) for name in ("width", "layers", "heads")}
    folder.mkdir(parents=True, exist_ok=True)
    teacher = Generator(**shape, timesteps=FLOW_TIMESTEPS, flow=True).to(device)
    fit("teacher", teacher, flow_matching_loss, args.teacher_steps, 2e-3, args)
    save_generator(teacher, folder / "teacher.safetensors")
    student = Generator(**shape, timesteps=DISTILLED_AT).to(device)
    student.load_state_dict(teacher.state_dict())
    teacher.requires_grad_(False)
    loss = lambda model, *rest: distillation_loss(model, teacher, *rest)
    fit("student", student, loss, args.student_steps, 5e-4, args)
    student.timesteps = TIMESTEPS
    save_generator(student, folder / "base.safetensors")
    print(f"wrote {folder}/base.safetensors; use it with arcopo.py --base")
    return 0


def parse(arguments: list | None = None):
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", default="runs/pretrain", help="folder to write, or to continue")
    for name, (default, text) in COUNTS.items():
        parser.add_argument("--" + name.replace("_", "-"), type=int, default=default,
                            help=f"{text} [{default}]")
    parser.add_argument("--wrong-captions", type=float, default=0.3,
                        help="share of clips of another colour or shape than the caption's [0.3]")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random [0]")
    parser.add_argument("--device", default="auto", help="cpu, cuda ...; auto: cuda if there")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    args = parser.parse_args(arguments and [str(a) for a in arguments])
    if min(getattr(args, name) for name in COUNTS) < 1 or args.width % args.heads:
        raise UserError("counts must be 1 or more, and --width a multiple of --heads")
    if not 0 <= args.wrong_captions <= 1:
        raise UserError(f"--wrong-captions {args.wrong_captions}: must be from 0 to 1")
    return args


def main(arguments: list | None = None) -> int:
    try:
        return pretrain(parse(arguments))
    except BaseException as error:
        return exit_code(error)


if __name__ == "__main__":
    sys.exit(main())
