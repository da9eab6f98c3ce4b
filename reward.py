"""The world, the judge and the rewards of the AR-CoPO miniature; options, files and reports.

World    short 32x32 clips of one coloured shape in motion, with prompts.
Judge    procedural: never trained, never a reward. In VBench's role: detects hacking.
Rewards  text alignment (TA), visual (VQ) and motion quality (MQ) from any open_clip model, others
         by name, or one's own function.

Clips are float tensors [N, FRAMES, 3, SIZE, SIZE] in [0, 1]; prompts are strings such as "a red
circle moving right". Loaders take the generator, or its class, as an argument.
"""

import argparse
import copy
import csv
import functools
import hashlib
import importlib
import io
import json
import logging
import math
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import time
import traceback
import weakref
import zipfile
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import asdict, field, fields
from pathlib import Path

import imageio.v3 as iio
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor
from torch.distributed import is_torchelastic_launched
from tqdm import tqdm

# On CUDA: convolutions in true fp32 (the error of TF32 would reach the clip range of 1e-4), and
# with deterministic gradients, so that the same seed gives the same numbers.
torch.backends.cudnn.conv.fp32_precision = "ieee"
torch.backends.cudnn.deterministic = True

ASSETS = Path(__file__).resolve().parent / "assets"
RANK = int(os.environ["RANK"]) if is_torchelastic_launched() else 0     # only rank 0 writes
progress = functools.partial(tqdm, disable=RANK > 0)


# ------------------------------------------------------------------ options

class UserError(Exception):
    """Bad input: one line that says what is wrong and what to do. Ends a command, exit code 2."""


def one_line(error: BaseException) -> str:
    text = str(error).encode(errors="backslashreplace").decode()
    return " ".join(text.split())[:600] or type(error).__name__


@contextmanager
def user_error(what: str):
    """Inside, what a foreign file or value can raise becomes a UserError: `what` (the error)."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, OSError, RuntimeError, TypeError,
            ValueError, re.error) as error:     # RecursionError is a RuntimeError
        raise UserError(f"{what} ({one_line(error)})") from error


class Parser(argparse.ArgumentParser):
    """argparse, with every error a UserError."""

    def __init__(self, description: str):
        wide = lambda prog: argparse.HelpFormatter(prog, width=120, max_help_position=28)
        super().__init__(description=description, allow_abbrev=False, formatter_class=wide)

    def error(self, message: str):
        raise UserError(f"{message}; --help lists the settings")

    def parse_args(self, *arguments):
        args = super().parse_args(*arguments)
        if any(value == [] != self.get_default(name) for name, value in vars(args).items()):
            self.error("-- is not a value")         # argparse makes [] of it
        return args


def nonempty(value: str) -> str:
    """The type of an argument that must not be empty."""
    if not value or "\0" in value:
        raise argparse.ArgumentTypeError("must not be empty or contain a null byte")
    return value


def option(default, text: str, valid: str = "", paper: str = ""):
    """A setting, as the field of a dataclass. valid: an interval such as (0, 1], the allowed
    words, as "a | b", or "regex"; paper: the paper's value."""
    return field(default=default, metadata={"text": text, "valid": valid, "paper": paper})


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def check_options(settings) -> None:
    """Hold a dataclass of options against their types and valid values. Raises UserError."""
    for f in fields(settings):
        value, valid = getattr(settings, f.name), f.metadata["valid"]
        if not isinstance(value, (int, float) if f.type is float else f.type):
            raise UserError(f"{flag(f.name)} {value!r}: must be of type {f.type.__name__}")
        if valid[:1] in ("[", "("):
            low, high = map(float, valid[1:-1].split(","))
            ends = [end for end, closed in ((low, "[" in valid), (high, "]" in valid)) if closed]
            if not (low < value < high or value in (*ends, f.default)):
                raise UserError(f"{flag(f.name)} {value}: must be in {valid}")
        elif valid == "regex":
            with user_error(f"{flag(f.name)} {value}: not a regular expression"):
                re.compile(value)
        elif valid and value not in (f.default, *valid.split(" | ")):
            raise UserError(f"{flag(f.name)} {value}: must be one of {valid}")


STREAMING = "sample out adapter base timesteps seed device precision"   # all that --sample uses
UNUSED = {"": "adapter", "on-policy": "adapter buffer buffer_groups buffer_lr buffer_reward sweep",
          "semi": "adapter lr sweep", "off-policy": "adapter lr clip_range sweep"}   # by method


def check_unused(settings, names, mode: str) -> None:
    """Raises UserError unless the settings of these names, which have no effect in the mode, are at
    their defaults."""
    for f in fields(settings):
        if f.name in names and getattr(settings, f.name) != f.default:
            raise UserError(f"{flag(f.name)} {getattr(settings, f.name)}: has no effect with "
                            f"{mode}; leave it out")


def check_settings(settings) -> None:
    """Values, settings without effect, settings that contradict each other. Raises UserError."""
    check_options(settings)
    names = {f.name for f in fields(settings)}
    if settings.resume:
        check_unused(settings, names - {"resume"}, "--resume: settings are from the run")
    elif settings.sample:
        check_unused(settings, names - {*STREAMING.split()}, "--sample")
    else:
        method = settings.method
        mode = f"--method {method}" if method else "the recipe, only with --sample"
        check_unused(settings, UNUSED[method].split(), mode)
    if settings.buffer:
        check_unused(settings, ("buffer_groups",), "--buffer")
    if settings.anchors > settings.group:
        raise UserError(f"--anchors {settings.anchors}: must be at most --group "
                        f"({settings.group})")
    if 0 < settings.micro < settings.prompts:
        raise UserError(f"--micro {settings.micro}: must be at least --prompts "
                        f"({settings.prompts})")


