"""The world, the judge and the rewards of the AR-CoPO miniature.

World    short 32x32 clips of one coloured shape in motion, with prompts.
Judge    procedural: never trained, never a reward. It detects reward hacking, as VBench does in
         the paper.
Rewards  text alignment (TA), visual quality (VQ) and motion quality (MQ) from any open_clip model,
         or functions of one's own, standardised and weighted.

Clips are float tensors [N, FRAMES, 3, SIZE, SIZE] in [0, 1]; prompts are strings such as "a red
circle moving right".
"""

import importlib
import logging
import math
import sys
import traceback
import weakref
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

ASSETS = Path(__file__).resolve().parent / "assets"


class UserError(Exception):
    """Bad input: one line that says what is wrong and what to do. Ends a command, exit code 2."""


# ------------------------------------------------------------------ world

SIZE, CHUNKS, CHUNK_FRAMES = 32, 4, 3
FRAMES = CHUNKS * CHUNK_FRAMES
BACKGROUND = torch.full((3,), 0.06)
COLOURS = {"red": (0.95, 0.15, 0.15), "green": (0.15, 0.85, 0.2), "blue": (0.2, 0.35, 1.0),
           "yellow": (0.95, 0.9, 0.15), "purple": (0.75, 0.2, 0.9), "cyan": (0.15, 0.85, 0.95)}
SHAPES = ("circle", "square", "triangle", "cross")
MOTIONS = {"moving left": (-1, 0), "moving right": (1, 0), "moving up": (0, -1),
           "moving down": (0, 1), "standing still": (0, 0)}
QUALITIES = {"sharp": 0.45, "blurry": 0.20, "noisy": 0.10, "dim": 0.15,
             "flickering": 0.10}                            # share of the training chunks
WORDS = tuple(COLOURS), SHAPES, tuple(MOTIONS)
PALETTE = torch.tensor(list(COLOURS.values())) - BACKGROUND                 # [6, 3]
DIRECTIONS = torch.tensor(list(MOTIONS.values()), dtype=torch.float32)      # [5, 2] x, y

TRIPLES = [(c, s, m) for c in range(len(COLOURS)) for s in range(len(SHAPES))
           for m in range(len(MOTIONS))]


def prompt_of(colour: int, shape: int, motion: int) -> str:
    return f"a {list(COLOURS)[colour]} {SHAPES[shape]} {list(MOTIONS)[motion]}"


# The split: every fifth combination along each axis is held out, so that each word, and each
# pair of words, also occurs in training prompts.
# Nothing is ever trained on a held-out combination: not the base, not the CLIP, not an adapter.
TRAIN_PROMPTS = [prompt_of(*t) for t in TRIPLES if sum(t) % 5 != 0]         # 96
HELD_OUT_PROMPTS = [prompt_of(*t) for t in TRIPLES if sum(t) % 5 == 0]      # 24
JUDGE_PROMPTS = {"held-out": HELD_OUT_PROMPTS,
                 "training": [prompt_of(*t) for t in TRIPLES if sum(t) % 5 == 1]}


def attributes(prompts: list[str]) -> Tensor:
    """Colour, shape and motion index of each prompt: [N, 3]. Raises UserError if unknown."""
    known = {prompt_of(*t): t for t in TRIPLES}
    for prompt in prompts:
        if prompt not in known:
            raise UserError(f"prompt {prompt!r}: expected 'a COLOUR SHAPE MOTION', COLOUR one of "
                            f"{', '.join(COLOURS)}; SHAPE one of {', '.join(SHAPES)}; MOTION one "
                            f"of {', '.join(MOTIONS)}")
    return torch.tensor([known[prompt] for prompt in prompts]).reshape(-1, 3)


def coverage(shape: Tensor, centre: Tensor, radius: Tensor) -> Tensor:
    """Anti-aliased masks of shapes of equal area π radius².

    shape [N] index, centre [N, 2] x, y and radius [N] in pixels -> [N, SIZE, SIZE] in [0, 1].
    """
    axis = torch.arange(SIZE, device=centre.device) + 0.5
    x = axis[None, None, :] - centre[:, 0, None, None]
    y = axis[None, :, None] - centre[:, 1, None, None]
    r = radius[:, None, None]
    half, apex, arm = 0.8862 * r, 1.5551 * r, 1.1532 * r    # half a square's side, a triangle's
    box = lambda w, h: torch.maximum(x.abs() - w, y.abs() - h)      # circumradius, half a cross
    distance = torch.stack([                # [N, 4, SIZE, SIZE] signed, to each shape's edge
        (x.square() + y.square()).sqrt() - r,
        box(half, half),
        torch.maximum(y - apex / 2, 0.8660 * x.abs() - 0.5 * y - apex / 2),
        torch.minimum(box(arm, 0.36 * arm), box(0.36 * arm, arm)),
    ], 1)
    return (0.5 - distance[torch.arange(len(shape)), shape]).clamp(0, 1)


