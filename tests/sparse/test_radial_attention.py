"""Radial attention: its diagonals, its cost, and the energy that it keeps where energy decays as the paper says."""

from __future__ import annotations

import torch

from manyheads import get
from manyheads.core.expressions import EMPTY

ZERO = torch.zeros((), dtype=torch.long)


def mask(length, **settings):
    at = torch.arange(length)
    return get("radial_attention")(**settings).program.mask(ZERO, ZERO, at[:, None], at)


def test_diagonals_halve_with_each_doubling_of_the_distance_and_thin_out_when_they_are_one_wide():
    """Frames of 4 tokens. From distance 8 on every second frame is left, from 16 on every fourth."""
    seen = mask(4 * 20, frame=4, frames=20, sinks=0).unflatten(1, (20, 4)).unflatten(0, (20, 4))[0].transpose(0, 1)
    at = torch.arange(4)
    for distance in range(20):  # from frame 0 to the frame at that distance
        p = 2 ** (max(distance, 1).bit_length() - 1)
        width, every = {1: (4, 1), 2: (2, 1), 4: (1, 1), 8: (1, 2), 16: (1, 4)}[p]
        wanted = ((at[:, None] - at).abs() < width) & (distance % every == 0)
        assert seen[distance].equal(wanted), distance


def test_keys_grow_with_the_logarithm_of_the_length():
    """By the same number for every doubling of the frames; those of a dense query double."""
    kept = [mask(16 * n, frame=16, frames=n, sinks=0).float().sum(-1).mean() / 16 for n in (8, 16, 32, 64, 128)]
    steps = torch.stack(kept).diff()
    assert (steps.max() < 1.35 * steps.min()) and kept[-1] < 128 / 6


def test_text_behind_the_video_sees_and_is_seen_by_all():
    seen = mask(4 * 20 + 3, frame=4, frames=20)
    assert seen[80:].all() and seen[:, 80:].all() and seen[:, :4].all()
    assert not seen[:80, 4:80].all()


def test_it_keeps_the_energy_that_decays_in_time_and_place():
    """Weights exp(-0.3 D - 0.5 |k - l|) over 24 frames of 32 tokens: more of them than in a window of as many keys."""
    frame, frames = 32, 24
    at = torch.arange(frame * frames)
    far = (at[:, None] // frame - at // frame).abs(), (at[:, None] % frame - at % frame).abs()
    weights = (-0.3 * far[0] - 0.5 * far[1]).double().softmax(-1)
    seen = mask(frame * frames, frame=frame, frames=frames, sinks=0)
    apart = (at[:, None] - at).abs()
    window = next(apart < n for n in at if (apart < n).sum() >= seen.sum())
    kept, recent = ((weights * m).sum(-1).min() for m in (seen, window))
    assert kept > 0.95 > 0.9 > recent


def test_tiles_off_the_diagonals_are_skipped():
    """Frames of 8 tiles; what intervals leave is at most what one key in a tile would leave, plus its neighbours."""
    form = get("radial_attention")(frame=1024, frames=16, sinks=0)
    tiles = form.program.tiles(range(1024 * 16), range(1024 * 16), (128, 128), 1, 1)
    exact = torch.zeros(128, 128, dtype=torch.bool)
    at = torch.arange(1024 * 16)
    for n, rows in enumerate(at.split(128)):
        exact[n] = form.program.mask(ZERO, ZERO, rows[:, None], at).unflatten(1, (-1, 128)).any(2).any(0)
    assert not (exact & (tiles[0, 0] == EMPTY)).any()
    assert (tiles != EMPTY).sum() <= 1.01 * exact.sum() and exact.float().mean() < 0.65