def parse_options(cls: type, sections: dict[str, str], arguments: list | None, description: str):
    """Command-line arguments, as strings, numbers or paths, -> a dataclass of options.

    sections: {first option of a section of --help: its title}. Raises UserError.
    """
    parser = Parser(description)
    for f in fields(cls):
        if f.name in sections:
            section = parser.add_argument_group(sections[f.name])
        text = f.metadata["text"] + (f" [{f.default}]" if f.default not in ("", 0) else "")
        text += f" (paper: {f.metadata['paper']})" if f.metadata["paper"] else ""
        section.add_argument(flag(f.name), type=nonempty if f.type is str else f.type, help=text,
                             metavar={int: "N", float: "X", str: "TEXT"}[f.type],
                             default=argparse.SUPPRESS)
    return cls(**vars(parser.parse_args(arguments and [str(a) for a in arguments])))


def choose_device(name: str) -> str:
    if name in ("auto", "cuda"):
        local = os.environ.get("LOCAL_RANK")        # set by torchrun
        there = "cuda" + (f":{local}" if local else "")
        name = there if torch.cuda.is_available() else name.replace("auto", "cpu")
    try:
        if torch.device(name).type not in ("cpu", "cuda"):
            raise RuntimeError("neither cpu nor cuda")
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: cannot be used ({one_line(error)})") from error
    return name


def seeded(seed: int, *stream: str | int) -> torch.Generator:
    """A random generator for (seed, *stream), on the CPU: the same noise on every device.

    A hash of them fills the state of the Mersenne Twister: manual_seed would keep 32 bits.
    """
    generator = torch.Generator()
    state = generator.get_state()
    words = hashlib.shake_256(repr((seed, *stream)).encode()).digest(4 * 624)
    words = torch.frombuffer(bytearray(words), dtype=torch.uint32).long().view(torch.uint8)
    state[24 : 24 + len(words)] = words             # after the seed and two counters
    return generator.set_state(state)


def device_name(device: torch.device) -> str:
    return (torch.cuda.get_device_name(device) if device.type == "cuda" else
            f"{platform.machine()} CPU, {torch.get_num_threads()} threads")


def command(name: str, call: Callable[[], int]) -> int:
    """Run a command -> its exit code: 2, with one line on stderr, for a UserError, an OSError or
    too little memory."""
    for closed in [stream for stream in ("stdout", "stderr") if getattr(sys, stream) is None]:
        setattr(sys, closed, open(os.devnull, "w"))     # else tqdm fails, and files get its number
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")    # don't crash on terminals without Unicode
    try:
        return call()
    except SystemExit as stop:                      # --help
        return stop.code or 0
    except (UserError, OSError) as error:
        message, code = one_line(error), 2
    except KeyboardInterrupt as stop:               # its argument says how to go on
        message, code = f"interrupted{stop}", 130
    except (MemoryError, RuntimeError) as error:    # torch has a kind of its own only for GPUs
        if isinstance(error, RuntimeError) and "allocate" not in str(error):
            raise
        message, code = f"out of memory ({one_line(error)[:200]}); lower --micro or the counts", 2
    try:
        print(f"{name}: {message}", file=sys.stderr)
    except (OSError, ValueError):                   # stderr is closed
        pass
    return code


# ------------------------------------------------------------------ files

def check_folder(folder: Path, new: bool = False) -> None:
    """Raises UserError unless the folder is writable or can be created; new: also unless empty."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        problem = "cannot be written to" if there.is_dir() else "is a file"
        raise UserError(f"--out {folder}: {there} {problem}; name another folder")
    if new and there == folder and any(folder.iterdir()):
        raise UserError(f"--out {folder}: is not empty; name a new folder")


def write_whole(file: Path, data: bytes | str, previous: str = "") -> None:
    """Write all or nothing: whoever reads finds the old file or the new one. previous: the name
    under which the old one is kept. Of several processes rank 0 writes. Raises UserError."""
    if RANK > 0:
        return
    part = Path(f"{file}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as f:
            f.write(data.encode() if isinstance(data, str) else data)
            f.flush()
            os.fsync(f.fileno())
        if previous and file.exists():
            os.replace(file, file.with_name(previous))
        os.replace(part, file)
    except OSError as error:
        raise UserError(f"{file}: cannot be written ({one_line(error)})") from error
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def checksum(tensors: dict[str, Tensor], record: dict) -> str:
    digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode())
    for name, x in sorted(tensors.items()):
        digest.update(f"{name} {x.dtype} {list(x.shape)}".encode())
        digest.update(x.contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def write_weights(file: Path, tensors: dict[str, Tensor], record: dict, previous: str = "") -> None:
    """A safetensors file with a record (anything JSON holds) and a checksum of both. One key of
    metadata: safetensors orders several at random."""
    tensors = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
    about = {"record": record, "checksum": checksum(tensors, record)}
    write_whole(file, save(tensors, {"arcopo": json.dumps(about)}), previous)


def read_weights(file: str | Path, option: str) -> tuple[dict[str, Tensor], dict]:
    """Tensors and record of a file of write_weights (never pickle); the record has the checksum
    too. Raises UserError."""
    if not Path(file).is_file():
        raise UserError(f"{option} {file}: no such file")
    try:
        with safe_open(str(file), "pt") as f:
            about = json.loads((f.metadata() or {})["arcopo"])
            tensors = {name: f.get_tensor(name) for name in f.keys()}
        if checksum(tensors, about["record"]) != about["checksum"]:
            raise ValueError("its checksum is wrong: it is damaged")
        return tensors, about["record"] | {"checksum": about["checksum"]}
    except KeyError as error:
        raise UserError(f"{option} {file}: not a file of this project") from error
    except Exception as error:      # safetensors raises its own kinds
        raise UserError(f"{option} {file}: not a whole safetensors file "
                        f"({one_line(error)})") from error


def check_tensors(tensors: dict[str, Tensor], expected: dict[str, tuple], rewards=()) -> None:
    """expected: {name: (shape, dtype)}, no more and no less; all numbers finite, but for those of a
    buffer's rewards. Raises ValueError."""
    for name in sorted(set(tensors) | set(expected)):
        found = (tuple(tensors[name].shape), tensors[name].dtype) if name in tensors else "nothing"
        wanted = expected.get(name, "nothing")
        if found != wanted:
            raise ValueError(f"{name}: {found} in place of {wanted}")
        if name.partition(".")[2] not in rewards and not tensors[name].isfinite().all():
            raise ValueError(f"{name}: holds numbers that are not finite")


