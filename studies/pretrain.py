"""Train the base in assets/ from nothing: python -m studies.pretrain (40 minutes on 2 cores).

Stage 1, teacher.safetensors: flow matching with teacher forcing. Stage 2, base.safetensors: the
teacher's ODE distilled to a few-step consistency model. Departure from Self-Forcing: the student is
trained behind real past chunks, not behind its own rollouts. An interrupted run resumes.
"""

import json
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from arcopo import Generator, seeded
from reward import (
    CHUNK_FRAMES,
    CHUNKS,
    TRAIN_PROMPTS,
    Parser,
    UserError,
    check_folder,
    choose_device,
    command,
    make_clips,
    nonempty,
    read_weights,
    write_weights,
)
from studies.train_clip import muon_and_adamw, step_with

FLOW_TIMESTEPS = (1.0, 0.9, 0.75, 0.6, 0.4, 0.2)  # the teacher's Euler steps
DISTILLED_AT = (1.0, 0.6, 0.33, 0.14)  # times that distillation prefers
ODE_STEPS, SAVE_EVERY = 6, 100
COUNTS = {
    "teacher_steps": (1600, "steps of flow matching"),
    "student_steps": (180, "of distillation"),
    "batch": (32, "clips in a batch"),
    "width": (192, "width of the transformer"),
    "layers": (6, "its layers"),
    "heads": (3, "its attention heads"),
}


def encode(clips: Tensor) -> Tensor:
    """[N, FRAMES, 3, SIZE, SIZE] in [0, 1] -> latents [N, L, *chunk_shape]."""
    return (clips * 2 - 1).unflatten(1, (CHUNKS, CHUNK_FRAMES))


def save_generator(model: Generator, file: Path) -> None:
    """Write a base that arcopo.load_generator reads, in bfloat16."""
    shape = {
        "width": model.width,
        "layers": model.layers,
        "heads": model.heads,
        "timesteps": model.timesteps,
        "flow": model.flow,
    }
    tensors = {name: t.bfloat16() for name, t in model.state_dict().items()}
    write_weights(file, tensors, {"generator": json.dumps(shape)})


def contexts(model: Generator, clean: Tensor, prompts: list[str]) -> list:
    """The context before each chunk of clean [N, L, *chunk_shape] (teacher forcing)."""
    found = [model.begin(prompts)]
    for p in range(model.chunks - 1):
        found.append(model.extend(found[-1], clean[:, p]))
    return found


def predict_all(model: Generator, x_t: Tensor, t: Tensor, before: list) -> Tensor:
    """predict for each chunk: x_t [N, L, *chunk_shape] at times t [N, L]."""
    return torch.stack(
        [model.predict(x_t[:, p], t[:, p], before[p]) for p in range(model.chunks)], 1
    )


def pretrain_loss(
    model: Generator, teacher: Generator | None, batch: int, generator: torch.Generator
) -> Tensor:
    """Flow matching, or distillation if there is a teacher.

    Flow matching: the error of v = (x_t - x₀)/t, t >= 0.05 in the denominator, behind real past
    chunks with slight noise. Distillation: the jump from x_t against the end of the teacher's ODE.
    """
    N, L, device = batch, CHUNKS, model.device
    index = torch.randint(len(TRAIN_PROMPTS), (N,), generator=generator)
    prompts = [TRAIN_PROMPTS[i] for i in index]
    clean = encode(make_clips(prompts, generator))  # [N, L, F, 3, H, W]
    noise, past_noise = (torch.randn(clean.shape, generator=generator) for _ in range(2))
    u = 0.1 * torch.rand(N, L, 1, 1, 1, 1, generator=generator)
    t = torch.sigmoid(0.6 + 1.1 * torch.randn(N, L, generator=generator))
    if teacher:
        own = torch.randint(len(DISTILLED_AT), t.shape, generator=generator)
        own, chance = torch.tensor(DISTILLED_AT)[own], torch.rand(t.shape, generator=generator)
        t = torch.where(chance < 0.6, own, 0.05 + 0.95 * torch.rand(t.shape, generator=generator))
    past = (1 - u) * clean + u * past_noise
    clean, past, noise, t = (z.to(device) for z in (clean, past, noise, t))
    level = t[..., None, None, None, None]
    x_t = (1 - level) * clean + level * noise
    prediction = predict_all(model, x_t, t, contexts(model, past, prompts))
    if teacher is None:
        return ((prediction - clean) / level.clamp_min(0.05)).square().mean()
    with torch.no_grad():
        before = contexts(teacher, past, prompts)
        for k in range(ODE_STEPS):  # Euler, t to 0
            x0 = predict_all(teacher, x_t, t * (1 - k / ODE_STEPS), before)
            x_t = x0 + (x_t - x0) * (ODE_STEPS - k - 1) / (ODE_STEPS - k)
    return ((prediction - x_t).square().flatten(2).mean(2) + 0.03**2).sqrt().mean()


