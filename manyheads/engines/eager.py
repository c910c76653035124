"""Plain torch: every form, any device, float64, gradients. The oracle of the other engines.

Memory is linear in length where the form allows: scores are computed a chunk of queries at a time and, under autograd,
computed again in the backward pass.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from manyheads.core.dropout import Dropout
from manyheads.core.entmax import entmax
from manyheads.core.forms import Form, Function, Recurrence, Scores, Selection, Sum
from manyheads.core.inputs import Inputs, Positions, as_rows
from manyheads.core.rows import unseen
from manyheads.core.tiling import Chunk, chunks, position_operands, score


def why_not(form: Form, x: Inputs, lse: bool = False) -> str | None:
    return None


def hesitates(form: Form, x: Inputs) -> str | None:
    return None


def run(form: Form, x: Inputs) -> tuple[Tensor, Tensor | None]:
    match form:
        case Scores() | Selection():
            return _scores(form, x)
        case Recurrence():
            return _recurrence(form, x)
        case Sum():
            return _sum(form, x), None
        case Function() if not x.q_len or not x.kv_len:
            return x.nothing(), None
        case Function():
            return form.forward(x.q, x.k, x.v, scale=x.scale, **x.operands), None
    raise TypeError(f"eager has no way to run a {type(form).__name__}")


# ---- scores ----


def _scores(form: Scores | Selection, x: Inputs) -> tuple[Tensor, Tensor]:
    inner = form.scores if isinstance(form, Selection) else form
    operands = position_operands(inner, x)
    sink = None if inner.sink is None else x.operands[inner.sink]
    alpha = x.operands[inner.alpha] if isinstance(inner.alpha, str) else inner.alpha
    o = x.q.new_zeros(x.batch, x.heads, x.q_len, x.v_head_dim)
    lse = unseen(form, x)
    again = x.wants_grad
    rows, parts = [], []
    for chunk in chunks(form, x):
        args = (
            inner, x.q[:, :, chunk.rows], chunk.pick(x.k), chunk.pick(x.v), x.scale, chunk, operands, sink, alpha,
            x.dropout,
        )  # fmt: skip
        part = checkpoint(_attend, *args, use_reentrant=False) if again else _attend(*args)
        rows.append(chunk.rows)
        parts.append(part)
    if not parts:
        return x.nothing(), lse
    if again or len(parts) == 1:
        return _assemble(o, rows, [p[0] for p in parts], 2), _assemble(lse, rows, [p[1] for p in parts], 2)
    lse = lse.clone()
    for at, (o_part, lse_part) in zip(rows, parts, strict=True):
        o[:, :, at], lse[:, :, at] = o_part, lse_part
    return o, lse


def _assemble(empty: Tensor, rows: list[slice], parts: list[Tensor], dim: int) -> Tensor:
    """The parts in their rows, `empty` between them."""
    pieces, end = [], 0
    for at, part in zip(rows, parts, strict=True):
        pieces += [empty.narrow(dim, end, at.start - end), part]
        end = at.stop
    pieces.append(empty.narrow(dim, end, empty.shape[dim] - end))
    return torch.cat([p for p in pieces if p.shape[dim]], dim) if len(parts) > 1 or end else empty


def _attend(
    form: Scores, q: Tensor, k: Tensor, v: Tensor, scale: float, chunk: Chunk, operands: dict[str, Tensor],
    sink: Tensor | None, alpha: Tensor | float | None, dropout: Dropout | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(o, lse) of one chunk. Grouped heads share k and v without repeating them."""
    batch, heads, rows, _ = q.shape
    kv_heads = k.shape[1]
    wide = torch.promote_types(q.dtype, torch.float32)
    grouped = q.to(wide).reshape(batch, kv_heads, heads // kv_heads * rows, -1)
    s = (grouped @ k.to(wide).mT).view(batch, heads, rows, -1) * scale
    weights, lse = _weights(form, score(form, s, chunk, operands), chunk.allowed, sink, alpha)
    if dropout is not None:
        weights = dropout.drop(weights, chunk.i, chunk.j)
    o = weights.view(batch, kv_heads, heads // kv_heads * rows, -1) @ v.to(wide)
    return o.view(batch, heads, rows, -1).to(q.dtype), lse


def _weights(
    form: Scores, s: Tensor, allowed: Tensor | None, sink: Tensor | None, alpha: Tensor | float | None
) -> tuple[Tensor, Tensor]:
    """What multiplies the values, and the lse, from scores [batch, heads, rows, columns]."""
    if form.normaliser == "none":
        return s if allowed is None else s.masked_fill(~allowed, 0.0), s.new_zeros(s.shape[:-1])
    sign = s.sign() if form.normaliser == "signed" else None
    if sign is not None:
        s = s.abs()
    if allowed is not None:
        s = s.masked_fill(~allowed, -torch.inf)
    if alpha is not None:
        at_heads = alpha.to(s.dtype)[:, None, None] if isinstance(alpha, Tensor) else alpha
        return entmax(s, at_heads), s.new_zeros(s.shape[:-1])
    top = s.detach().amax(-1, keepdim=True)
    if sink is not None:
        sink = sink.to(s.dtype)[:, None, None]
        top = torch.maximum(top, sink.detach())
    top = torch.where(top.isneginf(), 0.0, top)
    p = (s - top).exp()
    total = p.sum(-1, keepdim=True)
    if sink is not None:
        total = total + (sink - top).exp()
    seen = total > 0
    divisor = torch.where(seen, total, 1.0)
    if sign is not None:
        p = p * sign
    return p / divisor, torch.where(seen, top + divisor.log(), -torch.inf).squeeze(-1)


# ---- recurrences ----


def _recurrence(form: Recurrence, x: Inputs) -> tuple[Tensor, Tensor]:
    """Chunk by chunk; within a chunk only differences of log decays are exponentiated, so nothing overflows."""
    wide = torch.promote_types(x.q.dtype, torch.float32)
    asks, here = _present(x.q_positions, x), _present(x.kv_positions, x)
    # Absent tokens may hold anything, and a feature may make infinity of it, or NaN.
    q, k, v = _zeroed(x.q.to(wide), asks), _zeroed(x.k.to(wide), here), _zeroed(x.v.to(wide), here)
    q = form.query_feature(q) * x.scale
    k, v = _to_heads(k, x.heads), _to_heads(v, x.heads)
    if not form.causal:
        return _reduce(form, q, k, v, here, asks, x)
    k = _zeroed(form.key_feature(k), here)  # an absent token writes nothing and lets nothing decay
    q = torch.nn.functional.pad(q, (0, 0, x.kv_len - x.q_len, 0))  # the queries are the last ones: read those alone
    g, beta = _decay(form, x, wide), x.operands.get("beta")
    g = None if g is None else _zeroed(g, here)
    outputs = []
    state = x.state.to(wide) if x.state is not None else q.new_zeros(x.batch, x.heads, k.shape[-1], x.v_head_dim)
    size = 16 if g is not None and g.shape[-1] > 1 else 64  # a vector decay holds size x size x head_dim numbers
    for start in range(0, x.kv_len, size):
        cut = slice(start, start + size)
        o, state = _step(
            q[:, :, cut], k[:, :, cut], v[:, :, cut],
            None if g is None else g[:, :, cut].expand(x.batch, -1, -1, -1),
            None if beta is None else beta[:, :, cut, None].to(wide), state, form.write,
        )  # fmt: skip
        outputs.append(o)
    if not outputs:
        return x.nothing(), state
    o = torch.cat(outputs, 2)[:, :, x.kv_len - x.q_len :]
    return _zeroed(o, asks).to(x.q.dtype), state


def _step(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor | None, state: Tensor, write: str
) -> tuple[Tensor, Tensor]:
    """One chunk: outputs and the state after it. g [batch, heads, size, 1 | head_dim] or None."""
    size = q.shape[2]
    causal = torch.ones(size, size, dtype=torch.bool, device=q.device).tril()
    if g is None:
        total, gone = None, k
        inner, keys = q @ k.mT, k @ k.mT
        q_in, k_in = q, k
    else:
        total = g.cumsum(2)
        apart = total[:, :, :, None] - total[:, :, None, :]  # [batch, heads, i, j, 1 | head_dim]
        fade = apart.masked_fill(~causal[..., None], 0.0).exp()
        if g.shape[-1] == 1:
            inner, keys = (q @ k.mT) * fade[..., 0], (k @ k.mT) * fade[..., 0]
        else:
            inner = torch.einsum("bhic,bhjc,bhijc->bhij", q, k, fade)
            keys = torch.einsum("bhic,bhjc,bhijc->bhij", k, k, fade)
        q_in, k_in = q * total.exp(), k * total.exp()
        gone = k * (total[:, :, -1:] - total).exp()
    if write == "delta":
        assert beta is not None, "a delta rule declares beta"
        # u_i = beta_i (v_i - S'^T k_i): each correction sees the ones before it, a unit lower triangular system.
        known = beta * (v - k_in @ state)
        lower = (beta * keys).tril(-1) + torch.eye(size, dtype=q.dtype, device=q.device)
        v = torch.linalg.solve_triangular(lower, known, upper=False, unitriangular=True)
    o = q_in @ state + inner.masked_fill(~causal, 0.0) @ v
    kept = state if total is None else state * total[:, :, -1, :, None].exp()
    return o, kept + gone.mT @ v


def _reduce(
    form: Recurrence, q: Tensor, k: Tensor, v: Tensor, here: Tensor | None, asks: Tensor | None, x: Inputs
) -> tuple[Tensor, Tensor]:
    """Not causal: one state for all queries."""
    if form.key_softmax:
        k = k.softmax(2) if here is None else k.masked_fill(~here, -torch.inf).softmax(2).nan_to_num(0.0)
    state = _zeroed(form.key_feature(k), here).mT @ v
    return _zeroed(q @ state, asks).to(x.q.dtype), state


def _to_heads(x: Tensor, heads: int) -> Tensor:
    """Grouped heads side by side: a state belongs to each query head."""
    return x.repeat_interleave(heads // x.shape[1], 1) if x.shape[1] != heads else x


def _present(positions: Positions, x: Inputs) -> Tensor | None:
    """bool [batch | 1, 1, len, 1], where a token is, or None if all are."""
    return None if not isinstance(positions, Tensor) else (as_rows(positions, x.q.device) >= 0)[:, None, :, None]


def _zeroed(t: Tensor, here: Tensor | None) -> Tensor:
    return t if here is None else torch.where(here, t, 0.0)


def _decay(form: Recurrence, x: Inputs, wide: torch.dtype) -> Tensor | None:
    """Log decay [batch | 1, heads, len, 1 | head_dim], the constant and the operand's together."""
    g = x.operands.get("g")
    total = None if g is None else g.to(wide) if g.ndim == 4 else g[..., None].to(wide)
    if form.decay is not None:
        h = torch.arange(x.heads, device=x.q.device)
        constant = form.decay(h, x.heads).to(wide)[None, :, None, None].expand(1, -1, x.kv_len, 1)
        total = constant if total is None else total + constant
    return total


# ---- sums ----


def _sum(form: Sum, x: Inputs) -> Tensor:
    total = None
    for part, gate in zip(form.parts, form.gates, strict=True):
        own = {name: x.operands[name] for name in part.operands}
        scale = x.scale / form.default_scale(x.q.shape[3]) * part.default_scale(x.q.shape[3])
        o, _ = run(part, x.with_(operands=own, scale=scale))
        if gate is not None:  # the queries' own gates: queries are a row's last tokens
            o = o * x.operands[gate][:, :, x.kv_len - x.q_len :, None].to(o.dtype)
        total = o if total is None else total + o
    if total is None:
        raise ValueError("a Sum needs at least one part")
    return total