def fingerprint(module: torch.nn.Module) -> str:
    """Hash of the weights."""
    return checksum({name: x.cpu() for name, x in module.state_dict().items()}, {})[:16]


def append_row(file: Path, row: dict) -> None:
    """Append to a CSV file. Columns that it has not are added, empty in the rows before."""
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    before = list(csv.DictReader(io.StringIO(text, newline="")))
    write_rows(file, [*before, row])


def write_rows(file: Path, rows: list[dict]) -> None:
    """A whole CSV file, with all columns that a row has."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, dict.fromkeys(column for row in rows for column in row))
    writer.writeheader()
    writer.writerows(rows)
    write_whole(file, text.getvalue())


def version() -> dict[str, str]:
    """Hash of the two files of the method, and the commit if there is one."""
    code = b"".join((ASSETS.parent / name).read_bytes() for name in ("arcopo.py", "reward.py"))
    try:
        git = subprocess.run(["git", "-C", str(ASSETS.parent), "rev-parse", "HEAD"],
                             capture_output=True, text=True)
        commit = git.stdout.strip()
    except OSError:                                 # no git on this machine
        commit = ""
    return {"code": hashlib.sha256(code).hexdigest()[:16], "commit": commit}


def parse_times(text: str) -> tuple[float, ...]:
    """'1,0.5,0.25,0.1' -> sampler times, which fall from 1 toward 0. Raises UserError."""
    with user_error(f"--timesteps {text}: expected numbers that fall from 1 toward 0, such as "
                    "1,0.5,0.25,0.1"):
        times = tuple(float(t) for t in text.split(","))
        falls = all(t > s for t, s in zip(times, (*times[1:], 0)))
        if times[:1] != (1,) or not falls or len(times) > 100:
            raise ValueError("they do not fall, or are more than 100")
    return times


def read_model(cls: type, file: str | Path, **more):
    """cls(**arguments in the file's record, **more) with the file's weights. Raises UserError."""
    tensors, record = read_weights(file, "--base")
    with user_error(f"--base {file}: not a generator"):
        about = record["generator"]
        shape = [about[name] for name in ("width", "layers", "heads")]
        if (not all(type(n) is int and 0 < n <= 4096 for n in shape) or shape[0] % shape[2]
                or about.get("flow") not in (None, True, False)):
            raise ValueError(f"its shape is {about}")
        with torch.device("meta"):                  # no memory before the shapes are right
            model = cls(**about, **more)
        check_tensors(tensors, {name: (tuple(x.shape), torch.bfloat16)
                                for name, x in model.state_dict().items()})
        model.load_state_dict({name: x.float() for name, x in tensors.items()}, assign=True)
        model.timesteps = parse_times(",".join(map(str, model.timesteps)))
    model.fingerprint = record["checksum"][:16]
    return model


PEFT = "base_model.model."                              # before the layer's name in peft's files


def write_adapter(folder: Path, weights: dict[str, tuple[Tensor, Tensor]], rank: int, alpha: float,
                  record: dict) -> None:
    """{layer: (A, B)} in peft's format; the record is in the header of the weights."""
    tensors = {f"{PEFT}{name}.lora_{x}.weight": z for name, pair in weights.items()
               for x, z in zip("AB", pair)}
    write_weights(folder / "adapter_model.safetensors", tensors,
                  record | {"rank": rank, "alpha": alpha})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "bias": "none",
              "target_modules": "|".join(map(re.escape, weights)), "lora_dropout": 0.0}
    write_whole(folder / "adapter_config.json", json.dumps(config, indent=1) + "\n")


