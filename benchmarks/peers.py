"""Who is timed: ours, and the peers that are installed. Each gives what runs a case, or None if it cannot."""

from __future__ import annotations

from collections.abc import Callable

import torch
from cases import CAP, WINDOW, Case, Shape
from torch import Tensor

from manyheads import attention

Run = Callable[[Tensor, Tensor, Tensor], Tensor]  # q, k, v [batch, heads, length, head_dim] -> o


def ours(name: str, case: Case, shape: Shape) -> Run | None:
    seed = 0 if case.dropout else None

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, case.form, engine="triton", dropout=case.dropout, seed=seed, **case.operands)

    return run


def flex(name: str, case: Case, shape: Shape) -> Run | None:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if case.form.normaliser != "softmax" or case.dropout:
        return None
    torch._dynamo.reset()  # beyond eight masks in a process it falls back to something else
    n, mask, score, sink = shape.length, case.form.mask, case.form.score, case.operands.get("sink")
    blocks = None if mask is None else create_block_mask(mask, None, None, n, n, device="cuda", _compile=n > 16 * 1024)
    grouped = shape.heads != shape.kv_heads

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if sink is None:
            return flex_attention(q, k, v, score_mod=score, block_mask=blocks, enable_gqa=grouped)
        o, lse = flex_attention(q, k, v, score_mod=score, block_mask=blocks, enable_gqa=grouped, return_lse=True)
        return o * torch.sigmoid(lse - sink[:, None])[..., None].to(o.dtype)

    return torch.compile(attend, dynamic=False, fullgraph=True)


def sdpa(backend: str) -> Callable[[str, Case, Shape], Run | None]:
    def make(name: str, case: Case, shape: Shape) -> Run | None:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        if name not in ("full", "causal"):
            return None
        grouped = shape.heads != shape.kv_heads

        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(getattr(SDPBackend, backend)):
                return torch.nn.functional.scaled_dot_product_attention(
                    q, k, v, is_causal=name == "causal", enable_gqa=grouped
                )

        return run

    return make


def flash3(name: str, case: Case, shape: Shape) -> Run | None:
    """Forward only."""
    if name not in ("full", "causal", "window"):
        return None
    from flash_attn_interface import flash_attn_func  # type: ignore[import-not-found]

    size = (WINDOW - 1, 0) if name == "window" else (-1, -1)

    @torch.no_grad()
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        o = flash_attn_func(*(t.transpose(1, 2) for t in (q, k, v)), causal=name != "full", window_size=size)
        return (o[0] if isinstance(o, tuple) else o).transpose(1, 2)

    return run


def flash4(name: str, case: Case, shape: Shape) -> Run | None:
    if name not in ("full", "causal", "window", "softcap", "window_softcap"):
        return None
    from flash_attn.cute import flash_attn_func  # type: ignore[import-not-found]

    size = (WINDOW - 1, 0) if "window" in name else (None, None)
    cap = CAP if "softcap" in name else 0.0

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        o = flash_attn_func(
            *(t.transpose(1, 2) for t in (q, k, v)), causal=name != "full", window_size=size, softcap=cap
        )
        return (o[0] if isinstance(o, tuple) else o).transpose(1, 2)

    return run


PEERS: dict[str, Callable[[str, Case, Shape], Run | None]] = {
    "ours": ours, "flex": flex, "cudnn": sdpa("CUDNN_ATTENTION"), "flash2": sdpa("FLASH_ATTENTION"), "flash3": flash3,
    "flash4": flash4,
}  # fmt: skip
