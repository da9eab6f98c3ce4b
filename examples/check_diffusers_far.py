"""diffusers' AnyFlow-FAR with tiny random weights, on the CPU: called by diffusers_far.py.

The sampler equals diffusers' own pipeline on the same noise, for chunks of equal and of unequal
length, and the properties of checks.py hold. It writes nothing.
"""

import warnings

import torch
import torch.nn.functional as F
from diffusers import (AnyFlowFARPipeline, AnyFlowFARTransformer3DModel, AutoencoderKLWan,
                       FlowMapEulerDiscreteScheduler)
from diffusers.models.transformers import transformer_anyflow_far
from torch import Tensor
from torch.nn.attention.flex_attention import create_mask

from arcopo import draw_noise, sample, seeded
from examples.checks import check
from examples.diffusers_far import AnyFlowFAR


def tiny(partition: tuple) -> AnyFlowFARPipeline:
    """diffusers' own pipeline with random weights; random embeddings in place of T5."""
    torch.manual_seed(0)
    net = AnyFlowFARTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, text_dim=16, freq_dim=64, ffn_dim=64,
        num_layers=2, rope_max_seq_len=64, chunk_partition=partition)
    vae = AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
                           temperal_downsample=[False, True, True])
    pipe = AnyFlowFARPipeline(None, None, net, vae, FlowMapEulerDiscreteScheduler(shift=5.0))

    def encode_prompt(prompt, prompt_embeds=None, **_) -> tuple:
        if prompt is None:
            return prompt_embeds, None
        return torch.stack([torch.randn(5, 16, generator=seeded(0, p)) for p in prompt]), None

    pipe.encode_prompt = encode_prompt
    pipe.set_progress_bar_config(disable=True)
    return pipe


def compare(model: AnyFlowFAR, prompts: list[str]) -> None:
    """diffusers' own pipeline on the same noise."""
    pipe, noise = model.outside[0], draw_noise(model, len(prompts), seeded(0))
    frames, size = 4 * sum(model.partition) - 3, 8 * model.chunk_shape[2]
    theirs = pipe(prompt_embeds=pipe.encode_prompt(prompts)[0], latents=model.frames(noise.initial),
                  num_inference_steps=len(model.timesteps), height=size, width=size,
                  num_frames=frames, output_type="pt").frames
    difference = (sample(model, prompts, noise) - theirs).abs().max().item()
    print(f"chunks of {model.partition} frames: differs from diffusers' own by {difference:.1e}")
    assert difference < 1e-5


def dense(q: Tensor, k: Tensor, v: Tensor, attn_mask=None, scale=None, **_) -> Tensor:
    """In place of flex_attention, which has no backward on a CPU."""
    if attn_mask is not None:
        attn_mask = create_mask(attn_mask.mask_mod, None, None, *attn_mask.seq_lengths, q.device)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, attn_mask, scale=scale)
    return y.nan_to_num().transpose(1, 2)       # padding attends to nothing


def main() -> None:
    warnings.filterwarnings("ignore")
    print("tiny random weights on the CPU: this takes one or two minutes", flush=True)
    prompts = ["a cat", "a dog", "a boat"]
    for partition in ((3, 3, 3, 3), (1, 3, 3, 2)):
        compare(AnyFlowFAR(tiny(partition), (8, 8)), prompts[:1])
    transformer_anyflow_far.dispatch_attention_fn = dense
    model = AnyFlowFAR(tiny((3, 3, 3)), (8, 8))
    compare(model, prompts[:1])
    model.decode = lambda latents: model.frames(latents).transpose(1, 2)[:, :, :3]
    check(model, prompts)