def read_adapter(folder: Path, model) -> tuple[dict[str, tuple[Tensor, Tensor]], float]:
    """-> {layer: (A, B)}, and alpha. Raises UserError."""
    tensors, record = read_weights(folder / "adapter_model.safetensors", "--adapter")
    weights, expected = {}, {}
    with user_error(f"--adapter {folder}: not an adapter of this base"):
        for name in dict.fromkeys(n[len(PEFT) : -len(".lora_A.weight")] for n in tensors):
            layer = model.get_submodule(name)
            out, into = layer.out_features, layer.in_features
            keys = [f"{PEFT}{name}.lora_{x}.weight" for x in "AB"]
            for key, shape in zip(keys, ((record["rank"], into), (out, record["rank"]))):
                expected[key] = shape, torch.float32
            weights[name] = tuple(tensors[key].to(layer.weight.device) for key in keys)
        check_tensors(tensors, expected)
        if not (weights and record["rank"] > 0 and 0 < record["alpha"] < math.inf):
            raise ValueError(f"rank {record['rank']}, alpha {record['alpha']}")
        if record.get("base", "") != getattr(model, "fingerprint", ""):
            raise ValueError("it was trained on other weights; name them with --base")
        if "timesteps" in record and record["timesteps"] != list(model.timesteps):
            raise ValueError("it was trained at other times; name them with --timesteps "
                             + ",".join(f"{t:g}" for t in record["timesteps"]))
        return weights, float(record["alpha"])


HALVES = "prefix", "states", "candidates"               # a buffer's tensors in half precision


def save_buffer(buffer: list[dict], file: Path, about: dict) -> None:
    """about: what the groups depend on."""
    tensors = {f"{i}.{name}": x for i, group in enumerate(buffer)
               for name, x in group.items() if name != "prompt"}
    rewards = [name for name in buffer[0] if name not in ("prompt", *HALVES)]
    prompts = [group["prompt"] for group in buffer]
    write_weights(file, tensors, about | {"rewards": rewards, "prompts": prompts})


def load_buffer(file: str | Path, model, about: dict) -> list[dict]:
    """Raises UserError: missing, broken, or made by another base or with other settings."""
    tensors, found = read_weights(file, "--buffer")
    for name in about:
        if found.get(name) != about[name]:
            raise UserError(f"--buffer {file}: made with {name} {found.get(name)}, not "
                            f"{about[name]}; leave out --buffer to collect one")
    buffer, expected = [], {}
    with user_error(f"--buffer {file}: not a buffer"):
        for i, prompt in enumerate(found["prompts"]):
            pivot = min(len(tensors[f"{i}.prefix"]), model.chunks - 1)
            half = (len(model.timesteps), about["group"], *model.chunk_shape), torch.half
            group = {"prefix": ((pivot, *model.chunk_shape), torch.half), "states": half,
                     "candidates": half, "reward": ((about["group"],), torch.float32)}
            group |= {name: group["reward"] for name in found["rewards"]}
            buffer.append({"prompt": prompt} | {name: tensors[f"{i}.{name}"] for name in group})
            expected |= {f"{i}.{name}": kind for name, kind in group.items()}
        check_tensors(tensors, expected, found["rewards"])
        if not buffer:
            raise ValueError("it has no groups")
        model.begin(found["prompts"])
    return buffer


def save_checkpoint(file: Path, parameters: list[Tensor], optimizer: torch.optim.Optimizer,
                    state: dict) -> None:
    """The state of a training (anything JSON holds); the one before it is kept as FILE.previous."""
    tensors = {f"parameter.{i}": p for i, p in enumerate(parameters)}
    for i, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"{name}.{i}": x for name, x in moments.items()}
    write_weights(file, tensors, {"state": state}, f"{file.name}.previous")


def load_checkpoint(file: Path, parameters: list[Tensor],
                    optimizer: torch.optim.Optimizer) -> dict | None:
    """Restore parameters and optimizer -> the state; None if there is no checkpoint. A damaged one
    is passed over for the one before it. Raises UserError if both are damaged."""
    there = [path for path in (file, Path(f"{file}.previous")) if path.exists()]
    expected = {f"parameter.{i}": (tuple(p.shape), p.dtype) for i, p in enumerate(parameters)}
    problems = []
    for path in there:
        try:
            tensors, record = read_weights(path, "--resume")
            moments = {f"{name}.{i}": (tuple(p.shape) * (name != "step"), p.dtype)
                       for i, p in enumerate(parameters) if f"step.{i}" in tensors
                       for name in ("step", "exp_avg", "exp_avg_sq")}
            check_tensors(tensors, expected | moments)
        except (UserError, ValueError) as error:
            problems.append(one_line(error))
            continue
        if problems:
            print(f"{file}: {problems[0]}; going back", file=sys.stderr)
        moments, device = {}, parameters[0].device
        for i, p in enumerate(parameters):
            p.data.copy_(tensors.pop(f"parameter.{i}"))
        for key, x in tensors.items():
            name, i = key.split(".")
            moments.setdefault(int(i), {})[name] = x if name == "step" else x.to(device)
        optimizer.load_state_dict(optimizer.state_dict() | {"state": moments})
        return record["state"]
    if there:
        raise UserError(f"--resume: {' and '.join(map(str, there))}: damaged ({problems[0]}); "
                        "delete to train anew")
    return None


