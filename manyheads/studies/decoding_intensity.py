"""Decoding intensity: a layer's arithmetic for each byte that it moves, in one decoding step, and the time of both.

    seconds = max(operations / peak, bytes / bandwidth)                                       the roofline
    attention, for each of a row's L cached tokens; q and o come on top, once a row:
        operations = 2 heads (d_qk + d_v)         bytes = width · numbers cached
        MHA: 2 head_dim for each head;  GQA: for each key head;  MQA: once
        MLA: latent + rope once, and these are keys (d_qk = latent + rope) and values (d_v = latent) of all heads
    so for L → ∞ and a width of 2 the intensity is
        MHA 1,  GQA heads / kv_heads,  MQA heads,  MLA heads (2 latent + rope) / (latent + rope), nearly 2 heads
    experts, for N tokens of all chips, each token in top_k of E experts of 3 · dim · expert_ff weights:
        operations = 2 N top_k · weights          bytes = width · weights · E (1 − (1 − top_k / E)^N), rows on top
    so with many tokens the intensity is N top_k / E, that of a dense layer on a chip's own tokens if E / top_k chips
    share the experts, and the ridge, peak / bandwidth, is reached at N = ridge · E / top_k.

What is counted has to be moved at least: scores and hidden units stay on the chip, and weights are read once. The
projections around attention, W_UK and W_UV of MLA among them, are left out: they are dense layers.

Yun et al., "The New LLM Bottleneck: A Systems Perspective on Latent Attention and Mixture-of-Experts", 2025.
https://arxiv.org/abs/2507.15465
"""

from __future__ import annotations

from math import inf

from manyheads.core.study import Rows, study


def attend(batch: int, kv_len: int, heads: int, d_qk: int, d_v: int, cached: int, width: int) -> tuple[int, int]:
    """Operations and bytes of one query for each row and head; `cached` counts the numbers kept for a token."""
    operations = 2 * batch * kv_len * heads * (d_qk + d_v)
    return operations, width * batch * (kv_len * cached + heads * (d_qk + d_v))


def feed(tokens: int, dim: int, ff: int, experts: int, top_k: int, width: int) -> tuple[float, float]:
    """Operations and bytes of gated perceptrons, with equally likely experts: each that has a token is read."""
    weights, rows = 3 * dim * ff, tokens * top_k
    read = experts * (1 - (1 - top_k / experts) ** tokens)
    return 2 * rows * weights, width * (read * weights + 2 * rows * dim)


@study(
    arxiv="2507.15465", system="mla-moe-bottleneck", family="heads",
    ranges={"rope": (0, inf), "peak": (1, inf), "bandwidth": (1, inf)},
)  # fmt: skip
def decoding_intensity(
    *, batch: int = 128, kv_len: int = 4096, heads: int = 128, kv_heads: int = 16, head_dim: int = 128,
    latent: int = 512, rope: int = 64, dim: int = 7168, ff: int = 18432, experts: int = 256, top_k: int = 8,
    expert_ff: int = 2048, chips: int = 32, width: int = 2, peak: float = 989.4e12, bandwidth: float = 3.35e12,
) -> Rows:  # fmt: skip
    """A row for each layer, on one chip that has `batch` rows of its own; the experts lie on `chips` such chips, each
    with its share. Sizes are DeepSeek-V3's (arXiv:2412.19437); kv_heads is of GQA. width: bytes of a number, here a
    bfloat16. peak: operations a second, bandwidth: bytes a second. They are of an H100 SXM, by NVIDIA's architecture
    paper (989.4 TFLOPS without sparsity) and data sheet (3.35 TB/s).
    """
    if heads % kv_heads:
        raise ValueError(f"kv_heads of decoding_intensity must divide heads, {heads}, not {kv_heads}")
    if top_k > experts:
        raise ValueError(f"top_k of decoding_intensity must be at most experts, {experts}, not {top_k}")

    def shared(key_heads: int) -> tuple[int, int]:
        return attend(batch, kv_len, heads, head_dim, head_dim, 2 * head_dim * key_heads, width)

    all_experts = feed(batch * chips, dim, expert_ff, experts, top_k, width)
    steps = {
        "MHA": shared(heads),
        f"GQA (kv_heads={kv_heads})": shared(kv_heads),
        "MQA": shared(1),
        "MLA, absorbed": attend(batch, kv_len, heads, latent + rope, latent, latent + rope, width),
        "dense perceptron": feed(batch, dim, ff, 1, 1, width),
        f"experts (chips={chips})": tuple(part / chips for part in all_experts),
    }
    return [
        {
            "layer": layer, "operations": float(operations), "bytes": float(moved), "intensity": operations / moved,
            "microseconds": 1e6 * max(operations / peak, moved / bandwidth),
            "bound by": "arithmetic" if operations / moved > peak / bandwidth else "memory",
        }
        for layer, (operations, moved) in steps.items()
    ]  # fmt: skip


if __name__ == "__main__":
    decoding_intensity.main()
