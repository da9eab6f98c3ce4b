"""Train the base in assets/ from nothing: python -m studies.pretrain --precision bf16

Stage 1, teacher.safetensors: flow matching with teacher forcing. Stage 2, base.safetensors: the
teacher's ODE distilled to a few-step consistency model, along the student's own sampler path and
half behind its own chunks (in place of Self-Forcing's DMD loss). Both end as a moving average of
the weights. EVIDENCE.md says how long it takes. An interrupted run resumes.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from arcopo import TIMESTEPS, Generator, denoise, draw_noise, seeded
from reward import (CHUNK_FRAMES, CHUNKS, TRAIN_PROMPTS, Parser, UserError, append_row,
                    check_folder, choose_device, command, make_clips, nonempty, read_weights,
                    write_weights)
from studies.train_clip import muon_and_adamw, step_with

FLOW_TIMESTEPS = (1.0, 0.9, 0.75, 0.6, 0.4, 0.2)  # the teacher's Euler steps
DISTILLED_AT = (1.0, 0.5, 0.25, 0.1)  # the student's sampler times in training
EMA, SAVE_EVERY = 0.998, 100
COUNTS = {
    "teacher_steps": (4000, "steps of flow matching"), "student_steps": (1200, "of distillation"),
    "batch": (32, "clips in a batch"), "width": (256, "width of the transformer"),
    "layers": (5, "its layers"), "heads": (4, "its attention heads")}


def encode(clips: Tensor) -> Tensor:
    """[N, FRAMES, 3, SIZE, SIZE] in [0, 1] -> latents [N, L, *chunk_shape]."""
    return (clips * 2 - 1).unflatten(1, (CHUNKS, CHUNK_FRAMES))


def draw_batch(model: Generator, batch: int, generator: torch.Generator) -> tuple:
    """Prompts, clean clips [N, L, *chunk_shape], and the same with slight noise, as the past."""
    index = torch.randint(len(TRAIN_PROMPTS), (batch,), generator=generator)
    prompts = [TRAIN_PROMPTS[i] for i in index]
    clean = encode(make_clips(prompts, generator))
    u = 0.1 * torch.rand(batch, CHUNKS, 1, 1, 1, 1, generator=generator)
    past = (1 - u) * clean + u * torch.randn(clean.shape, generator=generator)
    return prompts, clean.to(model.device), past.to(model.device)


def save_generator(model: Generator, file: Path) -> None:
    """Write a base that arcopo.load_generator reads, in bfloat16."""
    shape = {
        "width": model.width, "layers": model.layers, "heads": model.heads,
        "timesteps": model.timesteps, "flow": model.flow}
    tensors = {name: t.bfloat16() for name, t in model.state_dict().items()}
    write_weights(file, tensors, {"generator": shape})


def contexts(model: Generator, clean: Tensor, prompts: list[str]) -> list:
    """The context before each chunk of clean [N, L, *chunk_shape] (teacher forcing)."""
    found = [model.begin(prompts)]
    for p in range(model.chunks - 1):
        found.append(model.extend(found[-1], clean[:, p]))
    return found


def predict_all(model: Generator, x_t: Tensor, t: Tensor, before: list) -> Tensor:
    """predict for each chunk: x_t [N, L, *chunk_shape] at times t [N, L]."""
    return torch.stack([model.predict(x_t[:, p], t[:, p], before[p]) for p in range(model.chunks)],
                       1)


def flow_matching_loss(model: Generator, batch: int, generator: torch.Generator) -> Tensor:
    """The error of v = (x_t - x₀)/t, t >= 0.05 in the denominator, behind real past chunks."""
    prompts, clean, past = draw_batch(model, batch, generator)
    noise = torch.randn(clean.shape, generator=generator).to(clean.device)
    t = torch.sigmoid(0.6 + 1.1 * torch.randn(clean.shape[:2], generator=generator))
    t = t.to(clean.device)
    level = t[..., None, None, None, None]
    x_t = (1 - level) * clean + level * noise
    prediction = predict_all(model, x_t, t, contexts(model, past, prompts))
    return ((prediction - clean) / level.clamp_min(0.05)).square().mean()


def distillation_loss(student: Generator, teacher: Generator, batch: int,
                      generator: torch.Generator) -> Tensor:
    """The student's prediction at a random step of its own sampler, against the end of the
    teacher's ODE from the same initial noise behind the same past.

    The target does not depend on the solver noise: the student learns to ignore it. Half of the
    clips are behind the student's own chunks, half behind real ones.
    """
    prompts, _, past = draw_batch(student, batch, generator)
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
            before, teachers = (student.extend(before,
                                               past[:, p]), teacher.extend(teachers, past[:, p]))
    x_t, target = torch.stack(states, 1), torch.stack(targets, 1)
    prediction = predict_all(student, x_t, times[step], contexts(student, past, prompts))
    return ((prediction - target).square().flatten(2).mean(2) + 0.03**2).sqrt().mean()


def fit(stage: str, model: Generator, loss_of: Callable, steps: int, lr: float, args,
        folder: Path) -> None:
    """Train one stage, from its checkpoint if there is one; the model ends as the moving average
    of its weights. A step's data depend on seed, stage and step alone."""
    hidden = [m.weight for m in model.blocks.modules() if isinstance(m, nn.Linear)]
    optimizers = muon_and_adamw(model, hidden)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(EMA))
    parts = {"model": model, "average": average}
    checkpoint, start = folder / f"{stage}.checkpoint.safetensors", 0
    names = ("seed", "batch", "width", "layers", "heads", "precision")
    described = {n: getattr(args, n) for n in names} | {"steps": steps}
    if checkpoint.is_file():
        tensors, record = read_weights(checkpoint, "--out")
        if record.get("settings") != described:
            raise UserError(f"--out {folder}: holds a pre-training with other settings "
                            f"({record.get('settings')}); name another folder")
        start = record["step"]
        for part, module in parts.items():
            own = {n: t for n, t in tensors.items() if n.startswith(f"{part}.")}
            module.load_state_dict({n[len(part) + 1:]: t for n, t in own.items()})
        for i, optimizer in enumerate(optimizers):
            state = {}
            for name, t in tensors.items():
                if name.startswith(f"optimizer{i}."):
                    state.setdefault(int(name.split(".")[1]), {})[name.split(".")[2]] = t
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": state, "param_groups": groups})
    bar = tqdm(range(start, steps), desc=stage, initial=start, total=steps, unit="step")
    for step in bar:
        began = time.perf_counter()
        loss = loss_of(model, args.batch, seeded(args.seed, stage, step))
        model.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        step_with(optimizers, lr * min(1, (step + 1) / 50, 2 * (1 - step / steps)))
        average.update_parameters(model)
        row = {"step": step + 1, "loss": loss.item(), "grad_norm": norm.item(),
               "seconds": time.perf_counter() - began}
        append_row(folder / f"{stage}.csv", row)
        bar.set_postfix(loss=f"{row['loss']:.4f}", grad=f"{row['grad_norm']:.2f}")
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
            tensors = {
                f"{part}.{name}": t for part, module in parts.items()
                for name, t in module.state_dict().items()}
            for i, optimizer in enumerate(optimizers):
                for index, state in optimizer.state_dict()["state"].items():
                    tensors |= {f"optimizer{i}.{index}.{name}": t for name, t in state.items()}
            write_weights(checkpoint, tensors, {"step": step + 1, "settings": described})
    model.load_state_dict(average.module.state_dict())


