"""Two published rewards: python arcopo.py --reward ta=1,examples.rewards:hps=1

A reward is a function of clips [N, F, 3, H, W] in [0, 1] and N prompts that returns N numbers. Each
of these needs weights in models/, which the error names.
"""

import functools
from pathlib import Path

import torch
from torch import Tensor, nn

from reward import ClipReward, UserError

MODELS = Path(__file__).resolve().parents[1] / "models"


def downloaded(file: str, source: str) -> Path:
    if not (MODELS / file).is_file():
        raise UserError(f"--reward: {MODELS / file} is missing; download {source}")
    return MODELS / file


@functools.cache
def hps_model(device: torch.device, architecture: str = "ViT-H-14") -> ClipReward:
    file = downloaded("HPS_v2.1_compressed.pt",
                      "the file of this name in https://huggingface.co/xswu/HPSv2")
    return ClipReward(f"{architecture}:{file}", device, whole=True)


def hps(clips: Tensor, prompts: list[str]) -> Tensor:
    """HPSv2.1 (Wu et al. 2023): cosine of frames and prompt, a CLIP tuned to human preference, of
    whole frames as in its own code."""
    return hps_model(clips.device).text_alignment(clips, prompts)


@functools.cache
def aesthetic_model(device: torch.device,
                    architecture: str = "ViT-L-14-quickgelu") -> tuple[ClipReward, nn.Module]:
    file = downloaded("vit_large_patch14_clip_224.openai.safetensors", "open_clip_model.safetensors"
                      " in https://huggingface.co/timm/vit_large_patch14_clip_224.openai")
    head = downloaded("sac+logos+ava1-l14-linearMSE.pth", "the file of this name in "
                      "https://github.com/christophschuhmann/improved-aesthetic-predictor")
    weights = torch.load(head, map_location=device, weights_only=True)
    skipped = nn.Identity()             # dropout: without effect here, but it has a number
    layers = nn.Sequential(nn.Linear(768, 1024), skipped, nn.Linear(1024, 128), skipped,
                           nn.Linear(128, 64), skipped, nn.Linear(64, 16), nn.Linear(16, 1))
    layers.load_state_dict({name.removeprefix("layers."): x for name, x in weights.items()})
    return ClipReward(f"{architecture}:{file}", device), layers.to(device).requires_grad_(False)


def aesthetic(clips: Tensor, prompts: list[str]) -> Tensor:
    """LAION's aesthetic predictor (Schuhmann 2022): linear layers on unit CLIP features, about 1
    to 10, mean over frames."""
    clip, layers = aesthetic_model(clips.device)
    return layers(clip.clip_features(clips))[..., 0].mean(1)
