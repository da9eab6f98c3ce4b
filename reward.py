"""The world, the judge and the reward of the AR-CoPO miniature; errors and files.

World    short 32x32 clips of one coloured shape in motion, with prompts.
Judge    procedural: never trained, never a reward. In VBench's role: detects hacking.
Reward   text alignment (TA), visual (VQ) and motion quality (MQ) from any open_clip model.

Clips are float tensors [N, FRAMES, 3, SIZE, SIZE] in [0, 1]; prompts are strings such as "a red
circle moving right". Nothing here depends on the generator.
"""

import argparse
import copy
import csv
import hashlib
import io
import logging
import math
import os
import sys
from collections.abc import Callable
from dataclasses import field, fields
from pathlib import Path

import imageio.v3 as iio
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

ASSETS = Path(__file__).resolve().parent / "assets"


class UserError(Exception):
    """Bad input: one line that says what is wrong and what to do. Ends a command, exit code 2."""


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:600] or type(error).__name__


class Parser(argparse.ArgumentParser):
    """argparse, with every error a UserError."""

    def __init__(self, description: str):
        wide = lambda prog: argparse.HelpFormatter(prog, width=120, max_help_position=28)
        super().__init__(description=description, allow_abbrev=False, formatter_class=wide)

    def error(self, message: str):
        raise UserError(f"{message}; --help lists the settings")


def nonempty(value: str) -> str:
    """The type of an argument that must not be empty."""
    if not value:
        raise argparse.ArgumentTypeError("must not be empty")
    return value


def option(default, text: str, valid: str = "", paper: str = ""):
    """A setting, as the field of a dataclass. valid: an interval such as (0, 1], or the allowed
    words, as "a | b"; paper: the paper's value."""
    return field(default=default, metadata={"text": text, "valid": valid, "paper": paper})


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def check_options(settings) -> None:
    """Hold a dataclass of options against their valid values. Raises UserError."""
    for f in fields(settings):
        value, valid = getattr(settings, f.name), f.metadata["valid"]
        if valid[:1] in ("[", "("):
            low, high = map(float, valid[1:-1].split(","))
            ends = [end for end, closed in ((low, "[" in valid), (high, "]" in valid)) if closed]
            if not (low < value < high or value in ends):
                raise UserError(f"{flag(f.name)} {value}: must be in {valid}")
        elif valid and value not in ("", *valid.split(" | ")):
            raise UserError(f"{flag(f.name)} {value}: must be one of {valid}")


def parse_options(cls: type, sections: dict[str, str], arguments: list | None, description: str):
    """Command-line arguments, as strings, numbers or paths, -> a dataclass of options.

    sections: {first option of a section of --help: its title}. Raises UserError.
    """
    parser = Parser(description)
    for f in fields(cls):
        if f.name in sections:
            section = parser.add_argument_group(sections[f.name])
        default = str(f.default).replace(str(ASSETS), ASSETS.name)
        text = f.metadata["text"] + (f" [{default}]" if default else "")
        text += f" (paper: {f.metadata['paper']})" if f.metadata["paper"] else ""
        section.add_argument(
            flag(f.name),
            type=nonempty if f.type is str else f.type,
            help=text,
            metavar={int: "N", float: "X", str: "TEXT"}[f.type],
            default=argparse.SUPPRESS,
        )
    return cls(**vars(parser.parse_args(arguments and [str(a) for a in arguments])))