def make_clips(prompts: list[str], generator: torch.Generator, quality: str | None = None,
               radii: tuple[float, float] = (4.0, 5.5)) -> Tensor:
    """Draw a clip of the world for each prompt: [N, FRAMES, 3, SIZE, SIZE] in [0, 1].

    Size (radii: its range, px), speed and start are random. Clips are of mixed quality chunk by
    chunk, like scraped video: each chunk has its own speed and drift, and is sharp, blurry, noisy,
    dim or flickering. With `quality` given, the whole clip has that quality and moves steadily:
    "sharp" is the ideal.
    """
    triple, n = attributes(prompts), len(prompts)
    uniform = lambda low, high, *size: low + (high - low) * torch.rand(*size, generator=generator)
    radius, speed = uniform(*radii, n), uniform(0.4, 1.2, n)
    velocity = DIRECTIONS[triple[:, 2], None] * speed[:, None, None]    # [N, 1, 2] px a frame
    if quality is None:
        velocity = velocity * uniform(0.5, 1.5, n, CHUNKS, 1)
        velocity = velocity + 0.25 * torch.randn(n, CHUNKS, 2, generator=generator)
        shares = torch.tensor(list(QUALITIES.values()))
        kind = torch.multinomial(shares, n * CHUNKS, True, generator=generator).view(n, CHUNKS)
    else:
        velocity = velocity.expand(n, CHUNKS, 2)
        kind = torch.full((n, CHUNKS), list(QUALITIES).index(quality))
    path = velocity.repeat_interleave(CHUNK_FRAMES, 1).cumsum(1)        # [N, FRAMES, 2]
    low, high = 7 - path.amin(1), SIZE - 7 - path.amax(1)               # starts that stay in view
    start = torch.where(low < high, low + (high - low) * uniform(0, 1, n, 2), (low + high) / 2)
    centre = (start[:, None] + path).flatten(0, 1)
    shape, colour = (triple[:, i].repeat_interleave(FRAMES) for i in (1, 0))
    mask = coverage(shape, centre, radius.repeat_interleave(FRAMES))
    signal = mask[:, None] * PALETTE[colour][:, :, None, None]          # [N*FRAMES, 3, H, W]

    per_frame = lambda z: z.repeat_interleave(CHUNK_FRAMES, 1).flatten()[:, None, None, None]
    kind, level = per_frame(kind), per_frame(uniform(0, 1, n, CHUNKS))  # level: of the fault
    pick = lambda name: kind == list(QUALITIES).index(name)
    gain = 1 - pick("dim") * (0.35 + 0.3 * level)
    gain = gain - pick("flickering") * uniform(0, 0.7, n * FRAMES, 1, 1, 1)
    blurred = F.avg_pool2d(F.avg_pool2d(signal, 3, 1, 1), 3, 1, 1)
    signal = torch.where(pick("blurry"), signal.lerp(blurred, 0.6 + 0.4 * level), signal) * gain
    noise = torch.randn(signal.shape, generator=generator) * (0.08 + 0.12 * level) * pick("noisy")
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
    signal = clips - BACKGROUND.to(clips.device)[:, None, None]             # [N, F, 3, H, W]
    pull = torch.einsum("nfchw,nfhw->nc", signal, signal.square().sum(2))   # bright pixels count
    colour = F.cosine_similarity(pull[:, None], palette, dim=-1).argmax(-1)     # [N]
    unit = palette[colour] / palette[colour].square().sum(-1, keepdim=True)
    mask = torch.einsum("nfchw,nc->nfhw", signal, unit).flatten(0, 1)   # [N*F, H, W] 1 inside
    level = mask.flatten(1).topk(24).values.mean(1)         # brightness of the shape itself
    seen = level > 0.15
    mask = mask / level.clamp_min(0.15)[:, None, None]
    near = F.max_pool2d((mask > 0.5).float(), 3, 1, 1)      # the shape and its soft edge
    weight = mask.clamp(0, 1) * near
    area = weight.sum((1, 2))                               # [N*F] px
    axis = torch.arange(SIZE, device=clips.device) + 0.5
    moment = torch.stack([(weight.sum(1) * axis).sum(1), (weight.sum(2) * axis).sum(1)], -1)
    centre, radius = moment / area.clamp_min(1)[:, None], (area / math.pi).sqrt()
    index = [torch.full_like(area, s, dtype=torch.long) for s in range(len(SHAPES))]
    ideals = torch.stack([coverage(s, centre, radius) for s in index], 1)   # [N*F, 4, H, W]
    error = (ideals - mask.clamp(0, 1.2)[:, None]).square().sum((2, 3))
    shape = error.view(n, FRAMES, -1).sum(1).argmin(-1)     # [N]

    ideal = ideals.view(n, FRAMES, len(SHAPES), SIZE, SIZE)[torch.arange(n), :, shape]
    ideal = ideal[:, :, None] * palette[colour][:, None, :, None, None]     # [N, F, 3, H, W]
    visual = 1 - (signal - ideal).flatten(2).norm(dim=2) / ideal.flatten(2).norm(dim=2).clamp_min(1)
    seen, centre, area = seen.view(n, FRAMES), centre.view(n, FRAMES, 2), area.view(n, FRAMES)
    way = centre[:, -1] - centre[:, 0]
    largest = way.abs().argmax(1, keepdim=True) == torch.arange(2, device=clips.device)
    heading = largest * way.sign() * (way.norm(dim=1, keepdim=True) >= 2)   # a row of DIRECTIONS
    acceleration = (centre[:, 2:] - 2 * centre[:, 1:-1] + centre[:, :-2]).norm(dim=-1).mean(1)
    light = area * level.view(n, FRAMES)
    flicker = light.diff(dim=1).abs().mean(1) / light.mean(1).clamp_min(1)
    right = {"colour": colour == triple[:, 0], "shape": shape == triple[:, 1],
             "direction": (heading == DIRECTIONS.to(clips.device)[triple[:, 2]]).all(1)}
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