class TrainingLog:
    """NAME.csv, NAME-curve.csv and NAME.checkpoint.safetensors of a training, in a run folder. It
    starts from the checkpoint if there is one: parameters and optimizer are restored."""

    def __init__(self, folder: Path, name: str, parameters: list[Tensor],
                 optimizer: torch.optim.Optimizer):
        self.folder, self.name, self.training = folder, name, (parameters, optimizer)
        self.file = folder / f"{name}.checkpoint.safetensors"
        self.state = load_checkpoint(self.file, *self.training) or {"rows": [], "curve": []}
        self.rows, self.curve = self.state["rows"], self.state["curve"]

    def steps(self, last: int) -> tqdm:
        """What is left of steps 0 to `last`. The curve has a point at step 0, the rows do not."""
        first = len(self.rows) + bool(self.curve)
        self.bar = progress(range(first, last + 1), self.name, unit="it", initial=first,
                            total=last + 1)
        return self.bar

    def add_row(self, step: int, row: dict) -> None:
        self.rows.append({"step": step} | row)
        write_rows(self.folder / f"{self.name}.csv", self.rows)
        recent = [row["reward"] for row in self.rows[-10:]]
        self.bar.set_postfix({"reward": f"{sum(recent) / len(recent):+.2f}",
                              "clipped": f"{row['clip_fraction']:.0%}",
                              "judged reward": f"{self.curve[-1]['reward']:+.2f}"})

    def add_point(self, step: int, scores: dict[str, Tensor]) -> None:
        self.curve.append({"step": step} | {key: x.mean().item() for key, x in scores.items()})
        write_rows(self.folder / f"{self.name}-curve.csv", self.curve)

    def save(self) -> None:
        save_checkpoint(self.file, *self.training, self.state)


def open_run(settings):
    """-> the settings, those of the run if settings.resume, and the run folder: checked, not made.
    Raises UserError."""
    folder = Path(settings.resume or settings.out or time.strftime("runs/%Y%m%d-%H%M%S"))
    if not settings.resume:
        check_folder(folder, new=RANK == 0)
        return settings, folder
    try:
        saved = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
        if saved.pop("checksum") != checksum({}, saved):
            raise ValueError("settings.json was changed")
        if set(saved["settings"]) != {f.name for f in fields(settings)}:
            raise ValueError("it has other settings")
        settings, code = type(settings)(**saved["settings"]), saved["run"]["code"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"--resume {folder}: not the folder of a run of this program and version "
                        f"({one_line(error)})") from error
    if (folder / "models.gif").exists():
        raise UserError(f"--resume {folder}: the run is complete")
    if code != version()["code"]:
        raise UserError(f"--resume {folder}: arcopo.py or reward.py changed since commit "
                        f"{saved['run']['commit'] or '(none)'}; go back to it or start a new run")
    return settings, folder


@contextmanager
def run_folder(folder: Path, settings, about: dict):
    """Write to the folder as the only process; Ctrl-C says how to go on. settings.json has the
    settings, `about` (with base, prompts, reward_scales), code, machine and command. Raises
    UserError, also if base, prompts or rewards are others than when the run began."""
    import fcntl

    if RANK > 0:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "settings.json"
    with open(folder / ".lock", "w") as lock:       # until it is closed or the process ends
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"{folder}: another process writes to it; wait or stop it") from error
        if not file.exists():
            called = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
            about = version() | about | {"torch": torch.__version__, "command": called,
                                         "date": time.strftime("%Y-%m-%d %H:%M:%S %z")}
            saved = {"settings": asdict(settings), "run": about}
            write_whole(file, json.dumps(saved | {"checksum": checksum({}, saved)}, indent=1))
        then = json.loads(file.read_text(encoding="utf-8"))["run"]
        for name, setting in (("base", "--base"), ("prompts", "--prompts-file")):
            if then[name] != about[name]:
                raise UserError(f"--resume {folder}: {setting} has changed since the run began")
        for name, (mean, std) in then["reward_scales"].items():
            now = about["reward_scales"][name]      # machines round differently
            if max(abs(now[0] - mean), abs(now[1] - std)) > 0.01 * std + 1e-6:
                raise UserError(f"--resume {folder}: the reward {name} has changed since the run "
                                "began")
        try:
            yield
        except KeyboardInterrupt as error:
            raise KeyboardInterrupt(f"; continue with --resume {folder}") from error
        except (UserError, OSError) as error:       # as of a full disk
            raise UserError(f"{one_line(error)}; continue with --resume {folder}") from error


@contextmanager
def deferred_interrupt():
    """Inside, the first Ctrl-C only sets what the yielded function returns; the second stops."""
    pressed = []

    def handler(number, frame):
        if pressed:
            raise KeyboardInterrupt
        pressed.append(True)
        print(" stops after this iteration", file=sys.stderr)
    try:
        before = signal.signal(signal.SIGINT, handler)
    except ValueError:                              # not in the main thread: no handlers there
        yield lambda: False
        return
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)


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
    write_whole(file, iio.imwrite("<bytes>", image, extension=".gif", duration=150, loop=0))


