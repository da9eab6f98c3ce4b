"""AnyFlow-FAR of diffusers behind the contract of arcopo.Generator:

    pip install diffusers && python examples/diffusers_far.py

runs check_diffusers_far.py: diffusers' own code (0.42.1) with tiny random weights, on the CPU,
against its own pipeline. No run with the real weights was made. With them:

    pipe = AnyFlowFARPipeline.from_pretrained("nvidia/AnyFlow-FAR-Wan2.1-1.3B-Diffusers",
                                              torch_dtype=torch.bfloat16).to("cuda")
    model = AnyFlowFAR(pipe)

and then as examples/own_model.py does, with Method(prompts=1, micro=1). At 1.3 B the caches of a
branch take about 2.8 GB (computed), as diffusers writes them anew at each extend, so that branches
do not share them.

It is a flow map: the network is told where its step ends, x_r = x_t - (t - r) u(x_t, t, r). With
flow = True, predict returns x_t - t u: the Euler step from that to r is the flow map's own step.
"""

import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


class Context(NamedTuple):
    """Rows share memory. Of each row: text [1, words, width], finished chunks [frames, C, H, W]
    without padding, and each layer's two caches [2, 1, heads, tokens, width]."""
    rows: tuple

    def repeat(self, times: int) -> "Context":
        return Context(tuple(row for row in self.rows for _ in range(times)))


class AnyFlowFAR(nn.Module):
    flow = True

    def __init__(self, pipe, size: tuple = (60, 104), steps: int = 4):
        super().__init__()
        self.transformer = pipe.transformer.requires_grad_(False).eval()
        self.outside = (pipe,)                  # a tuple: LoRA is for the transformer alone
        self.partition = tuple(self.transformer.config.chunk_partition)     # frames of each chunk
        self.chunks = len(self.partition)
        self.chunk_shape = max(self.partition), self.transformer.config.in_channels, *size
        pipe.scheduler.set_timesteps(steps)
        self.timesteps = tuple(pipe.scheduler.sigmas[:-1].tolist())

    @property
    def device(self) -> torch.device:
        return self.transformer.device

    def begin(self, prompts: list[str]) -> Context:
        texts = self.outside[0].encode_prompt(list(prompts), do_classifier_free_guidance=False,
                                              max_sequence_length=512)[0].to(self.transformer.dtype)
        return Context(tuple((text, (), self.empty(0)) for text in texts.split(1)))

    def empty(self, p: int) -> tuple:
        """Caches for p finished chunks; all but the last full_chunk_limit - 1 are compressed."""
        c, (height, width) = self.transformer.config, self.chunk_shape[2:]
        far = max(0, p - c.full_chunk_limit + 1)
        parts = ((self.partition[far:p], c.patch_size),
                 (self.partition[:far], c.compressed_patch_size))
        tokens = [sum(frames) * (height // b) * (width // d) for frames, (_, b, d) in parts]
        shapes = [(2, 1, c.num_attention_heads, n, c.attention_head_dim) for n in tokens]
        return tuple(tuple(torch.zeros(s, dtype=self.transformer.dtype, device=self.device)
                           for s in shapes) for _ in range(c.num_layers))

    def call(self, x: Tensor, t: float, r: float, text: Tensor, chunks: int, caches: tuple,
             **flags) -> Tensor:
        """x [frames, C, H, W], the last of so many chunks (to write the caches: all of them)."""
        t, r = (torch.full((1, len(x)), 1000 * z, dtype=torch.float64, device=x.device)
                for z in (t, r))
        return self.transformer(x[None].to(self.transformer.dtype), t, r, text,
                                list(self.partition[:chunks]), kv_cache_flag=flags, kv_cache=[
                                    {"full_cache": full, "compressed_cache": far}
                                    for full, far in caches], return_dict=False)[0]

    def row(self, x: Tensor, t: Tensor, text: Tensor, past: tuple, caches: tuple) -> Tensor:
        """x [*chunk_shape] at time t -> x_t - t u."""
        times = *self.timesteps, 0.0
        i = min(range(len(self.timesteps)), key=lambda i: abs(times[i] - t.item()))
        x = x[: self.partition[len(past)]]      # a shorter chunk is padded: predicted as zeros
        u = self.call(x, times[i], times[i + 1], text, len(past) + 1, caches,
                      num_cached_chunks=len(past), is_cache_step=False)[0]
        return F.pad(x - times[i] * u.float(), (0,) * 7 + (self.chunk_shape[0] - len(x),))

    def predict(self, x_t: Tensor, t: float | Tensor, context: Context) -> Tensor:
        t = torch.as_tensor(t, device=x_t.device).expand(len(x_t))
        row = self.row
        if torch.is_grad_enabled():
            row = partial(checkpoint, self.row, use_reentrant=False)
        return torch.stack([row(x, s, *parts) for x, s, parts in zip(x_t, t, context.rows)])

    def extend(self, context: Context, x0: Tensor) -> Context:
        rows = []
        for x, (text, past, _) in zip(x0, context.rows):
            past = *past, x[: self.partition[len(past)]]
            caches = self.empty(len(past))      # written by the call, from all finished chunks
            self.call(torch.cat(past), 0.0, 0.0, text, len(past), caches,
                      num_cached_chunks=len(past) - 1, is_cache_step=True)
            rows.append((text, past, caches))
        return Context(tuple(rows))

    def frames(self, latents: Tensor) -> Tensor:
        """[N, L, *chunk_shape] -> [N, C, frames, H, W], as diffusers has them."""
        parts = [x[:, :n] for x, n in zip(latents.unbind(1), self.partition)]
        return torch.cat(parts, 1).transpose(1, 2)

    def decode(self, latents: Tensor) -> Tensor:
        """-> clips [N, F, 3, H, W] in [0, 1] in CPU memory, row by row."""
        vae, clips = self.outside[0].vae, []
        mean, std = (torch.tensor(x).view(1, -1, 1, 1, 1).to(latents.device)
                     for x in (vae.config.latents_mean, vae.config.latents_std))
        for z in self.frames(latents).split(1):
            clip = vae.decode((z * std + mean).to(vae.dtype), return_dict=False)[0]
            clips.append((clip.float() / 2 + 0.5).clamp(0, 1).transpose(1, 2).cpu())
        return torch.cat(clips)


if __name__ == "__main__":
    from examples import check_diffusers_far

    check_diffusers_far.main()