def evaluate(clips: Tensor, prompts: list[str], reward: Callable) -> dict[str, Tensor]:
    """Rewards, judge and detectors of collapse of each clip -> entries [prompts, clips of a prompt]
    on the CPU. The clips of a prompt must be adjacent, and as many for each.

    judge: mean of text, visual and motion_quality, in [0, 1]. spread: standard deviation of the
    mean positions of a prompt's clips, px, the same for each; NaN for a single clip.
    """
    scores = reward(clips, prompts) | judge(clips, prompts)
    scores["judge"] = (scores["text"] + scores["visual"] + scores["motion_quality"]) / 3
    count = len(prompts) // len(set(prompts))
    scores = {name: value.float().cpu().view(-1, count) for name, value in scores.items()}
    variance = sum(scores.pop(axis).var(1, correction=0, keepdim=True) for axis in "xy")
    spread = variance.sqrt() if count > 1 else torch.full_like(variance, math.nan)
    return scores | {"spread": spread.expand(-1, count)}


# ------------------------------------------------------------------ rewards

WORDINGS = ("sharp", "blurry", "noisy", "dim")


def worded(prompt: str, quality: str) -> str:
    """'a red circle moving right' -> 'a blurry red circle moving right'."""
    return prompt.replace("a ", f"a {quality} ", 1)


