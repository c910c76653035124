"""Plain torch: every form, any device, float64, gradients. The oracle of the other engines.

Memory is linear in length where the form allows: scores are computed a chunk of queries at a time and, under autograd,
computed again in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from manyheads.core.dropout import Dropout
from manyheads.core.eagerly import eagerly
from manyheads.core.entmax import entmax
from manyheads.core.forms import Form, Function, Recurrence, Scores, Selection, Sum
from manyheads.core.inputs import Inputs
from manyheads.core.recurrence import LEAST_DECAY, recur, to_heads
from manyheads.core.rows import unseen
from manyheads.core.sums import summed
from manyheads.core.tiling import Chunk, chunks, position_operands, score


def why_not(form: Form, x: Inputs, lse: bool = False) -> str | None:
    return None


def hesitates(form: Form, x: Inputs) -> str | None:
    return None


def run(form: Form, x: Inputs) -> tuple[Tensor, Tensor | None]:
    match form:
        case Scores() | Selection():
            return (COMPILED if torch.compiler.is_compiling() else _scores)(form, x)
        case Recurrence():
            return _recurrence(form, x)
        case Sum():
            return summed(form, x, run)
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


COMPILED = eagerly("eager", _scores)


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
    if form.top_k is not None:
        s = s.masked_fill(s < kth_largest(s.detach(), form.top_k), -torch.inf)
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
    lse = torch.where(seen, top + divisor.log(), -torch.inf).squeeze(-1)
    return p / divisor, lse if form.has_lse else torch.zeros_like(lse)


def kth_largest(s: Tensor, k: int) -> Tensor:
    """Of each row of scores [..., n], with 1 in place of n: -inf if it has less than k."""
    return s.topk(min(k, s.shape[-1])).values[..., -1:]


# ---- recurrences ----


def _recurrence(form: Recurrence, x: Inputs) -> tuple[Tensor, Tensor]:
    """Nothing but o is rounded, in float16 and bfloat16."""
    wide = torch.promote_types(x.q.dtype, torch.float32)
    operands = {name: t.to(wide) for name, t in x.operands.items()}
    state = None if x.state is None else x.state.to(wide)
    widened = x.with_(q=x.q.to(wide), k=x.k.to(wide), v=x.v.to(wide), operands=operands, state=state)
    o, end = recur(form, widened, partial(_scan, _step), partial(_scan, _step_by_value))
    return o.to(x.q.dtype), end


def _scan(
    step: Callable[..., tuple[Tensor, Tensor]], q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor | None,
    state: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Chunk by chunk; within a chunk only differences of log decays are exponentiated, so nothing overflows."""
    ahead = k.shape[2] - q.shape[2]
    k, v = to_heads(k, q.shape[1]), to_heads(v, q.shape[1])
    q = torch.nn.functional.pad(q * scale, (0, 0, ahead, 0))  # the queries are the last ones: read those alone
    g = None if g is None else (g if g.ndim == 4 else g[..., None]).clamp(min=LEAST_DECAY)
    state = q.new_zeros(*q.shape[:2], k.shape[3], v.shape[3]) if state is None else state
    outputs = []
    size = 16 if g is not None and g.shape[3] > 1 else 64  # a vector decay holds size x size x channels numbers
    for start in range(0, k.shape[2], size):
        cut = slice(start, start + size)
        o, state = step(
            q[:, :, cut], k[:, :, cut], v[:, :, cut], None if g is None else g[:, :, cut],
            None if beta is None else beta[:, :, cut, None], state,
        )  # fmt: skip
        outputs.append(o)
    return torch.cat(outputs, 2)[:, :, ahead:] if outputs else q @ state, state


def _step(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One chunk: outputs and the state after it. g [batch, heads, size, 1 | head_dim], beta [batch, heads, size, 1]."""
    total, fade = (None, None) if g is None else _fading(g)

    def products(a: Tensor) -> Tensor:
        if fade is None or fade.shape[-1] == 1:
            return a @ k.mT if fade is None else (a @ k.mT) * fade[..., 0]
        return torch.einsum("bhic,bhjc,bhijc->bhij", a, k, fade)

    arrived, gone = (1.0, 1.0) if total is None else (total.exp(), (total[:, :, -1:] - total).exp())
    if beta is not None:
        # u_i = beta_i (v_i - S'^T k_i): each correction sees the ones before it, a unit lower triangular system. What
        # stands on the diagonal and above it is not read.
        known = beta * (v - k * arrived @ state)
        v = torch.linalg.solve_triangular(beta * products(k), known, upper=False, unitriangular=True)
    o = q * arrived @ state + products(q).tril() @ v
    kept = state if total is None else state * total[:, :, -1, :, None].exp()
    return o, kept + (k * gone).mT @ v


def _step_by_value(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: None, state: Tensor) -> tuple[Tensor, Tensor]:
    """The same where channels of the values decay: g [batch, heads, size, v_head_dim]."""
    total, fade = _fading(g)
    o = (q @ state) * total.exp() + torch.einsum("bhij,bhjc,bhijc->bhic", (q @ k.mT).tril(), v, fade)
    last = total[:, :, -1:]
    return o, state * last.exp() + k.mT @ (v * (last - total).exp())


def _fading(g: Tensor) -> tuple[Tensor, Tensor]:
    """What is left, in logarithms, at each token of what was there before the chunk, and [batch, heads, i, j, channels]
    at token i of what j wrote, for j <= i."""
    total = g.cumsum(2)
    causal = torch.ones(g.shape[2], g.shape[2], dtype=torch.bool, device=g.device).tril()
    return total, (total[:, :, :, None] - total[:, :, None]).masked_fill(~causal[..., None], 0.0).exp()
