"""Who else attends over lists of key blocks. Each gives what runs the lists of a form, for a batch of one, or says why
it cannot; what can be made before a call is made before. Imported, and so installed, only where it is asked for:

    flex          with torch
    flash4        pip install --pre flash-attn-4; its block sparsity
    nsa           pip install fla-core; fla's kernels of Native Sparse Attention
    fsa, fsa_nsa  git clone https://github.com/Relaxed-System-Lab/Flash-Sparse-Attention, in PYTHONPATH; Flash Sparse
                  Attention, and the kernels of Native Sparse Attention that come with it, for groups of any size.
                  Triton 3.6 takes fsa without the comma behind `stride_lse_n` in its reduce_kernel
    moba          git clone https://github.com/MoonshotAI/MoBA, in PYTHONPATH; without flash_attn
    flexprefill   git clone https://github.com/microsoft/MInference, in PYTHONPATH; forward only, without flash_attn

flash-sparse-attn, of the same name as fsa, is none of them: it takes no lists, computes all scores, and leaves out the
products with values where scores are small.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from peers import Run
from torch import Tensor

from manyheads.core.forms import Blocks, Selection

QUERIES = 128  # in a block of queries, of those who have such blocks


def causal(b, h, i, j):
    return j <= i


# ---- lists for blocks of queries ----


def flex(form: Selection, blocks: Blocks, block: int) -> Run:
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.reset()
    mask = block_mask(blocks, block, form.query_block)
    return torch.compile(
        lambda q, k, v: flex_attention(q, k, v, block_mask=mask, enable_gqa=True), dynamic=False, fullgraph=True
    )


def block_mask(blocks: Blocks, block: int, queries: int = QUERIES) -> Any:
    """Own blocks are its partial ones, as they are the last of each list."""
    from torch.nn.attention.flex_attention import BlockMask

    if queries != QUERIES:
        raise ValueError(f"its mask is made here of blocks of {QUERIES} queries alone")
    own = QUERIES // block
    number = blocks.counts - own
    rows = blocks.counts.shape[-1]
    indices = blocks.indices.masked_fill(blocks.indices > rows * own, 0).int()
    wide = torch.nn.functional.pad(indices, (0, rows * own - indices.shape[-1])).contiguous()
    diagonal = torch.zeros_like(wide)
    diagonal[..., :own] = own * torch.arange(rows, device=wide.device)[:, None] + torch.arange(own, device=wide.device)
    partial_number = torch.full_like(number, own).int()
    return BlockMask.from_kv_blocks(
        partial_number, diagonal, number.int().contiguous(), wide, BLOCK_SIZE=(QUERIES, block), mask_mod=causal
    )


def flash4(form: Selection, blocks: Blocks, block: int) -> Run:
    import cutlass.cute as cute  # type: ignore[import-not-found]
    from flash_attn.cute import flash_attn_func  # type: ignore[import-not-found]
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch as Lists  # type: ignore[import-not-found]

    @cute.jit
    def earlier(batch, head, m_idx, n_idx, seqlen_info, aux_tensors):
        return n_idx <= m_idx

    mask = block_mask(blocks, block, form.query_block)
    names = ("num_blocks", "indices")
    forward, backward = (
        Lists(*(getattr(mask, f"{kind}{side}_{name}") for kind in ("", "full_") for name in names),
              block_size=(QUERIES, block))
        for side in ("kv", "q")
    )  # fmt: skip

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        o = flash_attn_func(
            *(t.transpose(1, 2) for t in (q, k, v)), mask_mod=earlier, block_sparse_tensors=forward,
            block_sparse_tensors_bwd=backward,
        )  # fmt: skip
        return (o[0] if isinstance(o, tuple) else o).transpose(1, 2)

    return run if block == QUERIES else torch.no_grad()(run)  # its backward pass takes no other blocks


def flexprefill(form: Selection, blocks: Blocks, block: int) -> Run:
    """Its blocks have as many queries as keys, and its lists are one, of places in the map of blocks."""
    attend = alone("minference", "modules/flexprefill.py").triton_block_wise_prefill_attention
    if form.query_block % block:
        raise ValueError(f"it has blocks of {block} queries, which {form.query_block} are not")
    per = form.query_block // block
    number = per * blocks.indices.shape[2]
    row = torch.arange(number, device=blocks.indices.device)
    indices, counts = (t.repeat_interleave(per, 2) for t in (blocks.indices, blocks.counts))
    listed = torch.arange(indices.shape[-1], device=row.device) < counts[..., None]
    listed &= indices <= row[:, None]
    places = (indices + row[:, None] * number).masked_fill(~listed, number * (number + 1)).flatten(2).sort(-1).values
    places = places[..., : int(listed.sum((-1, -2)).max())].int()

    @torch.no_grad()
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(*(t.transpose(1, 2) for t in (q, k, v)), places, block).transpose(1, 2)

    return run


# ---- lists for single queries, which the heads of a group share ----


def nsa(form: Selection, blocks: Blocks, block: int) -> Run:
    from fla.ops.nsa import parallel_nsa  # type: ignore[import-not-found]

    indices, counts = (t.transpose(1, 2).contiguous() for t in by_query(form, blocks))

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        same_heads(indices.shape[2], k)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return parallel_nsa(q, k, v, block_indices=indices, block_counts=counts, block_size=block).transpose(1, 2)

    return run


def fsa(form: Selection, blocks: Blocks, block: int) -> Run:
    from fsa.ops.FSA_topk_sparse_attention import FSA_topk_sparse_attention  # type: ignore[import-not-found]

    return of_tokens(FSA_topk_sparse_attention, form, blocks, block)


def fsa_nsa(form: Selection, blocks: Blocks, block: int) -> Run:
    from nsa_ref.ops.topk_sparse_attention import topk_sparse_attention  # type: ignore[import-not-found]

    return of_tokens(topk_sparse_attention, form, blocks, block)


def of_tokens(attend: Any, form: Selection, blocks: Blocks, block: int) -> Run:
    indices, _ = by_query(form, blocks)
    chosen = indices[0].int().contiguous()
    ends = torch.tensor([0, chosen.shape[1]], dtype=torch.int32, device=chosen.device)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        same_heads(chosen.shape[0], k)
        q, k, v = (t[0].transpose(0, 1).contiguous() for t in (q, k, v))
        o = attend(q, k, v, chosen, block, ends)
        if o.requires_grad:
            o.register_hook(Tensor.contiguous)  # fsa reads it as if it lay like q
        return o.transpose(0, 1)[None]

    return run


def by_query(form: Selection, blocks: Blocks) -> tuple[Tensor, Tensor]:
    """Blocks [batch, kv_heads, len, n], -1 behind the last, and their number [batch, kv_heads, len]."""
    indices, counts = blocks.indices, blocks.counts
    first = torch.ones(indices.shape[1], dtype=torch.bool, device=indices.device)  # of those with the same lists
    first[1:] = (indices[:, 1:] != indices[:, :-1]).flatten(2).any(-1).any(0)
    indices, counts = (t[:, first].repeat_interleave(form.query_block, 2) for t in (indices, counts))
    listed = torch.arange(indices.shape[-1], device=indices.device) < counts[..., None]
    return indices.masked_fill(~listed, -1), counts


def same_heads(number: int, k: Tensor) -> None:
    if k.shape[1] != number:
        raise ValueError(f"the heads of a group share lists: {number} heads have some here, not {k.shape[1]}")


# ---- MoBA ----


def moba(form: Selection, blocks: Blocks, block: int) -> Run:
    """What follows its choice: queries are copied into the order of the blocks they chose, their own blocks are
    computed apart, and both are merged. Keys and values are repeated for the heads of a group, as its wrapper does."""
    if form.query_block != 1:
        raise ValueError("every query chooses by itself")
    mixed = alone("moba", "moba_efficient.py").MixedAttention
    chosen = blocks.to_map(blocks.counts.shape[2] // block)[0]
    heads, length, number = chosen.shape
    places = torch.arange(length, device=chosen.device)
    chosen = chosen.scatter(2, (places // block).expand(heads, -1)[..., None], False).permute(2, 0, 1).contiguous()
    own = torch.arange(0, length + 1, block, dtype=torch.int32, device=chosen.device)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (t[0].repeat_interleave(heads // t.shape[1], 0) for t in (k, v))
        rows, counts = chosen.view(number, -1).nonzero()[:, 1], chosen.sum(-1).flatten()
        there = counts > 0  # flash attention takes no empty ones
        pieces = torch.stack([t.view(heads, number, block, -1).transpose(0, 1) for t in (k, v)], 3)
        pieces = pieces.flatten(0, 1)[there].flatten(0, 1)[:, :, None]
        q_ends = torch.nn.functional.pad(counts[there].cumsum(0), (1, 0)).int()
        k_ends = torch.arange(q_ends.shape[0], dtype=torch.int32, device=q.device) * block
        copies = q[0].flatten(0, 1).index_select(0, rows)[:, None]
        o = mixed.apply(
            *(t.transpose(0, 1).contiguous() for t in (q[0], k, v)), own, copies, pieces, q_ends, k_ends, length,
            block, rows % length * heads + rows // length,
        )  # fmt: skip
        return o.transpose(0, 1)[None]

    return run


def alone(package: str, file: str) -> Any:
    """A file of a package, without what the package itself would import."""
    found = find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError(f"no package {package}")
    spec = spec_from_file_location(Path(file).stem, Path(found.submodule_search_locations[0]) / file)
    assert spec is not None and spec.loader is not None, "it has a path"
    module = module_from_spec(spec)
    with flash2():
        spec.loader.exec_module(module)
    return module


@contextmanager
def flash2() -> Iterator[None]:
    """The functions of flash_attn 2.6 that MoBA calls, which later ones changed, by the kernels of it that torch has.
    Theirs were asked for the same gradients every time, which costs; these are not."""
    aten = torch.ops.aten

    def forward(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, **_):
        ends = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        o, lse, *_ = aten._flash_attention_forward(q, k, v, *ends, 0.0, causal, False, scale=softmax_scale)
        return None, None, None, None, o, lse, None, None

    def backward(
        dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal,
        **_,
    ):  # fmt: skip
        ends = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        seeds = torch.empty(2, dtype=torch.uint64, device=q.device), torch.empty(0, device=q.device)  # of a dropout
        grads = aten._flash_attention_backward(
            dout, q, k, v, out, softmax_lse, *ends, 0.0, causal, *seeds, scale=softmax_scale
        )
        return *grads, None

    package, interface = ModuleType("flash_attn"), ModuleType("flash_attn.flash_attn_interface")
    package.flash_attn_func = package.flash_attn_varlen_func = None  # type: ignore[attr-defined]  not called
    interface._flash_attn_varlen_forward, interface._flash_attn_varlen_backward = forward, backward  # type: ignore[attr-defined]
    mine = {package.__name__: package, interface.__name__: interface}
    before = {name: sys.modules.get(name) for name in mine}
    sys.modules.update(mine)
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


PEERS = {
    "flex": flex, "flash4": flash4, "flexprefill": flexprefill, "nsa": nsa, "fsa": fsa, "fsa_nsa": fsa_nsa,
    "moba": moba,
}  # fmt: skip