class ClipReward:
    """Rewards from one open_clip model. Each takes clips [N, F, 3, H, W] in [0, 1] and N prompts
    and returns [N]:

    text_alignment   mean cosine of the frames with the prompt.
    visual_quality   as in CLIP-IQA (Wang et al. 2023): probability of the sharp wording of the
                     prompt against its opposite, mean over three opposites (blurry, noisy, dim)
                     and over frames.
    motion_quality   mean cosine of consecutive frames.

    name: 'ARCH:TAG' of open_clip ('ViT-B-32:laion2b_s34b_b79k', downloaded once), 'ARCH:FILE' with
    local weights, or a folder with open_clip_config.json and open_clip_model.safetensors. whole:
    frames that are not square are padded with black, not cropped. Raises UserError.
    """

    batch = 256         # frames encoded at a time

    def __init__(self, name: str = str(ASSETS / "clip"), device: str | torch.device = "cpu",
                 whole: bool = False):
        import open_clip  # slow to import: only where needed

        architecture, _, weights = name.partition(":")
        if Path(name).is_dir():
            architecture, weights = f"local-dir:{name}", None
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)    # no warning without a login
        try:
            self.model = open_clip.create_model(architecture, pretrained=weights, device=device,
                                                require_pretrained=True).eval()
            self.tokenizer = open_clip.get_tokenizer(architecture)
        except Exception as error:      # open_clip raises a dozen kinds: no network, wrong shape
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"--clip {name}: open_clip cannot load it ({reason}); expected "
                            "ARCH:TAG (ViT-B-32:laion2b_s34b_b79k), ARCH:FILE, or a folder with "
                            "open_clip_config.json and open_clip_model.safetensors") from error
        self.model.requires_grad_(False).to(memory_format=torch.channels_last)      # faster
        self.device, self.whole = torch.device(device), whole
        self.texts, self.frames = {}, (lambda: None, None)      # what was encoded already

    @torch.no_grad()
    def text_features(self, texts: list[str]) -> Tensor:
        """[N] texts -> unit vectors [N, D]."""
        return self.model.encode_text(self.tokenizer(texts).to(self.device), normalize=True).float()

    @torch.no_grad()
    def frame_features(self, frames: Tensor) -> Tensor:
        """frames [N, 3, H, W] in [0, 1] -> unit vectors [N, D]. The model's own preprocessing: the
        shorter side is resized, then the centre is cropped; whole: the longer, then padded."""
        visual, features = self.model.visual, []
        size = visual.image_size
        height, width = size if isinstance(size, (tuple, list)) else (size, size)
        mean, std = (torch.tensor(v, device=self.device)[:, None, None]
                     for v in (visual.image_mean, visual.image_std))
        fit = min if self.whole else max
        scale = fit(height / frames.shape[2], width / frames.shape[3])
        resized = [fit(s, round(scale * n)) for s, n in zip((height, width), frames.shape[2:])]
        top, left = int((height - resized[0]) / 2), int((width - resized[1]) / 2)   # < 0: crop
        edges = left, width - resized[1] - left, top, height - resized[0] - top
        for part in frames.split(self.batch):
            part = part.to(self.device, torch.float32)
            if list(part.shape[2:]) != resized:
                part = F.interpolate(part, resized, mode="bicubic", antialias=True).clamp(0, 1)
            part = (F.pad(part, edges) - mean) / std
            features.append(self.model.encode_image(part, normalize=True).float())
        return torch.cat(features)

    def clip_features(self, clips: Tensor) -> Tensor:
        """clips [N, F, 3, H, W] -> [N, F, D]; the last clips are kept, for the next reward."""
        if self.frames[0]() is not clips:
            features = self.frame_features(clips.flatten(0, 1)).view(*clips.shape[:2], -1)
            self.frames = weakref.ref(clips), features
        return self.frames[1]

    def cosines(self, clips: Tensor, prompts: list[str]) -> Tensor:
        """Of each frame with the prompt and its four wordings: [N, F, 5]."""
        for p in set(prompts) - set(self.texts):
            self.texts[p] = self.text_features([p, *(worded(p, q) for q in WORDINGS)])
        texts = torch.stack([self.texts[p] for p in prompts])
        return torch.einsum("nfd,nkd->nfk", self.clip_features(clips), texts)

    def text_alignment(self, clips: Tensor, prompts: list[str]) -> Tensor:
        return self.cosines(clips, prompts)[..., 0].mean(1)

    def visual_quality(self, clips: Tensor, prompts: list[str]) -> Tensor:
        cosine = self.cosines(clips, prompts)
        logits = self.model.logit_scale.exp() * (cosine[..., 1:2] - cosine[..., 2:])
        return logits.sigmoid().mean((1, 2))                    # the softmax of each pair

    def motion_quality(self, clips: Tensor, prompts: list[str]) -> Tensor:
        features = self.clip_features(clips)
        return (features[:, 1:] * features[:, :-1]).sum(-1).mean(1)


OF_CLIP = {"ta": "text_alignment", "vq": "visual_quality", "mq": "motion_quality"}