def pretrain(args) -> None:
    """Both stages -> teacher.safetensors, base.safetensors in args.out."""
    folder, device = Path(args.out), choose_device(args.device)
    check_folder(folder, new=not (folder / "teacher.checkpoint.safetensors").exists())
    torch.manual_seed(args.seed)
    shape = {name: getattr(args, name) for name in ("width", "layers", "heads")}
    shape["bf16"] = args.precision == "bf16"
    folder.mkdir(parents=True, exist_ok=True)
    teacher = Generator(**shape, timesteps=FLOW_TIMESTEPS, flow=True).to(device)
    fit("teacher", teacher, flow_matching_loss, args.teacher_steps, 2e-3, args, folder)
    save_generator(teacher, folder / "teacher.safetensors")
    student = Generator(**shape, timesteps=DISTILLED_AT).to(device)
    student.load_state_dict(teacher.state_dict())
    teacher.requires_grad_(False)
    loss = lambda model, *rest: distillation_loss(model, teacher, *rest)
    fit("student", student, loss, args.student_steps, 5e-4, args, folder)
    student.timesteps = TIMESTEPS
    save_generator(student, folder / "base.safetensors")
    print(f"wrote {folder}/base.safetensors; use it with arcopo.py --base")


def parse(arguments: list | None = None):
    parser = Parser(__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=nonempty, default="runs/pretrain", help="folder to write")
    for name, (default, text) in COUNTS.items():
        parser.add_argument("--" + name.replace("_", "-"),
                            type=int,
                            default=default,
                            help=f"{text} [{default}]")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random [0]")
    parser.add_argument("--device",
                        default="auto",
                        help="cpu, cuda ...; auto: cuda if there is one")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    args = parser.parse_args(arguments and [str(a) for a in arguments])
    for name in COUNTS:
        if not 1 <= getattr(args, name) <= 10**6:
            raise UserError(f"--{name.replace('_', '-')}: must be from 1 to 1000000")
    if not 0 <= args.seed < 2**63:
        raise UserError(f"--seed {args.seed}: must be in [0, 2^63)")
    if args.width % args.heads:
        raise UserError(f"--width {args.width}: must be a multiple of --heads ({args.heads})")
    return args


def main(arguments: list | None = None) -> int:
    return command("pretrain", lambda: pretrain(parse(arguments)) or 0)


if __name__ == "__main__":
    sys.exit(main())
