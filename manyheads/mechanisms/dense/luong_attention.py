"""Luong attention: a decoder's state scores the encoder's, everywhere or in a window around one place.

    o_i = sum_{j in W_i} softmax_{j in W_i}(score(q_i, k_j)) G_ij v_j
    score = q.k (dot), q^T w k (general), u . tanh(w q + w_key k) (concat), (w q)_j (location)

    global:     W_i = every j,  G = 1
    monotonic:  W_i = {|j - p_i| <= D},  p_i = i,  G = 1
    predictive: the same with p_i = S sigmoid(u_p . tanh(w_p q_i)),  G_ij = exp(-(j - p_i)^2 / (2 (D / 2)^2))

with S the number of keys, j counted from 0 and nothing divided by sqrt(d). The paper has one head. Its window is around
the real p_i, where the authors' code rounds p_i down first.

Luong, Pham, Manning. "Effective Approaches to Attention-based Neural Machine Translation." 2015. arXiv:1508.04025.
Parameters start as the paper's do, but for general scores, which start as dot scores.
"""

import torch

from manyheads.core import Function, Law, Operand, Scores, mechanism, one
from manyheads.core.maps import read, score_map
from manyheads.core.names import unknown

PLACES = ("global", "monotonic", "predictive")


def reference(
    q, k, v, *, score="dot", where="global", reach=10, longest=50, w=None, w_key=None, u=None, w_p=None, u_p=None
):  # fmt: skip
    n, out = k.shape[-2], []
    for i in range(q.shape[-2]):
        x = q[..., i, :]
        if score == "dot":
            s = (x[..., None, :] * k).sum(-1)
        elif score == "general":
            s = torch.einsum("bhd,hde,bhje->bhj", x, w, k)
        elif score == "concat":
            mixed = torch.einsum("hed,bhd->bhe", w, x)[..., None, :] + torch.einsum("hed,bhjd->bhje", w_key, k)
            s = torch.einsum("he,bhje->bhj", u, torch.tanh(mixed))
        else:
            s = torch.einsum("hjd,bhd->bhj", w, x)[..., :n]
        j, p = torch.arange(n), torch.tensor(n - q.shape[-2] + i)
        if where == "predictive":
            hidden = torch.tanh(torch.einsum("hed,bhd->bhe", w_p, x))
            p = n * torch.sigmoid(torch.einsum("he,bhe->bh", u_p, hidden))[..., None]
        inside = (j - p).abs() <= reach if where != "global" else torch.tensor(True)
        weights = torch.softmax(s.where(inside, -torch.inf), -1).nan_to_num(0.0)  # nothing inside gives zeros
        if where == "predictive":
            weights = weights * torch.exp(-((j - p) ** 2) / (2 * (reach / 2) ** 2))
        out.append(weights[..., None, :] @ v)
    return torch.cat(out, -2)


def small(x):
    return x.uniform_(-0.1, 0.1)


def identity(w):
    return w.copy_(torch.eye(w.shape[-1], dtype=w.dtype, device=w.device).expand_as(w))


SQUARE, VECTOR = Operand("heads head_dim head_dim", init=small), Operand("heads head_dim", init=small)
OPERANDS = {
    "dot": {},
    "general": {"w": Operand("heads head_dim head_dim", init=identity)},
    "concat": {"w": SQUARE, "w_key": SQUARE, "u": VECTOR},
}


@mechanism(
    reference=reference,
    arxiv="1508.04025",
    system="luong-attention",
    examples=(
        {}, {"where": "monotonic", "reach": 2}, {"where": "predictive", "reach": 3}, {"score": "general"},
        {"score": "general", "where": "monotonic", "reach": 3}, {"score": "concat"},
        {"score": "concat", "where": "predictive", "reach": 2}, {"score": "location", "longest": 30},
    ),
    laws=(
        Law({"score": "general"}, "luong_attention"),
        Law({"where": "monotonic", "reach": 17}, "luong_attention"),
        Law({"score": "general", "where": "monotonic", "reach": 2}, "luong_attention",
            {"where": "monotonic", "reach": 2}),
    ),
    causal=False,
    trained=True,
    tolerance=2.0,
    tolerance_reason="scores that nothing divides by sqrt(d) reach tens, where the order of a sum moves more digits",
)  # fmt: skip
def luong_attention(
    score: str = "dot", where: str = "global", reach: int = 10, longest: int = 50
) -> Scores | Function:  # fmt: skip
    """`score` and `where` as above; `reach` is D; location scores have a weight for each of the `longest` places."""
    kinds = (*OPERANDS, "location")
    if score not in kinds:
        raise ValueError(unknown("score", score, kinds))
    if where not in PLACES:
        raise ValueError(unknown("place to look", where, PLACES))
    if score == "dot" and where != "predictive":
        window = None if where == "global" else lambda b, h, i, j: abs(i - j) <= reach
        return Scores(mask=window, default_scale=one)
    own = OPERANDS.get(score, {"w": Operand(f"heads {longest} head_dim", init=small)})
    around = {"w_p": SQUARE, "u_p": VECTOR} if where == "predictive" else {}

    def forward(q, k, v, *, scale, **given):
        n, q_len, wide = k.shape[2], q.shape[2], torch.promote_types(q.dtype, torch.float32)
        if score == "location" and n > longest:
            raise ValueError(f"luong_attention has weights for {longest} places (longest), not for {n}")
        given = {name: parameter.to(wide) for name, parameter in given.items()}
        s = scale * scores(score, q.to(wide), k.to(wide), given)
        if where == "global":
            return read(s.softmax(-1), v)
        j = torch.arange(n, device=q.device)
        p = torch.arange(n - q_len, n, device=q.device)[:, None]
        if where == "predictive":
            p = n * torch.sigmoid(torch.tanh(q.to(wide) @ given["w_p"].mT) @ given["u_p"][..., None])
        outside = (j - p).abs() > reach
        # The lowest number, not -inf: a query far from every key would be NaN; it sees nothing instead.
        weights = s.masked_fill(outside, torch.finfo(s.dtype).min).softmax(-1).masked_fill(outside, 0.0)
        near = torch.exp(-(j - p).square() / (reach * reach / 2)) if where == "predictive" else 1.0
        return read(weights * near, v)

    return Function(forward=forward, operands={**own, **around}, default_scale=one)


def scores(kind, q, k, given):
    """[batch, heads, q_len, kv_len], before any scale."""
    if kind == "dot":
        return score_map(q, k, 1.0)
    if kind == "general":
        return score_map(q @ given["w"], k, 1.0)
    if kind == "location":
        return q @ given["w"][:, : k.shape[2]].mT
    offered = k.repeat_interleave(q.shape[1] // k.shape[1], 1) @ given["w_key"].mT
    pairs = torch.tanh((q @ given["w"].mT)[:, :, :, None] + offered[:, :, None])
    return (pairs @ given["u"][:, None, :, None]).squeeze(-1)