def parse_rewards(text: str) -> dict[str, float]:
    """'ta=1,my_rewards:blue=0.5' -> {"ta": 1.0, "my_rewards:blue": 0.5}. Raises UserError."""
    try:
        parts = [part.rsplit("=", 1) for part in text.split(",")]
        weights = {name.strip(): float(weight) for name, weight in parts}
    except ValueError:
        weights = {}
    known = all(name in OF_CLIP or ":" in name for name in weights)
    positive = all(0 < weight < math.inf for weight in weights.values())
    if not (weights and known and positive and len(weights) == len(parts)):
        raise UserError(f"reward {text!r}: expected NAME=WEIGHT,... with different NAMEs, each ta, "
                        "vq, mq or module:function, and WEIGHTs above 0")
    return weights


def load_function(name: str) -> Callable:
    """fn(clips, prompts) -> [N] from module:function, on the path or in the current folder."""
    module, _, function = name.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")                      # the current folder
    try:
        return getattr(importlib.import_module(module), function)
    except (Exception, SystemExit) as error:
        if getattr(error, "name", "") not in (module, function):
            traceback.print_exc()                   # the fault is in the module's own code
        hint = "; rename your file, as reward.py is this project's" if module == "reward" else ""
        raise UserError(f"--reward {name}: cannot import it ({error!r}){hint}") from error


def load_rewards(texts: list[str], device: str, clip: str = "") -> list["WeightedReward"]:
    """A reward for each text of weights (parse_rewards); all share functions, and ta, vq, mq are
    of the open_clip model `clip`, "" being the shipped one. Raises UserError."""
    weights = [parse_rewards(text) for text in texts]
    names = list(dict.fromkeys(name for own in weights for name in own))
    model = ClipReward(clip or str(ASSETS / "clip"), device) if set(names) & set(OF_CLIP) else None
    functions = {name: getattr(model, OF_CLIP[name]) if name in OF_CLIP else load_function(name)
                 for name in names}
    return [WeightedReward(functions, own) for own in weights]


class WeightedReward:
    """Σ w_k z_k / Σ w_k, where z_k is reward k standardised by its scale (mean, deviation).

    functions: {name: fn(clips, prompts) -> [N]}; a call returns {"reward": [N]} and each function's
    [N] under its name. Raises UserError for a function that fails or returns anything else.
    """

    def __init__(self, functions: dict[str, Callable], weights: dict[str, float],
                 scales: dict[str, tuple[float, float]] | None = None):
        self.functions, self.weights, self.scales = functions, weights, scales

    def __call__(self, clips: Tensor, prompts: list[str]) -> dict[str, Tensor]:
        scores = {name: self.score(name, clips, prompts) for name in self.functions}
        z = {name: (scores[name] - mean) / std for name, (mean, std) in self.scales.items()}
        total = sum(weight * z[name] for name, weight in self.weights.items())
        return {"reward": total / sum(self.weights.values())} | scores

    def measure_scales(self, clips: Tensor, prompts: list[str]) -> dict[str, tuple[float, float]]:
        """Mean and deviation of each function on reference clips."""
        scales = {}
        for name in self.functions:
            value = self.score(name, clips, prompts)
            value = value[value.isfinite()]
            if len(value) < 2 or not value.std() > 1e-5 * value.abs().max():
                raise UserError(f"--reward {name}: is the same number for all of the base's clips, "
                                "or not finite; it must tell clips apart")
            scales[name] = value.mean().item(), value.std().item()
        return scales

    @torch.no_grad()
    def score(self, name: str, clips: Tensor, prompts: list[str]) -> Tensor:
        """[N] of one function; one that is not ours gets copies, as it may write into them."""
        if name not in OF_CLIP:
            clips, prompts = clips.clone(), list(prompts)
        try:
            value = self.functions[name](clips, prompts)
        except (UserError, MemoryError, torch.OutOfMemoryError):
            raise
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            raise UserError(f"--reward {name}: failed ({error!r}); see the traceback above"
                            ) from error
        returned = type(value).__name__
        try:
            value = torch.as_tensor(value).detach().float().to(clips.device)
        except Exception:
            raise UserError(f"--reward {name}: returned {returned}; expected a tensor of "
                            f"{len(clips)} numbers, one for each clip") from None
        if value.shape != (len(clips),):
            raise UserError(f"--reward {name}: returned {returned} of shape {tuple(value.shape)} "
                            f"for {len(clips)} clips; expected one number for each")
        return value