def check_gif(name: str) -> Path:
    """The file of --sample. Raises UserError."""
    file = Path(name)
    if file.suffix != ".gif" or file.is_dir():
        raise UserError(f"--out {file}: expected the name of a .gif file")
    check_folder(file.parent)
    return file


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
    words = {word for prompt in known for word in prompt.split()}
    for prompt in prompts:
        if prompt not in known:
            unknown = [word for word in prompt.split() if word not in words]
            raise UserError(f"prompt {prompt!r}: "
                            + (f"unknown word {unknown[0]!r}; " if unknown else
                               "not of the world; ")
                            + "expected 'a COLOUR SHAPE MOTION', COLOUR one of "
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


def make_clips(prompts: list[str], generator: torch.Generator,
               quality: str | None = None) -> Tensor:
    """Draw a clip of the world for each prompt: [N, FRAMES, 3, SIZE, SIZE] in [0, 1].

    Size, speed and start are random. Clips are of mixed quality chunk by chunk, like scraped video:
    each chunk has its own speed and drift, and is sharp, blurry, noisy, dim or flickering. With
    `quality` given, the whole clip has that quality and moves steadily: "sharp" is the ideal.
    """
    triple, n = attributes(prompts), len(prompts)
    uniform = lambda low, high, *size: low + (high - low) * torch.rand(*size, generator=generator)
    radius, speed = uniform(4.0, 5.5, n), uniform(0.4, 1.2, n)
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


# ------------------------------------------------------------------ reward

WORDINGS = ("sharp", "blurry", "noisy", "dim")
MODELS = ASSETS.parent / "models"           # downloaded weights of rewards; not in the repository


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
    local weights, or a folder (or a file in it) with open_clip_config.json and
    open_clip_model.safetensors. Weights are safetensors, or a .pt file that torch loads with
    weights_only, which runs no code of the file. whole: frames that are not square are padded with
    black, not cropped. Raises UserError.
    """

    batch = 256         # frames encoded at a time

    def __init__(self, name: str = str(ASSETS / "clip"), device: str | torch.device = "cpu",
                 whole: bool = False):
        import open_clip  # slow to import: only where needed

        architecture, _, weights = ("", "", name) if Path(name).exists() else name.rpartition(":")
        tags = open_clip.list_pretrained_tags_by_model(architecture)
        if architecture and architecture not in open_clip.list_models():
            raise UserError(f"--clip {name}: open_clip has no model {architecture!r}; "
                            "open_clip.list_models() lists them")
        if architecture and weights not in tags and not Path(weights).is_file():
            raise UserError(f"--clip {name}: {weights!r} is neither a file nor one of the tags of "
                            f"{architecture}: {', '.join(tags)}")
        file = Path(weights)
        if not architecture:                                    # a folder, or a file in it
            folder = file.parent if file.is_file() else file
            file = folder / "open_clip_model.safetensors"
            architecture, weights = f"local-dir:{folder}", None
            if (not (folder / "open_clip_config.json").is_file()
                    or Path(name).is_file() and Path(name) != file):
                raise UserError(f"--clip {name}: expected ARCH:TAG (ViT-B-32:laion2b_s34b_b79k), "
                                "ARCH:FILE, or a folder with open_clip_config.json and "
                                "open_clip_model.safetensors")
        try:
            if weights in tags:
                logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
                config = open_clip.get_pretrained_cfg(architecture, weights)
                file = Path(open_clip.download_pretrained(config))
            if file.suffix not in (".safetensors", ".pt") or not file.is_file():
                raise FileNotFoundError(f"weights must be a .safetensors or .pt file; found {file}")
            if file.suffix == ".safetensors":
                with safe_open(str(file), "pt") as f:
                    ours = "arcopo" in (f.metadata() or {})
                if ours:                            # for the checksum, which covers the config too
                    found = read_weights(file, "--clip")[1].get("config")
                    config = file.parent / "open_clip_config.json"
                    if weights is None and found != json.loads(config.read_text("utf-8")):
                        raise ValueError("open_clip_config.json is not that of the weights")
            else:
                check_zip(file)
            self.model = open_clip.create_model(architecture, pretrained=weights, device=device,
                                                require_pretrained=True).eval()
            self.tokenizer = open_clip.get_tokenizer(architecture)
        except Exception as error:      # open_clip raises a dozen kinds: no network, wrong shape
            raise UserError(f"--clip {name}: open_clip cannot load it "
                            f"({one_line(error)})") from error
        self.model.requires_grad_(False)
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


def check_zip(file: Path) -> None:
    """Raises ValueError if a part of a .pt or .pth file is damaged: torch.load does not check."""
    if zipfile.is_zipfile(file) and (part := zipfile.ZipFile(file).testzip()):
        raise ValueError(f"{part} is damaged")


def downloaded(file: str, source: str) -> Path:
    """A file in MODELS. Raises UserError that says where to get it."""
    if not (MODELS / file).is_file():
        raise UserError(f"--reward: {MODELS / file} is missing; it is {source}")
    return MODELS / file


def hps(device: str, architecture: str = "ViT-H-14") -> Callable:
    """HPSv2.1 (Wu et al. 2023): cosine of frames and prompt, a CLIP tuned to human preference, of
    whole frames as in its own code."""
    file = downloaded("HPS_v2.1_compressed.pt",
                      "the file of this name in https://huggingface.co/xswu/HPSv2")
    return ClipReward(f"{architecture}:{file}", device, whole=True).text_alignment


class Aesthetic:
    """LAION's aesthetic predictor (Schuhmann 2022): linear layers on unit CLIP features, about 1
    to 10. (clips, prompts) -> mean over frames [N]."""

    def __init__(self, device: str, architecture: str = "ViT-L-14-quickgelu"):
        file = downloaded("vit_large_patch14_clip_224.openai.safetensors",
                          "open_clip_model.safetensors in "
                          "https://huggingface.co/timm/vit_large_patch14_clip_224.openai")
        head = downloaded("sac+logos+ava1-l14-linearMSE.pth", "the file of this name in "
                          "https://github.com/christophschuhmann/improved-aesthetic-predictor")
        self.clip = ClipReward(f"{architecture}:{file}", device)
        self.model = self.clip.model
        sizes = (768, 1024, 128, 64, 16, 1)     # dropout, without effect here, has numbers too
        layers = {f"layers.{i}": n for i, n in zip((0, 2, 4, 6, 7), zip(sizes, sizes[1:]))}
        try:
            check_zip(head)
            weights = torch.load(head, device, weights_only=True)
            expected = {f"{name}.{part}": (shape, torch.float32)
                        for name, (fan_in, fan_out) in layers.items()
                        for part, shape in (("weight", (fan_out, fan_in)), ("bias", (fan_out,)))}
            check_tensors(weights, expected)
        except Exception as error:
            raise UserError(f"--reward: {head} is not LAION's head ({one_line(error)})") from error
        self.layers = [(weights[f"{n}.weight"], weights[f"{n}.bias"]) for n in layers]

    def __call__(self, clips: Tensor, prompts: list[str]) -> Tensor:
        x = self.clip.clip_features(clips)
        for weight, bias in self.layers:
            x = F.linear(x, weight, bias)
        return x[..., 0].mean(1)


clip_reward = functools.cache(ClipReward)       # one model for the rewards that share it

REWARDS: dict[str, Callable] = {
    "ta": lambda device, clip: clip_reward(clip, device).text_alignment,
    "vq": lambda device, clip: clip_reward(clip, device).visual_quality,
    "mq": lambda device, clip: clip_reward(clip, device).motion_quality,
    "hps": lambda device, clip: hps(device),
    "aesthetic": lambda device, clip: Aesthetic(device),
}
"""name -> factory(device, --clip) -> fn(clips [N, F, 3, H, W] in [0, 1], prompts) -> [N]."""


def parse_rewards(text: str, name: str) -> dict[str, float]:
    """'ta=1,my_rewards:blue=0.5', the setting `name` -> {"ta": 1.0, "my_rewards:blue": 0.5}."""
    try:
        parts = [part.rsplit("=", 1) for part in text.split(",")]
        weights = {reward.strip(): float(weight) for reward, weight in parts}
    except ValueError:
        weights = {}
    if (not any(weights.values()) or len(weights) < len(parts)
            or not all(w == 0 or 1e-6 <= w <= 1e6 for w in weights.values())
            or not all(reward in REWARDS or ":" in reward for reward in weights)):
        raise UserError(f"--{name} {text}: expected NAME=WEIGHT,... with different NAMEs of "
                        f"{', '.join(REWARDS)} or module:function, each WEIGHT 0 or in [1e-6, 1e6],"
                        " one above 0")
    return weights


def load_reward(name: str, device: str, clip: str) -> Callable:
    """A reward of the registry, or fn(clips, prompts) -> [N] of a module on the path or in the
    current folder. Raises UserError."""
    if name in REWARDS:
        return REWARDS[name](device, clip)
    module, _, function = name.partition(":")
    sys.path.insert(0, "")                      # the current folder
    try:
        return getattr(importlib.import_module(module), function)
    except (Exception, SystemExit) as error:
        raise UserError(f"--reward {name}: cannot import it "
                        f"({type(error).__name__}: {one_line(error)})") from error
    finally:
        sys.path.remove("")


class WeightedReward:
    """Σ w_k z_k / Σ w_k, where z_k is reward k standardised on reference clips.

    functions: {name: fn(clips, prompts) -> [N]}; a call returns {"reward": [N]} and each function's
    [N] under its name. Raises UserError for a function that returns anything else.
    """

    def __init__(self, functions: dict[str, Callable], weights: dict[str, float], clips: Tensor,
                 prompts: list[str]):
        self.functions, self.weights = functions, weights
        self.scales = {}
        for name, value in self.components(clips, prompts).items():
            value = value[value.isfinite()]
            if len(value) < 2:
                raise UserError(f"--reward {name}: is not finite on the base's clips")
            self.scales[name] = value.mean().item(), value.std().item()

    @torch.no_grad()
    def components(self, clips: Tensor, prompts: list[str]) -> dict[str, Tensor]:
        scores = {}
        for name, function in self.functions.items():
            try:
                value = torch.as_tensor(function(clips, prompts)).detach().float()
            except UserError:
                raise
            except (Exception, SystemExit) as error:
                place = traceback.extract_tb(error.__traceback__)[:2][-1]   # in the function
                raise UserError(f"--reward {name}: failed ({type(error).__name__}: "
                                f"{one_line(error)}; line {place.lineno} of {place.filename})"
                                ) from error
            if value.shape != (len(clips),):
                raise UserError(f"--reward {name}: returned shape {tuple(value.shape)} for "
                                f"{len(clips)} clips; expected one number each")
            scores[name] = value.to(clips.device)
        return scores

    def __call__(self, clips: Tensor, prompts: list[str]) -> dict[str, Tensor]:
        scores = self.components(clips, prompts)
        z = {name: (scores[name] - mean) / max(std, 1e-6)
             for name, (mean, std) in self.scales.items()}
        total = sum(weight * z[name] for name, weight in self.weights.items())
        return {"reward": total / sum(self.weights.values())} | scores

    def reweighted(self, weights: dict[str, float]) -> "WeightedReward":
        """The same functions on the same scales, otherwise weighted."""
        other = copy.copy(self)
        other.weights = weights
        return other

    def hashes(self) -> dict[str, str]:
        """Of the model behind each function that weighs, "" if it has none."""
        models = {name: getattr(fn, "__self__", fn) for name, fn in self.functions.items()}
        return {name: fingerprint(models[name].model) if hasattr(models[name], "model") else ""
                for name in self.weights}


def read_prompts(file: str, least: int) -> list[str]:
    """Training prompts, one per line; empty lines are skipped; "": those of the world. Raises
    UserError."""
    with user_error(f"--prompts-file {file}: cannot be read"):
        lines = Path(file).read_text("utf-8-sig").splitlines() if file else TRAIN_PROMPTS
    prompts = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if len(prompts) < max(1, least):
        raise UserError(f"--prompts-file {file}: has {len(prompts)} different prompts; --prompts "
                        f"{least} needs as many" if file else f"--prompts {least}: the world has "
                        f"{len(prompts)} training prompts")
    attributes(prompts)
    held_out = [prompt for prompt in prompts if prompt in HELD_OUT_PROMPTS]
    if held_out:
        raise UserError(f"--prompts-file {file}: {held_out[0]!r} is held out, for the judging; "
                        "remove it")
    return prompts


def parse_sweep(text: str) -> list[float]:
    try:
        strengths = sorted({float(part) for part in text.split(",")})
    except ValueError:
        strengths = []
    if not strengths or not all(0 < s <= 10 and float(f"{s:g}") == s for s in strengths):
        raise UserError(f"--sweep {text}: expected strengths in (0, 10] of at most six digits, as "
                        "0.4,0.6,0.8,1")
    return strengths


# ------------------------------------------------------------------ evaluation

JUDGED = ("judge", "text", "visual", "motion_quality", "all_right", "area", "displacement",
          "spread")


def evaluate(clips: Tensor, prompts: list[str], reward: Callable) -> dict[str, Tensor]:
    """Rewards, judge and detectors of collapse, each [prompts]: means over the clips of a prompt,
    which must be adjacent.

    judge: mean of text, visual and motion_quality, in [0, 1]. spread: standard deviation of the
    mean positions of a prompt's clips, px; 0 if they are all the same.
    """
    scores = reward(clips, prompts) | judge(clips, prompts)
    per_prompt = len(prompts) // len(set(prompts))
    scores = {name: value.float().cpu().view(-1, per_prompt) for name, value in scores.items()}
    variance = scores.pop("x").var(1, correction=0) + scores.pop("y").var(1, correction=0)
    scores = {name: value.mean(1) for name, value in scores.items()}
    total = (scores["text"] + scores["visual"] + scores["motion_quality"]) / 3
    return scores | {"judge": total, "spread": variance.sqrt()}


def reward_metrics(scores: dict[str, Tensor], floor: float) -> dict[str, Tensor]:
    """scores {"reward", ...: [P, G]} -> their means over finite values; not_finite: rewards left
    out; deviation: of the reward in a group; flat_groups: share with a deviation below the floor"""
    scores = {name: x.where(x.isfinite(), math.nan) for name, x in scores.items()}
    reward = scores["reward"]
    deviation = (reward - reward.nanmean(1, keepdim=True)).square().nanmean(1).sqrt()
    flat = ~(deviation >= floor)                    # NaN, of a group without rewards, too
    return {name: x.nanmean() for name, x in scores.items()} | {
        "not_finite": reward.isnan().float().sum(), "deviation": deviation.nanmean(),
        "flat_groups": flat.float().mean()}


def report_not_finite(rows: list[dict], results: dict[str, dict[str, Tensor]],
                      columns: list[str]) -> int:
    """Exit code of a run: 1, with a line on stderr, if numbers were not finite."""
    skipped, left_out = (sum(row[name] for row in rows) for name in ("skipped", "not_finite"))
    finite = all(scores[c].isfinite().all() for scores in results.values() for c in columns)
    if skipped or left_out or not finite:
        print(f"arcopo: not finite: {skipped:g} updates were skipped, {left_out:g} rewards left "
              "out" + ("" if finite else ", and the table has NaN or infinity"), file=sys.stderr)
    return int(skipped > 0 or left_out > 0 or not finite)


def write_report(folder: Path, columns: list[str], chosen: str, clips: dict[str, Tensor],
                 results: dict[str, dict[str, Tensor]], judged_on: str, duration: str) -> None:
    """Write judged.csv, report.md (also printed) and models.gif.

    clips and results (what evaluate returns) of the base and the trained models, by name; clips
    are those of JUDGE_PROMPTS[judged_on], the same number of each."""
    rows, base, judged = [["model", *columns, "Δ reward", "Δ judge"]], results["base"], []
    for name, scores in results.items():
        means = {column: scores[column].mean().item() for column in columns}
        judged.append({"model": name} | means)
        change = [scores[c] - base[c] for c in ("reward", "judge")]
        rows.append([name + " *" * (name == chosen), *(f"{mean:.3f}" for mean in means.values()),
                     *(f"{d.mean():+.3f} ± {d.std() / len(d) ** 0.5:.3f}" for d in change)])
    shown = [name for name in results if name == chosen or not name.startswith("s = ")]
    prompts = JUDGE_PROMPTS[judged_on]
    samples = len(clips["base"]) // len(prompts)
    parts = [f"{samples} clips of each of {len(prompts)} {judged_on} prompts, the same noise "
             "for all models; Δ: change from the base ± standard error over prompts; area in px², "
             "displacement and spread in px.", markdown(rows)]
    if chosen:
        parts.append("\\* " + ("no s improves both reward and judge over the base: s = 0"
                               if chosen == "semi" else
                               "the largest s that improves both reward and judge over the base"))
    parts += ["NAME-curve.csv: the same columns along training, on fewer clips with other noise.",
              f"models.gif: {', '.join(shown)}; prompts by row:",
              "\n".join(f"- {left}; {right}" for left, right in zip(prompts[::6], prompts[3::6])),
              duration]
    report = "\n\n".join(parts) + "\n"
    write_rows(folder / "judged.csv", judged)
    write_whole(folder / "report.md", report)
    save_gif({name: clips[name][:: 3 * samples].unflatten(0, (4, 2)) for name in shown},
             folder / "models.gif")     # the last: --resume takes a run with it as complete
    if RANK == 0:
        print(f"\n{report}Run folder: {folder}")
