"""Attention buckets: which distances rotary attention overlooks, and how many copies with other bases leave none.

    f(m; b) = 2 sum_{c < d/2} cos(m b^(-2c/d))    the score of a query of ones on a key of ones at distance m, base b
    F_n(m) = max_{k < n} f(m; b_k)                what the keenest of n copies has for distance m

A distance is overlooked where f is lowest of all within 50 positions of it. A peak of another copy within `near`
positions makes up for it. The row of n copies has the troughs of the first base that are still open, and the least of
F_n over all distances: the higher it is, the less is overlooked. In `manyheads.integrations.transformers` the function
of this name lets a model vote so.

Chen, Lv, Lin, et al. "Fortify the Shortest Stave in Attention: Enhancing Context Awareness of Large Language Models for
Effective Tool Use." 2023. arXiv:2312.04455.
"""

from __future__ import annotations

import torch

from manyheads.core.rotary_waves import BASES, choose_bases, turning_points, waveform
from manyheads.core.study import Rows, study


@study(
    arxiv="2312.04455", system="attention-buckets", family="dense", ranges={"near": (0, 1000), "head_dim": (2, 4096)}
)
def attention_buckets(
    *,
    copies: int = 6,
    head_dim: int = 128,
    first: int = 1000,
    last: int = 4090,
    near: int = 3,
    bases: str = "published",
) -> Rows:
    """A row for 1, 2, ... copies. first, last: distances. bases: "published", the paper's six in its order, or those
    that our search finds: "chosen"."""
    if bases not in ("published", "chosen"):
        raise ValueError(f"bases of attention_buckets must be 'published' or 'chosen', not {bases!r}")
    if last < first + 101:
        raise ValueError(f"last of attention_buckets must be at least first + 101, {first + 101}, not {last}")
    if bases == "published" and copies > len(BASES):
        raise ValueError(f"copies of attention_buckets must be at most {len(BASES)}, the published ones, not {copies}")
    distances = range(first, last + 1)
    found = BASES[:copies]
    if bases == "chosen":
        found = choose_bases(copies, distances=distances, head_dim=head_dim, near=near)
    curves = torch.stack([waveform(torch.tensor(distances), base, head_dim) for base in found])
    turns = [turning_points(curve) for curve in curves]
    open_, rows = turns[0][1], []
    for n, (base, (peaks, _)) in enumerate(zip(found, turns, strict=True), 1):
        if n > 1 and len(peaks):
            open_ = open_[(open_[:, None] - peaks).abs().amin(1) > near]
        rows.append({
            "copies": n, "base": base, "open troughs": len(open_), "least score": float(curves[:n].amax(0).min()),
        })  # fmt: skip
    return rows


if __name__ == "__main__":
    attention_buckets.main()
