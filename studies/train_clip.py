"""Train the CLIP in assets/clip from nothing: python -m studies.train_clip (70 s on 2 cores)."""

import json
import math
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

from arcopo import Parser, exit_code
from reward import (COLOURS, FRAMES, MOTIONS, SHAPES, SIZE, TRAIN_PROMPTS, WORDINGS, make_clips,
                    prompt_of, worded)

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


class NoBfloat16(TorchFunctionMode):
    """torch's Muon orthogonalizes in bfloat16, which takes 150 times as long as float32 on a CPU
    without bfloat16 instructions."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is Tensor.bfloat16:
            return args[0].clone()
        return function(*args, **(kwargs or {}))


def step_with(optimizers: list[torch.optim.Optimizer], lr: float) -> None:
    for optimizer in optimizers:
        for parameters in optimizer.param_groups:
            parameters["lr"] = lr
        with NoBfloat16():
            optimizer.step()


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
    with tempfile.TemporaryDirectory() as folder:  # `out` is written only at the end
        Path(folder, "open_clip_config.json").write_text(json.dumps(CLIP_CONFIG))
        model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
        tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    mean, std = (CLIP_CONFIG["preprocess_cfg"][name][0] for name in ("mean", "std"))
    hidden = [p for name, p in model.named_parameters() if "resblocks" in name and p.ndim == 2]
    optimizers = muon_and_adamw(model, hidden)
    bar = tqdm(range(steps), desc="clip", unit="step")
    for step in bar:
        kinds = WORDINGS if step % 2 == 0 else (None,)
        frames, captions = [], []
        for kind in kinds:
            motions = torch.randint(len(MOTIONS), (len(COLOURS), len(SHAPES)),
                                    generator=generator).tolist()
            drawn = [prompt_of(c, s, motions[c][s]) for c in range(len(COLOURS))
                     for s in range(len(SHAPES))]
            prompts = [prompt for prompt in drawn if prompt in TRAIN_PROMPTS]
            clips = make_clips(prompts, generator, kind, RADII)
            frame = torch.randint(FRAMES, (len(clips),), generator=generator)
            frames.append(clips[torch.arange(len(clips)), frame])
            captions += [worded(p, kind) if kind else p for p in prompts]
        images = torch.cat(frames)
        gain, sigma = torch.rand(2, len(images), 1, 1, 1, generator=generator)
        gain, sigma = 0.2 * gain, 0.05 * sigma
        images = (images * (0.9 + gain)
                  + sigma * torch.randn(images.shape, generator=generator)).clamp(0, 1)
        with torch.autocast("cpu", torch.bfloat16):
            image = model.encode_image((images - mean) / std, normalize=True)
            text = model.encode_text(tokenizer(captions), normalize=True)
        logits = model.logit_scale.exp() * image.float() @ text.float().T
        target = torch.arange(len(logits))
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        model.zero_grad()
        loss.backward()
        step_with(optimizers, 2e-3 * min(1, (step + 1) / 30, 2 * (1 - step / steps)))
        model.logit_scale.data.clamp_(0, math.log(100))
        accuracy = (logits.argmax(1) == target).float().mean().item()
        bar.set_postfix(loss=f"{loss.item():.3f}", accuracy=f"{accuracy:.2f}")
    out.mkdir(parents=True, exist_ok=True)
    weights = {name: t.half() if t.is_floating_point() else t
               for name, t in model.state_dict().items()}
    (out / "open_clip_config.json").write_text(json.dumps(CLIP_CONFIG, indent=1) + "\n")
    save_file(weights, out / "open_clip_model.safetensors")


def main(arguments: list | None = None) -> int:
    try:
        parser = Parser(description="Train the shipped CLIP from nothing.")
        parser.add_argument("--out", default="runs/clip", help="folder to write [runs/clip]")
        parser.add_argument("--steps", type=int, default=600, help="training steps [600]")
        parser.add_argument("--seed", type=int, default=0, help="seed of everything random [0]")
        args = parser.parse_args(arguments and [str(a) for a in arguments])
        train_clip(Path(args.out), args.steps, args.seed)
        print(f"wrote {args.out}; use it with arcopo.py --clip {args.out}")
        return 0
    except BaseException as error:
        return exit_code(error)


if __name__ == "__main__":
    sys.exit(main())
