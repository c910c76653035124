"""What benchmarks/sparse_peers.py gives to others, and the page's table of them. The others are not installed here."""

import sys
from itertools import pairwise
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from manyheads.core.forms import Blocks
from manyheads.core.inputs import Inputs, default_positions
from manyheads.engines import eager

LENGTH, HEADS, GROUP, DIM = 256, 4, 2, 8


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).resolve().parent.parent / "benchmarks")
    import page
    import selections
    import sparse_peers

    return SimpleNamespace(page=page, selections=selections, peers=sparse_peers)


def given(bench, block, kept, queries):
    """Blocks, their form, q, k, v, and what attention over them gives."""
    heads = HEADS if kept < 1 else HEADS // GROUP
    blocks = bench.selections.liked(torch.rand(1, heads, LENGTH // queries, LENGTH // block), block, kept, queries)
    if kept >= 1:
        blocks = Blocks(*(t.repeat_interleave(GROUP, 1) for t in (blocks.indices, blocks.counts)))
    form = bench.selections.selection(blocks, block, queries)
    q, k, v = (torch.randn(1, n, LENGTH, DIM, dtype=torch.float64) for n in (HEADS, HEADS // GROUP, HEADS // GROUP))
    o, _ = eager.run(form, Inputs(q, k, v, DIM**-0.5, *default_positions(LENGTH, LENGTH)))
    return blocks, form, (q, k, v), o


def test_so_many_blocks_are_the_own_the_first_and_others_before(bench):
    likes = torch.rand(1, 3, 64, 16)
    keep = bench.selections.liked(likes, 4, 5, 1).to_map(16)
    own = torch.arange(64) // 4
    assert keep.sum(-1).equal((own + 1).clamp(max=5).expand(1, 3, -1))
    assert keep[..., 0].all() and keep[:, :, torch.arange(64), own].all()
    assert not keep.logical_and(torch.arange(16) > own[:, None]).any()
    kept, left = likes.masked_fill(~keep, 2)[..., 1:-1].amin(-1), likes.masked_fill(keep, -1)[0, 0, -1, :-1].max()
    assert kept[0, 0, -1] > left, "the best"


@pytest.mark.parametrize("queries", [1, 4])
def test_lists_for_single_queries(bench, queries):
    blocks, form, (_, k, _), _ = given(bench, 16, 4, queries)
    indices, counts = bench.peers.by_query(form, blocks)
    assert indices.shape == (1, HEADS // GROUP, LENGTH, 4) and counts.shape == indices.shape[:3]
    keep = torch.zeros(1, HEADS // GROUP, LENGTH, 17).scatter(3, indices.where(indices >= 0, 16), 1)[..., :16].bool()
    assert keep.equal(blocks.to_map(16)[:, ::GROUP].repeat_interleave(queries, 2))
    assert (indices >= 0).sum(-1).equal(counts)
    bench.peers.same_heads(indices.shape[1], k)
    apart, form, *_ = given(bench, 16, 0.4, queries)
    with pytest.raises(ValueError, match="share"):
        bench.peers.same_heads(bench.peers.by_query(form, apart)[0].shape[1], k)


@pytest.mark.parametrize("block", [128, 64])
def test_places_in_the_map_of_blocks(bench, monkeypatch, block):
    blocks, form, (q, k, v), o = given(bench, block, 0.6, 128)

    def attend(q, k, v, places, size):
        n = LENGTH // size
        assert size == block and (places.diff(dim=-1) >= 0).all()
        assert (places % n <= places // n)[places < n * n].all(), "none that lies after all of its queries"
        keep = torch.zeros(1, HEADS, n * (n + 1) + 1).scatter(2, places.long(), 1)[..., : n * n].view(1, HEADS, n, n)
        keep = keep.bool().repeat_interleave(size, 2).repeat_interleave(size, 3).tril()
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        attend = torch.nn.functional.scaled_dot_product_attention
        return attend(q, k, v, attn_mask=keep, enable_gqa=True).transpose(1, 2)

    monkeypatch.setattr(bench.peers, "alone", lambda *_: SimpleNamespace(triton_block_wise_prefill_attention=attend))
    torch.testing.assert_close(bench.peers.flexprefill(form, blocks, block)(q, k, v), o)


def test_copies_in_the_order_of_their_blocks(bench, monkeypatch):
    def attend(q, k, v, own, copies, pieces, q_ends, k_ends, most, size, rows):
        """Of all parts the sums of the weights, and of the values with them."""
        weights, values = torch.zeros(q[..., :1].shape, dtype=q.dtype).flatten(0, 1), torch.zeros_like(q).flatten(0, 1)
        place = torch.arange(LENGTH * HEADS).view(LENGTH, HEADS)
        parts = [(q[a:b, h], k[a:b, h], v[a:b, h], place[a:b, h], True)
                 for a, b in pairwise(own) for h in range(HEADS)]  # fmt: skip
        for (a, b), (c, d) in zip(pairwise(q_ends), pairwise(k_ends), strict=True):
            assert a < b and d - c == size
            parts.append((copies[a:b, 0], pieces[c:d, 0, 0], pieces[c:d, 1, 0], rows[a:b], False))
        for x, y, z, to, causal in parts:
            scores = (x @ y.T * DIM**-0.5).exp()
            scores = scores.tril() if causal else scores
            weights.index_add_(0, to, scores.sum(-1, keepdim=True))
            values.index_add_(0, to, scores @ z)
        return (values / weights).view(LENGTH, HEADS, DIM)

    mixed = SimpleNamespace(apply=attend)
    monkeypatch.setattr(bench.peers, "alone", lambda *_: SimpleNamespace(MixedAttention=mixed))
    for block in (16, 64):
        blocks, form, (q, k, v), o = given(bench, block, 0.3, 1)
        torch.testing.assert_close(bench.peers.moba(form, blocks, block)(q, k, v), o)


def test_a_file_of_a_package_that_would_import_more(bench, monkeypatch, tmp_path):
    (tmp_path / "heavy").mkdir()
    (tmp_path / "heavy" / "__init__.py").write_text("import what_nobody_has")
    (tmp_path / "heavy" / "light.py").write_text("from flash_attn import flash_attn_func\nFOUND = flash_attn_func")
    monkeypatch.syspath_prepend(tmp_path)
    before = ModuleType("flash_attn")
    monkeypatch.setitem(sys.modules, "flash_attn", before)
    assert bench.peers.alone("heavy", "light.py").FOUND is None
    assert sys.modules["flash_attn"] is before and "flash_attn.flash_attn_interface" not in sys.modules
    with pytest.raises(ModuleNotFoundError):
        bench.peers.alone("nobody_has_this", "light.py")


def test_the_table_of_selections(bench):
    shape = {"batch": 1, "heads": 32, "kv_heads": 8, "length": 32768, "head_dim": 128}

    def row(engine, speed, case="blocks of 128", which="forward", **more):
        times = {"median_ms": 100 / speed, "tflops": speed}
        return {
            "case": case,
            **shape,
            "dtype": "bfloat16",
            "engine": engine,
            "pass": which,
            "share": 0.1,
            **times,
            **more,
        }

    rows = [row("ours", 500), row("flex", 400.4), row("flash4", 450), row("ours", 300, which="backward")]
    dense = [row("cudnn", 20, "causal"), row("cudnn", 10, "full")]
    for r in dense:
        del r["share"]
    _, _, *lines = bench.page._selections([*rows, *dense, row("fsa", 1, "blocks of 64")])
    assert lines == [
        "| blocks of 128 | 1 × 32k, 32 on 8 heads of 128 | forward | 500 | 1.11 | FA4 450, FlexAttention 400 | 25.0 |",
        "| blocks of 128 | 1 × 32k, 32 on 8 heads of 128 | backward | 300 |  |  |  |",
    ]