def fit(
    stage: str,
    model: Generator,
    teacher: Generator | None,
    steps: int,
    lr: float,
    args,
    folder: Path,
) -> None:
    """Train one stage, from its checkpoint if there is one. A step's data depend on seed and
    step alone."""
    hidden = [m.weight for m in model.blocks.modules() if isinstance(m, nn.Linear)]
    optimizers = muon_and_adamw(model, hidden)
    checkpoint, start = folder / f"{stage}.checkpoint.safetensors", 0
    names = ("seed", "batch", "width", "layers", "heads", "precision")
    described = json.dumps({n: getattr(args, n) for n in names} | {"steps": steps})
    if checkpoint.is_file():
        tensors, metadata = read_weights(checkpoint, "--out")
        if metadata.get("settings") != described:
            raise UserError(
                f"--out {folder}: holds a pre-training with other settings "
                f"({metadata.get('settings')}); name another folder"
            )
        start = int(metadata["step"])
        model.load_state_dict({n[6:]: t for n, t in tensors.items() if n.startswith("model.")})
        for i, optimizer in enumerate(optimizers):
            state = {}
            for name, t in tensors.items():
                if name.startswith(f"optimizer{i}."):
                    state.setdefault(int(name.split(".")[1]), {})[name.split(".")[2]] = t
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": state, "param_groups": groups})
    bar = tqdm(range(start, steps), desc=stage, initial=start, total=steps, unit="step")
    for step in bar:
        loss = pretrain_loss(model, teacher, args.batch, seeded(args.seed, step))
        model.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        step_with(optimizers, lr * min(1, (step + 1) / 50, 2 * (1 - step / steps)))
        bar.set_postfix(loss=f"{loss.item():.4f}", grad=f"{norm.item():.2f}")
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
            tensors = {f"model.{name}": t for name, t in model.state_dict().items()}
            for i, optimizer in enumerate(optimizers):
                for index, state in optimizer.state_dict()["state"].items():
                    tensors |= {f"optimizer{i}.{index}.{name}": t for name, t in state.items()}
            write_weights(checkpoint, tensors, {"step": str(step + 1), "settings": described})


def pretrain(args) -> None:
    """Both stages -> teacher.safetensors, base.safetensors in args.out."""
    folder, device = Path(args.out), choose_device(args.device)
    check_folder(folder, new=not (folder / "teacher.checkpoint.safetensors").exists())
    torch.manual_seed(args.seed)
    shape = {name: getattr(args, name) for name in ("width", "layers", "heads")}
    shape["bf16"] = args.precision == "bf16"
    folder.mkdir(parents=True, exist_ok=True)
    teacher = Generator(**shape, timesteps=FLOW_TIMESTEPS, flow=True).to(device)
    fit("teacher", teacher, None, args.teacher_steps, 2e-3, args, folder)
    save_generator(teacher, folder / "teacher.safetensors")
    student = Generator(**shape).to(device)
    student.load_state_dict(teacher.state_dict())
    teacher.requires_grad_(False)
    fit("student", student, teacher, args.student_steps, 5e-4, args, folder)
    save_generator(student, folder / "base.safetensors")
    print(f"wrote {folder}/base.safetensors; use it with arcopo.py --base")


def parse(arguments: list | None = None):
    parser = Parser(__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=nonempty, default="runs/pretrain", help="folder to write")
    for name, (default, text) in COUNTS.items():
        parser.add_argument(
            "--" + name.replace("_", "-"), type=int, default=default, help=f"{text} [{default}]"
        )
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random [0]")
    parser.add_argument(
        "--device", default="auto", help="cpu, cuda ...; auto: cuda if there is one"
    )
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