def check_folder(folder: Path, new: bool = False) -> None:
    """Raises UserError unless the folder is writable or can be created; new: also unless empty."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(
            f"--out {folder}: {there} "
            f"{'cannot be written to' if there.is_dir() else 'is a file'}; name another folder"
        )
    if new and there == folder and any(folder.iterdir()):
        raise UserError(f"--out {folder}: is not empty; name a new folder")


def choose_device(name: str) -> str:
    name = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    try:
        if torch.device(name).type not in ("cpu", "cuda"):
            raise RuntimeError("neither cpu nor cuda")
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: cannot be used ({one_line(error)})") from error
    return name


def read_weights(file: str | Path, option: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file (never pickle). Raises UserError."""
    if not Path(file).is_file():
        raise UserError(f"{option} {file}: no such file")
    try:
        with safe_open(str(file), "pt") as f:
            tensors, metadata = {name: f.get_tensor(name) for name in f.keys()}, f.metadata() or {}
    except Exception as error:
        raise UserError(
            f"{option} {file}: not a whole safetensors file ({one_line(error)})"
        ) from error
    if not all(t.isfinite().all() for t in tensors.values()):
        raise UserError(f"{option} {file}: holds numbers that are not finite")
    return tensors, metadata


def write_weights(file: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write all or nothing."""
    part = Path(f"{file}.part")
    try:
        part.write_bytes(
            save({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, metadata)
        )
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)


def command(name: str, call: Callable[[], int]) -> int:
    """Run a command -> its exit code: 2, with one line on stderr, for a UserError or an OSError."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # don't crash on terminals without Unicode
    try:
        return call()
    except SystemExit as stop:  # --help
        return stop.code or 0
    except (UserError, OSError) as error:
        print(f"{name}: {one_line(error)}", file=sys.stderr)
        return 2


def fingerprint(module: torch.nn.Module) -> str:
    """Hash of the weights: rejects adapters and buffers made for another base."""
    digest = hashlib.sha256()
    for x in module.state_dict().values():
        digest.update(x.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def append_row(file: Path, row: dict) -> None:
    """Append to a CSV file; the first row also writes the header."""
    new = not file.exists()
    with open(file, "a", newline="") as f:
        writer = csv.DictWriter(f, row)
        if new:
            writer.writeheader()
        writer.writerow(row)


def markdown(rows: list[list[str]]) -> str:
    """A Markdown table with aligned columns; the first row is the header."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows = [rows[0], ["-" * width for width in widths], *rows[1:]]
    return "\n".join("| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows)


def save_gif(blocks: dict[str, Tensor], file: Path, scale: int = 4) -> None:
    """{label: clips [rows, columns, FRAMES, 3, H, W] in [0, 1]} -> a looping GIF, side by side."""
    parts = []
    for label, clips in blocks.items():
        clips = F.pad(clips.cpu(), (1, 1, 1, 1), value=0.5).permute(2, 0, 4, 1, 5, 3)
        frames = clips.flatten(1, 2).flatten(2, 3)  # [FRAMES, H, W, 3]
        frames = frames.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
        frames = (frames * 255).round().byte()
        if label:
            title = Image.new("RGB", (frames.shape[2], 14), "white")
            ImageDraw.Draw(title).text((4, 1), label, fill="black")
            title = torch.frombuffer(bytearray(title.tobytes()), dtype=torch.uint8).view(14, -1, 3)
            frames = torch.cat([title.expand(len(frames), -1, -1, -1), frames], 1)
        parts += [frames, torch.full_like(frames[:, :, : 3 * scale], 255)]
    image = torch.cat(parts[:-1], 2).numpy()
    iio.imwrite(file, image, extension=".gif", duration=150, loop=0)


# ------------------------------------------------------------------ world

SIZE, CHUNKS, CHUNK_FRAMES = 32, 4, 3
FRAMES = CHUNKS * CHUNK_FRAMES
BACKGROUND = torch.full((3,), 0.06)
COLOURS = {
    "red": (0.95, 0.15, 0.15),
    "green": (0.15, 0.85, 0.2),
    "blue": (0.2, 0.35, 1.0),
    "yellow": (0.95, 0.9, 0.15),
    "purple": (0.75, 0.2, 0.9),
    "cyan": (0.15, 0.85, 0.95),
}
SHAPES = ("circle", "square", "triangle", "cross")
MOTIONS = {
    "moving left": (-1, 0),
    "moving right": (1, 0),
    "moving up": (0, -1),
    "moving down": (0, 1),
    "standing still": (0, 0),
}
QUALITIES = {
    "sharp": 0.45,
    "blurry": 0.20,
    "noisy": 0.10,
    "dim": 0.15,
    "flickering": 0.10,
}  # share of the training chunks
PALETTE = torch.tensor(list(COLOURS.values())) - BACKGROUND  # [6, 3] above the background
DIRECTIONS = torch.tensor(list(MOTIONS.values()), dtype=torch.float32)  # [5, 2] x, y

TRIPLES = [
    (c, s, m) for c in range(len(COLOURS)) for s in range(len(SHAPES)) for m in range(len(MOTIONS))
]


def prompt_of(colour: int, shape: int, motion: int) -> str:
    return f"a {list(COLOURS)[colour]} {SHAPES[shape]} {list(MOTIONS)[motion]}"


# The split: every fifth combination along each axis is held out, so that each word, and each
# pair of words, also occurs in training prompts.
# Nothing is ever trained on a held-out combination: not the base, not the CLIP, not an adapter.
TRAIN_PROMPTS = [prompt_of(*t) for t in TRIPLES if sum(t) % 5 != 0]  # 96
HELD_OUT_PROMPTS = [prompt_of(*t) for t in TRIPLES if sum(t) % 5 == 0]  # 24


def attributes(prompts: list[str]) -> Tensor:
    """Colour, shape and motion index of each prompt: [N, 3]. Raises UserError if unknown."""
    known = {prompt_of(*t): t for t in TRIPLES}
    words = {word for prompt in known for word in prompt.split()}
    for prompt in prompts:
        if prompt not in known:
            unknown = [word for word in prompt.split() if word not in words]
            raise UserError(
                f"prompt {prompt!r}: "
                + (f"unknown word {unknown[0]!r}; " if unknown else "not of the world; ")
                + "expected 'a COLOUR SHAPE MOTION', "
                + f"COLOUR one of {', '.join(COLOURS)}; SHAPE one of "
                + f"{', '.join(SHAPES)}; MOTION one of {', '.join(MOTIONS)}"
            )
    return torch.tensor([known[prompt] for prompt in prompts]).reshape(-1, 3)


def coverage(shape: Tensor, centre: Tensor, radius: Tensor) -> Tensor:
    """Anti-aliased masks of shapes of equal area π radius².

    shape [N] index, centre [N, 2] x, y and radius [N] in pixels -> [N, SIZE, SIZE] in [0, 1].
    """
    axis = torch.arange(SIZE, device=centre.device) + 0.5
    x = axis[None, None, :] - centre[:, 0, None, None]
    y = axis[None, :, None] - centre[:, 1, None, None]
    r = radius[:, None, None]
    box = lambda w, h: torch.maximum(x.abs() - w, y.abs() - h)
    half, apex, arm = (
        0.8862 * r,
        1.5551 * r,
        1.1532 * r,
    )  # square's half side, triangle's circumradius, cross's half length
    distance = torch.stack(
        [
            (x.square() + y.square()).sqrt() - r,
            box(half, half),
            torch.maximum(y - apex / 2, 0.8660 * x.abs() - 0.5 * y - apex / 2),
            torch.minimum(box(arm, 0.36 * arm), box(0.36 * arm, arm)),
        ],
        1,
    )  # [N, 4, SIZE, SIZE] signed distance to each shape's edge
    return (0.5 - distance[torch.arange(len(shape)), shape]).clamp(0, 1)


def make_clips(
    prompts: list[str], generator: torch.Generator, quality: str | None = None
) -> Tensor:
    """Draw a clip of the world for each prompt: [N, FRAMES, 3, SIZE, SIZE] in [0, 1].

    Size, speed and start are random. Clips are of mixed quality chunk by chunk, like scraped video:
    each chunk has its own speed and drift, and is sharp, blurry, noisy, dim or flickering. With
    `quality` given, the whole clip has that quality and moves steadily: "sharp" is the ideal.
    """
    triple, n = attributes(prompts), len(prompts)
    uniform = lambda low, high, *size: low + (high - low) * torch.rand(*size, generator=generator)
    radius, speed = uniform(4.0, 5.5, n), uniform(0.4, 1.2, n)
    velocity = DIRECTIONS[triple[:, 2], None] * speed[:, None, None]  # [N, 1, 2] px a frame
    if quality is None:
        velocity = velocity * uniform(0.5, 1.5, n, CHUNKS, 1) + 0.25 * torch.randn(
            n, CHUNKS, 2, generator=generator
        )
        kind = torch.multinomial(
            torch.tensor(list(QUALITIES.values())), n * CHUNKS, True, generator=generator
        ).view(n, CHUNKS)
    else:
        velocity = velocity.expand(n, CHUNKS, 2)
        kind = torch.full((n, CHUNKS), list(QUALITIES).index(quality))
    path = velocity.repeat_interleave(CHUNK_FRAMES, 1).cumsum(1)  # [N, FRAMES, 2]
    low, high = 7 - path.amin(1), SIZE - 7 - path.amax(1)  # starts that stay in view
    start = torch.where(low < high, low + (high - low) * uniform(0, 1, n, 2), (low + high) / 2)
    centre = (start[:, None] + path).flatten(0, 1)
    mask = coverage(
        triple[:, 1].repeat_interleave(FRAMES), centre, radius.repeat_interleave(FRAMES)
    )
    signal = (
        mask[:, None] * PALETTE[triple[:, 0]].repeat_interleave(FRAMES, 0)[:, :, None, None]
    )  # [N*FRAMES, 3, H, W]

    kind = kind.repeat_interleave(CHUNK_FRAMES, 1).flatten()  # per frame
    level = (
        uniform(0, 1, n, CHUNKS).repeat_interleave(CHUNK_FRAMES, 1).flatten()
    )  # strength, one per chunk
    pick = lambda name: (kind == list(QUALITIES).index(name))[:, None, None, None]
    gain = (
        1
        - pick("dim") * (0.35 + 0.3 * level[:, None, None, None])
        - pick("flickering") * uniform(0, 0.7, n * FRAMES, 1, 1, 1)
    )
    blurred = F.avg_pool2d(F.avg_pool2d(signal, 3, 1, 1), 3, 1, 1)
    signal = (
        torch.where(
            pick("blurry"), signal.lerp(blurred, (0.6 + 0.4 * level)[:, None, None, None]), signal
        )
        * gain
    )
    noise = (
        torch.randn(signal.shape, generator=generator)
        * (0.08 + 0.12 * level[:, None, None, None])
        * pick("noisy")
    )
    return (BACKGROUND[:, None, None] + signal + noise).clamp(0, 1).view(n, FRAMES, 3, SIZE, SIZE)


# ------------------------------------------------------------------ judge


def judge(clips: Tensor, prompts: list[str]) -> dict[str, Tensor]:
    """Measure clips [N, FRAMES, 3, SIZE, SIZE] against their prompts by fixed rules -> entries [N].

    The shape is found in each frame (its coverage, relative to its own brightness) and compared
    with an ideal drawing of the same place, size and colour.

    colour           1 if right, else 0: nearest colour of the palette.
    shape            1 if right, else 0: the shape whose ideal drawing fits best.
    direction        1 if right, else 0: from first to last position; "still" is less than 2 px.
                     All three are 0 if half of the frames are empty, direction also if the first or
                     last is. Empty: the 24 brightest pixels are, on average, below 15 %.
    text             mean of the three, in [0, 1] (text alignment).
    all_right        1 if all three are right.
    visual           mean over frames of 1 - |frame - ideal| / |ideal - background| (L2), clamped to
                     [0, 1]; 0 for empty frames.
    motion_quality   exp(-a) · exp(-2 f) in [0, 1]: a is the mean acceleration of the position (px
                     per frame²), f the mean change of light (area x brightness) between frames,
                     relative to its mean; 0 if any frame is empty.
    area (px²), displacement (px from first to last frame), x, y (mean position, px): not scores;
    they detect collapse.
    """
    clips, triple = clips.float(), attributes(prompts).to(clips.device)
    n, palette = len(clips), PALETTE.to(clips.device)
    signal = clips - BACKGROUND.to(clips.device)[:, None, None]  # [N, F, 3, H, W]
    pull = torch.einsum(
        "nfchw,nfhw->nc", signal, signal.square().sum(2)
    )  # strong pixels count most
    colour = F.cosine_similarity(pull[:, None], palette, dim=-1).argmax(-1)  # [N]
    unit = palette[colour] / palette[colour].square().sum(-1, keepdim=True)
    mask = torch.einsum("nfchw,nc->nfhw", signal, unit).flatten(
        0, 1
    )  # [N*F, H, W] 1 inside the shape
    level = mask.flatten(1).topk(24).values.mean(1)  # brightness of the shape itself
    seen = level > 0.15
    mask = mask / level.clamp_min(0.15)[:, None, None]
    near = F.max_pool2d((mask > 0.5).float(), 3, 1, 1)  # the shape and its soft edge
    weight = mask.clamp(0, 1) * near
    area = weight.sum((1, 2))  # [N*F] px
    axis = torch.arange(SIZE, device=clips.device) + 0.5
    centre = (
        torch.stack([(weight.sum(1) * axis).sum(1), (weight.sum(2) * axis).sum(1)], -1)
        / area.clamp_min(1)[:, None]
    )
    radius = (area / math.pi).sqrt()
    ideals = torch.stack(
        [
            coverage(torch.full_like(area, s, dtype=torch.long), centre, radius)
            for s in range(len(SHAPES))
        ],
        1,
    )
    error = (
        (ideals - mask.clamp(0, 1.2)[:, None]).square().sum((2, 3)).view(n, FRAMES, -1)
    )  # [N, F, 4]
    shape = error.sum(1).argmin(-1)  # [N]

    ideal = ideals.view(n, FRAMES, len(SHAPES), SIZE, SIZE)[
        torch.arange(n), :, shape
    ]  # [N, F, H, W]
    ideal = ideal[:, :, None] * palette[colour][:, None, :, None, None]  # [N, F, 3, H, W]
    visual = 1 - (signal - ideal).flatten(2).norm(dim=2) / ideal.flatten(2).norm(dim=2).clamp_min(1)
    seen, centre, area = seen.view(n, FRAMES), centre.view(n, FRAMES, 2), area.view(n, FRAMES)
    way = centre[:, -1] - centre[:, 0]
    axis_of = (
        way.abs().argmax(1, keepdim=True) == torch.arange(2, device=clips.device)
    ) * way.sign()
    heading = torch.where(
        way.norm(dim=1, keepdim=True) < 2, torch.zeros_like(way), axis_of
    )  # a row of DIRECTIONS
    acceleration = (centre[:, 2:] - 2 * centre[:, 1:-1] + centre[:, :-2]).norm(dim=-1).mean(1)
    light = area * level.view(n, FRAMES)
    flicker = light.diff(dim=1).abs().mean(1) / light.mean(1).clamp_min(1)
    right = {
        "colour": colour == triple[:, 0],
        "shape": shape == triple[:, 1],
        "direction": (heading == DIRECTIONS.to(clips.device)[triple[:, 2]]).all(1),
    }
    right = {name: (value & (seen.sum(1) > FRAMES // 2)).float() for name, value in right.items()}
    right["direction"] = right["direction"] * seen[:, 0] * seen[:, -1]
    return right | {
        "text": (right["colour"] + right["shape"] + right["direction"]) / 3,
        "all_right": right["colour"] * right["shape"] * right["direction"],
        "visual": (visual.clamp(0, 1) * seen).mean(1),
        "motion_quality": (-acceleration - 2 * flicker).exp() * seen.all(1),
        "area": area.mean(1),
        "displacement": way.norm(dim=1),
        "x": centre[..., 0].mean(1),
        "y": centre[..., 1].mean(1),
    }


# ------------------------------------------------------------------ reward

COMPONENTS = ("ta", "vq", "mq")
WORDINGS = ("sharp", "blurry", "noisy", "dim")


def worded(prompt: str, quality: str) -> str:
    """'a red circle moving right' -> 'a blurry red circle moving right'."""
    return prompt.replace("a ", f"a {quality} ", 1)


class ClipReward:
    """Three rewards from one open_clip model: (clips, prompts) -> {"ta", "vq", "mq": [N]}.

    ta  text alignment: mean cosine of the frames with the prompt.
    vq  visual quality, as in CLIP-IQA (Wang et al. 2023): probability of the sharp wording of the
        prompt against its opposite, mean over three opposites (blurry, noisy, dim) and over frames.
    mq  motion quality: mean cosine of consecutive frames.

    name: 'ARCH:TAG' of open_clip ('ViT-B-32:laion2b_s34b_b79k', downloaded once), 'ARCH:FILE' with
    local weights, or a folder (or a file in it) with open_clip_config.json and
    open_clip_model.safetensors. Weights load from safetensors only. Raises UserError.
    """

    def __init__(self, name: str = str(ASSETS / "clip"), device: str | torch.device = "cpu"):
        import open_clip  # slow to import: only where needed

        architecture, _, weights = ("", "", name) if Path(name).exists() else name.rpartition(":")
        tags = open_clip.list_pretrained_tags_by_model(architecture)
        if architecture and architecture not in open_clip.list_models():
            raise UserError(
                f"--clip {name}: open_clip has no model {architecture!r}; "
                "open_clip.list_models() lists them"
            )
        if architecture and weights not in tags and not Path(weights).is_file():
            raise UserError(
                f"--clip {name}: {weights!r} is neither a file nor one of the tags of "
                f"{architecture}: {', '.join(tags)}"
            )
        file = Path(weights)
        if not architecture:  # a folder, or a file in it
            folder = file.parent if file.is_file() else file
            file, architecture, weights = (
                folder / "open_clip_model.safetensors",
                f"local-dir:{folder}",
                None,
            )
            if (
                not (folder / "open_clip_config.json").is_file()
                or Path(name).is_file()
                and Path(name) != file
            ):
                raise UserError(
                    f"--clip {name}: expected ARCH:TAG (ViT-B-32:laion2b_s34b_b79k), ARCH:FILE, "
                    "or a folder with "
                    "open_clip_config.json and open_clip_model.safetensors"
                )
        try:
            if weights in tags:
                logging.getLogger("huggingface_hub").setLevel(
                    logging.ERROR
                )  # our error line is enough
                file = Path(
                    open_clip.download_pretrained(
                        open_clip.get_pretrained_cfg(architecture, weights)
                    )
                )
            if file.suffix != ".safetensors" or not file.is_file():
                raise FileNotFoundError(
                    f"weights must be a .safetensors file, never a pickle; found {file}"
                )
            self.model = open_clip.create_model(
                architecture, pretrained=weights, device=device, require_pretrained=True
            ).eval()
            self.tokenizer = open_clip.get_tokenizer(architecture)
        except (
            Exception
        ) as error:  # open_clip raises a dozen kinds: no network, truncated, wrong shape
            raise UserError(
                f"--clip {name}: open_clip cannot load it ({one_line(error)})"
            ) from error
        self.model.requires_grad_(False)
        self.device = torch.device(device)

    @torch.no_grad()
    def text_features(self, texts: list[str]) -> Tensor:
        """[N] texts -> unit vectors [N, D]."""
        return self.model.encode_text(self.tokenizer(texts).to(self.device), normalize=True).float()

    @torch.no_grad()
    def frame_features(self, frames: Tensor) -> Tensor:
        """frames [N, 3, H, W] in [0, 1] -> unit vectors [N, D]; the model's own preprocessing."""
        visual = self.model.visual
        size = (
            visual.image_size
            if isinstance(visual.image_size, (tuple, list))
            else (visual.image_size,) * 2
        )
        mean, std = (
            torch.tensor(v, device=self.device)[:, None, None]
            for v in (visual.image_mean, visual.image_std)
        )
        features = []
        for part in frames.split(256):
            part = part.to(self.device, torch.float32)
            if tuple(part.shape[-2:]) != tuple(size):
                part = F.interpolate(part, size, mode="bicubic", antialias=True).clamp(0, 1)
            features.append(self.model.encode_image((part - mean) / std, normalize=True).float())
        return torch.cat(features)

    def __call__(self, clips: Tensor, prompts: list[str]) -> dict[str, Tensor]:
        n = len(clips)
        frames = self.frame_features(clips.flatten(0, 1)).view(n, clips.shape[1], -1)  # [N, F, D]
        unique = sorted(set(prompts))
        texts = self.text_features(
            [t for p in unique for t in (p, *(worded(p, q) for q in WORDINGS))]
        )
        texts = texts.view(len(unique), 1 + len(WORDINGS), -1)[
            [unique.index(p) for p in prompts]
        ]  # [N, 5, D]
        cosine = torch.einsum("nfd,nkd->nfk", frames, texts)  # [N, F, 5]
        vq = (
            (self.model.logit_scale.exp() * (cosine[..., 1:2] - cosine[..., 2:])).sigmoid().mean(-1)
        )  # softmax of each pair
        return {
            "ta": cosine[..., 0].mean(1),
            "vq": vq.mean(1),
            "mq": (frames[:, 1:] * frames[:, :-1]).sum(-1).mean(1),
        }


class WeightedReward:
    """Σ w_k z_k / Σ w_k, where z_k is a component standardised on reference clips.

    components(clips, prompts) -> {name: [N]}; a call returns also {"reward": [N]}.
    """

    def __init__(
        self, components: Callable, weights: dict[str, float], clips: Tensor, prompts: list[str]
    ):
        self.components, self.weights = components, weights
        self.scales = {
            name: (value.mean().item(), value.std().item())
            for name, value in components(clips, prompts).items()
        }

    def __call__(self, clips: Tensor, prompts: list[str]) -> dict[str, Tensor]:
        scores = self.components(clips, prompts)
        z = {
            name: (scores[name] - mean) / max(std, 1e-6)
            for name, (mean, std) in self.scales.items()
        }
        total = sum(weight * z[name] for name, weight in self.weights.items()) / sum(
            self.weights.values()
        )
        return {"reward": total} | scores

    def reweighted(self, weights: dict[str, float]) -> "WeightedReward":
        """The same components on the same scales, otherwise weighted."""
        other = copy.copy(self)
        other.weights = weights
        return other


def parse_weights(text: str, name: str = "reward_weights") -> dict[str, float]:
    """'ta=1,vq=1', the setting `name` -> {"ta": 1.0, "vq": 1.0}; other components weigh 0."""
    try:
        weights = {
            component.strip(): float(value)
            for component, value in (part.split("=") for part in text.split(","))
        }
    except ValueError:
        weights = {}
    if (
        not set(weights) <= set(COMPONENTS)
        or not all(0 <= w < math.inf for w in weights.values())
        or not any(weights.values())
    ):
        raise UserError(
            f"--{name.replace('_', '-')} {text}: expected "
            f"{','.join(c + '=1' for c in COMPONENTS)}, each >= 0 and one above 0"
        )
    return weights


def parse_sweep(text: str) -> list[float]:
    try:
        strengths = sorted({float(part) for part in text.split(",")})
    except ValueError:
        strengths = []
    if not strengths or not all(0 < s <= 10 for s in strengths):
        raise UserError(f"--sweep {text}: expected strengths in (0, 10], as 0.4,0.6,0.8,1")
    return strengths
