"""Hymba's heads: what they see, how they go on token by token, and what they keep."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from manyheads import attention, layers
from manyheads.core.scans import selective_scan
from manyheads.nn import rotate, split

SIZES = {"dim": 8, "heads": 4, "kv_heads": 2, "meta": 3, "state_dim": 5}


def made(**settings):
    module = layers.get("hymba")(**SIZES, **settings).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return module


def test_attention_is_that_of_an_explicit_mask():
    """torch's own kernel, over meta tokens and a window of 4 and with repeated heads, to the row's 1e-5 and better."""
    module, n = made(window=4, rope_theta=None), 20
    q, k, v = (torch.randn(2, h, n, d, dtype=torch.float64) for h, d in ((4, 2), (2, 2), (2, 4)))
    i, j = torch.arange(n)[:, None], torch.arange(n)
    seen = (j <= i) & ((i - j < 4) | (j < 3))
    k_all, v_all = (t.repeat_interleave(2, 1) for t in (k, v))
    torch.testing.assert_close(module.attend(q, k, v), F.scaled_dot_product_attention(q, k_all, v_all, seen))


def go_on(module, x):
    """The outputs for x [batch, len, dim], each token from nothing but what the meta tokens and a ring of the last
    window keys and values, a state and the last tokens before a convolution keep."""
    meta, window, ssm = len(module.meta), module.window, module.ssm
    keys = values = positions = None
    state, recent, out = None, None, []
    row = torch.cat([module.meta.expand(len(x), -1, -1), x], 1)
    for t, token in enumerate(row.split(1, 1)):
        q, k, v, inner, z = module.in_proj(token).split(module.sizes, -1)
        at = torch.full((1, 1), t)
        q, k = rotate(split(q, 4), at, module.rope_theta), rotate(split(k, 2), at, module.rope_theta)
        if keys is None:
            slots = meta + window
            keys, values = (s.new_zeros(len(x), 2, slots, s.shape[3]) for s in (k, split(v, 2)))
            positions = torch.full((slots,), -1)
            recent = inner.new_zeros(len(x), ssm.conv1d.kernel_size[0] - 1, inner.shape[2])
        slot = t if t < meta else meta + (t - meta) % window
        keys[:, :, slot], values[:, :, slot], positions[slot] = k[:, :, 0], split(v, 2)[:, :, 0], t
        attended = attention(
            q, keys, values, "sliding_window", window=window, sinks=meta,
            q_positions=at[0], kv_positions=positions,
        )  # fmt: skip
        taken = torch.cat([recent, inner], 1)
        recent = taken[:, 1:]
        u = F.silu((taken * ssm.conv1d.weight[:, 0].mT).sum(1, keepdim=True) + ssm.conv1d.bias)
        _, dt, b, c = ssm.choose(taken)
        y, state = selective_scan(u, dt[:, -1:], -ssm.A_log.exp(), b[:, -1:], c[:, -1:], state)
        both = attended.transpose(1, 2).flatten(2), (y + ssm.D * u) * F.silu(z)
        mean = sum(F.rms_norm(p, p.shape[-1:], beta, 1e-6) for p, beta in zip(both, module.beta, strict=True)) / 2
        out.append(module.out_proj(mean))
    return torch.cat(out[meta:], 1)


@pytest.mark.parametrize("window", [1, 4, 50])
def test_going_on_with_a_ring_of_keys_and_a_state_equals_the_whole(window):
    module = made(window=window)
    x = torch.randn(2, 15, 8, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(go_on(module, x), module(x), atol=1e-11, rtol=1e-9)


def test_the_state_has_read_the_meta_tokens():
    """Without attention, the first token's output hangs on them; what stands before them is nothing."""
    module = made(window=1)
    torch.nn.init.zeros_(module.beta[0])
    x = torch.randn(1, 5, 8, dtype=torch.float64)
    before = module(x)
    with torch.no_grad():
        module.meta[0] += 1
    assert (module(x) - before)[:, 0].abs().max() > 1e-6


def test_what_is_kept_is_a_tenth_of_a_transformer_s():
    """The paper: 11.67 times less than Llama-3.2-3B's 28 layers of 8 heads of 128 at 8000 tokens. To 6 %: how 29 layers
    make pairs, and whether meta tokens are counted, the paper does not say."""
    published = {"dim": 1600, "heads": 25, "kv_heads": 5, "dt_rank": 100}
    with torch.device("meta"):
        near, far = (layers.get("hymba")(**published, window=w).kept(8000) for w in (1024, None))
    kept = 3 * sum(far) + 29 * (near[0] / 2 + near[1])
    ratio = 28 * 2 * 8 * 128 * 8000 / kept
    assert ratio == pytest.approx(11.67, rel=0.06)
    unshared = 3 * sum(far) + 29 * sum(near)
    assert unshared > 1.3 * kept and 32 * sum(far) > 3 * kept


def test_what_is_kept_is_what_going_on_needs():
    """Keys of 2 and values of 4 channels for two heads, of meta tokens and the window without the token to come."""
    assert made(window=4).kept(2) == ((3 + 2) * (2 * 2 + 2 * 4), 16 * (5 + 3))
    assert made(window=4).kept(100)[0] == (3 + 3) * 12 and made().kept(100)[0] == 103 * 12
