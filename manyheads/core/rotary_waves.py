"""The score of rotary positions by distance alone, as waves: where they are high and low, and bases that fill each
other's troughs, for attention buckets.

Chen, Lv, Lin, et al. "Fortify the Shortest Stave in Attention: Enhancing Context Awareness of Large Language Models for
Effective Tool Use." 2023. arXiv:2312.04455. Peaks are those of the slow waves, here the highest within 50 positions;
the released code has another rule, and its search does not end at the published `BASES`.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

BASES = (10000.0, 17500.0, 18000.0, 19000.0, 20000.0, 25000.0)


def waveform(distances: Tensor, base: float, head_dim: int) -> Tensor:
    """What rotary positions make of a query and a key of ones, by their distance; float64."""
    speed = base ** (-2 * torch.arange(head_dim // 2, dtype=torch.float64) / head_dim)
    return 2 * torch.cos(distances.double()[..., None] * speed).sum(-1)


def choose_bases(
    count: int = 6,
    *,
    first: float = 10000.0,
    candidates: Iterable[float] = range(10000, 30001, 500),
    distances: range = range(1000, 4091),
    head_dim: int = 128,
    near: int = 3,
) -> tuple[float, ...]:
    """`count` bases whose peaks stand in each other's troughs, within `near` positions, over these distances."""
    at = torch.tensor(distances)
    turns = {float(b): turning_points(waveform(at, b, head_dim)) for b in {first, *candidates}}
    if not 1 <= count <= len(turns):
        raise ValueError(f"count must be between 1 and the {len(turns)} candidates, not {count}")
    chosen, (peaks, troughs) = [float(first)], turns[float(first)]
    while len(chosen) < count:
        ranked = []
        for base in sorted(turns.keys() - set(chosen)):
            gaps = torch.cat([_gaps(turns[base][0], troughs, near), _gaps(peaks, turns[base][1], near)])
            ranked.append((-len(gaps), gaps.square().double().mean().item() if len(gaps) else 0.0, base))
        base = min(ranked)[2]
        more_peaks, more_troughs = turns[base]
        # What a peak has met is no longer a trough to fill, nor that peak one to be used.
        peaks, troughs, more_peaks, more_troughs = (
            _apart(peaks, more_troughs, near), _apart(troughs, more_peaks, near),
            _apart(more_peaks, troughs, near), _apart(more_troughs, peaks, near),
        )  # fmt: skip
        peaks, troughs = torch.cat([peaks, more_peaks]), torch.cat([troughs, more_troughs])
        chosen.append(base)
    return tuple(sorted(chosen))


def turning_points(curve: Tensor, reach: int = 50) -> tuple[Tensor, Tensor]:
    """Where a curve is highest, and lowest, of all within `reach`; its two ends are neither."""
    inner = slice(reach, len(curve) - reach)
    tops = [F.max_pool1d(c[None], 2 * reach + 1, 1)[0] == c[inner] for c in (curve, -curve)]
    peaks, troughs = (top.nonzero().flatten() + reach for top in tops)
    return peaks, troughs


def _gaps(a: Tensor, b: Tensor, near: int) -> Tensor:
    gaps = (a[:, None] - b).abs().flatten()
    return gaps[gaps <= near]


def _apart(a: Tensor, b: Tensor, near: int) -> Tensor:
    return a[((a[:, None] - b).abs() > near).all(1)]
