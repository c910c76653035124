"""TransNormer: the gradient that the paper is about, chunks beside the masked form, and blocks that see themselves."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from manyheads import attention
from manyheads.layers.linear.transnormer import TransNormer, norm_attention

EXACT = {"atol": 1e-11, "rtol": 1e-9}  # float64


def steepest(size):
    """The largest |d o / d s| of one query whose eight scores s are near `size`: scaled, and with the norm."""
    near = size * torch.linspace(0.5, 1.5, 8, dtype=torch.float64)
    v = torch.tensor([[(-1.0) ** (c * j // 3) for c in range(4)] for j in range(8)], dtype=torch.float64)
    # One channel: phi(q) = 1 + elu(0) = 1 and phi(k) = 1 + elu(k) = exp(k), so that s is exp(k).
    q, form = torch.zeros(1, 1, 8, 1, dtype=torch.float64), norm_attention(2, causal=False)

    def read(s):
        return attention(q, s.log()[None, None, :, None], v[None, None], form)[0, 0, 0]

    def scaled(s):
        return read(s) / s.sum()

    def normed(s):
        return F.rms_norm(read(s), (4,), eps=1e-6)

    return [torch.autograd.functional.jacobian(way, near).abs().max().item() for way in (scaled, normed)]


def test_only_the_gradient_of_scaled_attention_grows_without_bound_as_scores_shrink():
    """The norm's is at most |v| / sqrt(eps) = 1000 in any channel, and flat where eps is most of the mean square."""
    sizes = (1e-1, 1e-3, 1e-5, 1e-7)
    scaled, normed = zip(*(steepest(size) for size in sizes), strict=True)
    for before, after in pairwise(scaled):
        assert 99 < after / before < 101
    assert max(normed) <= 1000
    assert normed[3] / normed[2] < 1.01


@pytest.mark.parametrize("variant", [1, 2])
def test_chunks_equal_the_masked_form(variant):
    """150 tokens are no whole number of chunks."""
    module = TransNormer(12, 3, part="norm", variant=variant).double()
    x = torch.randn(2, 150, 12, dtype=torch.float64)
    q, k, v = (p(x).unflatten(-1, (3, 4)).transpose(1, 2) for p in (module.q, module.k, module.v))
    q, k = (F.elu(t) + variant - 1 for t in (q, k))
    o = ((q @ k.mT).tril() @ v).transpose(1, 2).flatten(2)
    o = o / (o.square().mean(-1, keepdim=True) + 1e-6).sqrt() * module.norm
    torch.testing.assert_close(module(x), module.o(o), **EXACT)
    # 1e-5 is what the paper's equivalence is held to in float32.
    torch.testing.assert_close(module.float()(x.float()).double(), module.double()(x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("variant", [1, 2])
@pytest.mark.parametrize("causal", [True, False])
def test_a_block_sees_itself_alone(variant, causal):
    module = TransNormer(12, 3, part="diag", variant=variant, block_size=4, causal=causal).double()
    for projection in (module.q, module.k):
        torch.nn.init.uniform_(projection.weight)  # with x > 0 no score is negative, which variant 1 would not see
    x = torch.rand(1, 11, 12, dtype=torch.float64)
    before, changed = module(x)[0], x.clone()
    changed[0, 5] += 1
    moved = (module(changed)[0] - before).abs().sum(-1) > 1e-9
    assert moved.tolist() == [4 + causal <= i < 8 for i in range(11)]


def test_what_is_unknown_is_refused():
    with pytest.raises(ValueError, match="part must be 'norm' or 'diag', not 'both'"):
        TransNormer(12, 3, part="both")
    with pytest.raises(ValueError, match="variant must be 1 or 2, not 3"):
        TransNormer(12, 3, part="norm", variant=3)


@pytest.mark.parametrize("part", ["norm", "diag"])
def test_trains_under_autocast(part):
    module, x = TransNormer(16, 2, part=part, block_size=8), torch.randn(2, 21, 16)
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x)
    y.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())
    assert (y - module(x)).abs().max() < 0.1 * module(x).abs().max()  # eight bits, and sums of both signs
