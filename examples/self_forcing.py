"""Self-Forcing (github.com/guandeh17/Self-Forcing) behind the contract of arcopo.Generator:

    python examples/self_forcing.py --check PATH_TO_SELF_FORCING

runs check_self_forcing.py: its own code with tiny random weights on the CPU, against its own
pipeline. Without --check it prints the memory that 1.3 B needs. No run with the real weights was
made. In the folder of that repository, with its weights:

    wrapper = WanDiffusionWrapper(is_causal=True, timestep_shift=5.0)
    saved = torch.load("checkpoints/self_forcing_dmd.pt", weights_only=True)
    wrapper.load_state_dict(saved["generator_ema"])
    parts = wrapper, WanTextEncoder(), WanVAEWrapper()
    model = SelfForcing(*(part.to("cuda", torch.bfloat16) for part in parts))
    method = Method(prompts=1, micro=1)
    adapter = Adapter.new(model, 64, 128.0)
    optimizer = torch.optim.AdamW(adapter.parameters(), 1e-5, weight_decay=0)

and then as examples/own_model.py does. This file was checked as above, unchanged, on the code of
Self-Forcing (commit 33593df), thu-ml/Causal-Forcing (1fc7bbc), NVlabs/LongLive 1 (branch v1.0,
e52d9ef) and franklinz233/Astrolabe (35a5347). Not supported: a rolling window (local_attn_size).
"""

import sys
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Context(NamedTuple):
    """Rows share memory: a branch has its prompt's prefix and its own chunks, nothing is copied."""
    texts: tuple    # [512, 4096] of each row
    pasts: tuple    # of each row: a tuple over finished chunks, layers and (k, v) [1, tokens, H, D]

    def repeat(self, times: int) -> "Context":
        return Context(*(tuple(x for x in part for _ in range(times)) for part in self))


class SelfForcing(nn.Module):
    flow = False

    def __init__(self, wrapper: nn.Module, text_encoder, vae, chunk_shape=(3, 16, 60, 104),
                 chunks: int = 7, steps=(1000, 750, 500, 250)):
        super().__init__()
        wrapper.model.num_frame_per_block = chunk_shape[0]
        self.wrapper = wrapper.requires_grad_(False)
        self.outside = text_encoder, vae        # a tuple: LoRA is for the transformer alone
        self.chunk_shape, self.chunks = chunk_shape, chunks
        self.timesteps = tuple(wrapper.scheduler.sigmas[1000 - s].item() for s in steps)
        (frames, _, height, width), (_, a, b) = chunk_shape, wrapper.model.patch_size
        self.tokens = frames * (height // a) * (width // b)

    @property
    def device(self) -> torch.device:
        return next(self.wrapper.parameters()).device

    def begin(self, prompts: list[str]) -> Context:
        texts = self.outside[0](text_prompts=list(prompts))["prompt_embeds"]
        return Context(tuple(texts.to(next(self.wrapper.parameters()))), ((),) * len(prompts))

    def row(self, x: Tensor, t: Tensor, text: Tensor, past: tuple) -> tuple[Tensor, list]:
        """One row: x [*chunk_shape] at time t -> x̂₀, and the layers' caches."""
        net, start, caches = self.wrapper.model, len(past) * self.tokens, []
        dtype = next(self.wrapper.parameters()).dtype
        empty = torch.empty(1, self.tokens, net.num_heads, net.dim // net.num_heads, dtype=dtype,
                            device=x.device)
        for layer in range(len(net.blocks)):    # fresh tensors, as the network writes into them
            k, v = (torch.cat([*(chunk[layer][i] for chunk in past), empty], 1) for i in (0, 1))
            end = torch.tensor([start])
            caches.append({"k": k, "v": v, "global_end_index": end, "local_end_index": end.clone()})
        times = (1000 * t).float().expand(1, len(x))
        x0 = self.wrapper(x[None].to(dtype), {"prompt_embeds": text[None]}, times, kv_cache=caches,
                          crossattn_cache=[None] * len(caches), current_start=start)[1][0]
        return x0, caches

    def predict(self, x_t: Tensor, t: float | Tensor, context: Context) -> Tensor:
        t = torch.as_tensor(t, device=x_t.device).expand(len(x_t))
        rows = zip(x_t, t, *context)
        if torch.is_grad_enabled():             # one row of 4,680 tokens at a time fills a GPU
            only = lambda *row: self.row(*row)[0]
            return torch.stack([checkpoint(only, *row, use_reentrant=False) for row in rows])
        return torch.stack([self.row(*row)[0] for row in rows])

    @torch.no_grad()
    def extend(self, context: Context, x0: Tensor) -> Context:
        pasts = []
        for x, text, past in zip(x0, *context):
            caches = self.row(x, torch.zeros((), device=x.device), text, past)[1]
            new = tuple(tuple(c[n][:, -self.tokens :].clone() for n in "kv") for c in caches)
            pasts.append((*past, new))
        return Context(context.texts, tuple(pasts))

    def decode(self, latents: Tensor) -> Tensor:
        """-> clips [N, F, 3, H, W] in [0, 1] in CPU memory, row by row."""
        dtype = next(self.wrapper.parameters()).dtype
        clips = [self.outside[1].decode_to_pixel(x[None].flatten(1, 2).to(dtype)) for x in latents]
        return torch.cat([(clip.float() / 2 + 0.5).clamp(0, 1).cpu() for clip in clips])


def memory(saved: float = 142.0, prompts: int = 1, group: int = 12, rank: int = 64) -> dict:
    """Gigabytes at 1.3 B: 30 layers of width 1,536, 7 chunks of 4,680 tokens, bf16 weights, LoRA in
    fp32, --micro 1, each place at its worst pivot. Not counted: what the VAE needs to decode.

    saved: bytes that a row at the last pivot saves for backward, per token, layer and unit of
    width; check_self_forcing.py measures it on the tiny network.
    """
    layers, width, inner, tokens, chunk = 30, 1536, 8960, 4680, 3 * 16 * 60 * 104
    cache = layers * tokens * width * 2 * 2             # k and v of a chunk in bf16
    weights = layers * (8 * width**2 + 2 * width * inner) + 6 * width**2 + width * (4096 + width)
    lora = layers * rank * (16 * width + 2 * (width + inner))
    return {name: size / 1e9 for name, size in {
        "weights": 2 * weights,
        "text encoder (umt5-xxl)": 2 * 4096 * (256384 + 24 * (4 * 4096 + 3 * 10240)),
        "LoRA, its gradient and AdamW": 16 * lora,
        "prefix of the prompts and chunks of a branch": prompts * 6 * cache,
        "working copy of a row": 7 * cache,
        "saved for backward, a row": saved * layers * tokens * width,
        "states and candidates of a fork": 2 * 4 * prompts * group * chunk * 4,
        "in CPU memory: clips of a fork": prompts * group * 81 * 3 * 480 * 832 * 4,
        "in CPU memory: buffer of 100 groups": 100 * (2 * 4 * group + 3) * chunk * 2,
    }.items()}


if __name__ == "__main__":
    if len(sys.argv) == 3 and (Path(sys.argv[2]) / "utils" / "wan_wrapper.py").is_file():
        import check_self_forcing

        check_self_forcing.main(Path(sys.argv[2]))
    elif len(sys.argv) > 1:
        print("self_forcing: usage: --check FOLDER, a copy of Self-Forcing", file=sys.stderr)
        sys.exit(2)
    for place, gigabytes in memory().items():
        print(f"{place:<46}{gigabytes:6.1f} GB")
