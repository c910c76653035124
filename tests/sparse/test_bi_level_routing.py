"""Bi-level routing on images: the order of regions, and the regions that it finds."""

import pytest
import torch
import torch.nn.functional as F

from manyheads import attention, get
from manyheads.mechanisms.sparse.bi_level_routing import region_order


def test_an_image_in_region_order_equals_gathering_its_windows():
    """4 x 6 pixels in 2 x 2 regions of 2 x 3, pooled and gathered on the map as the paper has it."""
    q, k, v = torch.randn(3, 1, 2, 24, 5, dtype=torch.float64)
    order = region_order(4, 6, 2)
    o = attention(*(t[:, :, order] for t in (q, k, v)), "bi_level_routing", region_size=6, top_k=2)
    maps = [t[0].transpose(1, 2).reshape(10, 4, 6) for t in (q, k, v)]  # [heads * channels, height, width]
    q_mean, k_mean = (F.avg_pool2d(t, (2, 3)).flatten(1) for t in maps[:2])
    expected = torch.zeros(2, 4, 6, 5, dtype=torch.float64)
    windows = {m: (slice(m // 2 * 2, m // 2 * 2 + 2), slice(m % 2 * 3, m % 2 * 3 + 3)) for m in range(4)}
    for m, (rows, columns) in windows.items():
        chosen = (q_mean[:, m] @ k_mean).topk(2).indices.tolist()
        for h in range(2):
            own = slice(5 * h, 5 * h + 5)
            keys, values = (torch.cat([t[own][:, *windows[c]].flatten(1) for c in chosen], 1) for t in maps[1:])
            w = (maps[0][own, rows, columns].flatten(1).T @ keys / 5**0.5).softmax(-1)
            expected[h, rows, columns] = (w @ values.T).view(2, 3, 5)
    torch.testing.assert_close(o[0][:, order.argsort()], expected.flatten(1, 2), atol=1e-12, rtol=1e-10)


def test_a_map_without_equal_regions_is_refused():
    with pytest.raises(ValueError, match="a map of 4 x 6 has no 3 x 3 equal regions"):
        region_order(4, 6, 3)


def test_four_of_49_regions_hold_the_mass_that_regions_plant():
    """Each region's tokens look for three topics, and each topic is what one region is about."""
    regions, size, dim = 49, 16, 64
    topics = F.normalize(torch.randn(regions, dim), dim=-1)
    wanted = torch.stack([torch.randperm(regions)[:3] for _ in range(regions)])
    noise = 0.3 * torch.randn(2, regions * size, dim) / dim**0.5
    k = topics.repeat_interleave(size, 0) + noise[0]
    q = 12 * dim**0.5 * topics[wanted].sum(1).repeat_interleave(size, 0) / 3**0.5 + noise[1]
    q, k = q[None, None], k[None, None]
    form = get("bi_level_routing")(region_size=size, top_k=4)
    kept = form.select(q, k, scale=1.0, offset=0).to_map(regions)
    mass = (q @ k.mT / dim**0.5).softmax(-1).unflatten(-1, (regions, size)).sum(-1)
    recalled = (mass * kept.repeat_interleave(size, 2)).sum(-1).mean()
    assert recalled > 0.9
    anywhere = (mass * torch.rand_like(mass).argsort(-1).lt(4)).sum(-1).mean()
    assert anywhere < 0.2
