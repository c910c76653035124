"""Audio Mamba (AuM): Mamba that reads a spectrogram's tokens from both ends.

    [x, z] = W_in u,   out = W_out (y * silu(z)),   y from one or two selective scans:
    x <- silu(conv(x)),   h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T,   y_t = h_t C_t + D x_t,   dt, B, C from x

    fo-fo: one scan, forward: Mamba
    fo-bi: the forward convolution, B, C, dt and D, scanned both ways, each with its own A
    bi-bi: the row and its reverse, each with its own convolution and all behind it; the mean of the two (ViM)

The released base model is fo-bi, the small one bi-bi. Patches, positions, the norm and residual around this, and the
class token, which stands in the middle of the row, are the model's. Parameters have the names of the authors' code and
start as there, but for those of the second direction and those that are in a part of their own.

Erol, Senocak, Feng, Chung. "Audio Mamba: Bidirectional State Space Model for Audio Representation Learning." 2024.
arXiv:2406.03344. Equations as in the released code (kaistmm/Audio-Mamba-AuM).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.core.layer import layer
from manyheads.core.names import unknown
from manyheads.core.plain import selected
from manyheads.core.scans import SelectiveState
from manyheads.nn import from_front, positions_of, to_front

VARIANTS = ("fo-fo", "fo-bi", "bi-bi")


def reference(module, x):
    rows = []
    for row in x:
        u, z = (row @ module.in_proj.weight.T).chunk(2, -1)
        forth = ((module.forth.A_log, False),)
        if module.variant == "fo-fo":
            y = selected(module.forth, u, forth)
        elif module.variant == "fo-bi":
            y = selected(module.forth, u, (*forth, (module.A_log_back, True)))
        else:
            back = selected(module.back, u.flip(0), ((module.back.A_log, False),))
            y = (selected(module.forth, u, forth) + back.flip(0)) / 2
        rows.append((y * z * torch.sigmoid(z)) @ module.out_proj.weight.T)
    return torch.stack(rows)


def two_ways_without_a_convolution():
    """Where convolutions see their own token alone, fo-bi and bi-bi with the same numbers both ways are the same."""
    one, other = (AudioMamba(6, variant=v, state_dim=4, conv_size=1) for v in ("fo-bi", "bi-bi"))
    other.forth.load_state_dict(one.forth.state_dict())
    other.back.load_state_dict({**one.forth.state_dict(), "A_log": one.A_log_back})
    other.in_proj = one.in_proj
    with torch.no_grad():
        other.out_proj.weight.copy_(2 * one.out_proj.weight)
    return one, other


def weights(dim, variant="fo-bi", expand=2, state_dim=16, conv_size=4, dt_rank=None):
    inner, rank = expand * dim, dt_rank or -(-dim // 16)
    direction = inner * (conv_size + 1 + rank + 2 * state_dim + rank + 1 + state_dim + 1)
    more = {"fo-fo": 0, "fo-bi": inner * state_dim, "bi-bi": direction}[variant]
    return 3 * inner * dim + direction + more


@layer(
    reference=reference,
    arxiv="2406.03344",
    system="audio-mamba-aum",
    examples=(
        {"dim": 6, "state_dim": 4, "conv_size": 3},
        {"dim": 6, "variant": "bi-bi", "expand": 1, "state_dim": 3, "dt_rank": 2},
    ),
    laws=(two_ways_without_a_convolution,),
    weights=weights,
    causal=False,
)
class AudioMamba(nn.Module):
    """variant: "fo-fo" (causal), "fo-bi" or "bi-bi". `expand` * dim channels, each with a state of `state_dim` numbers;
    dt_rank: None for dim / 16, rounded up."""

    def __init__(
        self, dim: int, *, variant: str = "fo-bi", expand: int = 2, state_dim: int = 16, conv_size: int = 4,
        dt_rank: int | None = None,
    ):  # fmt: skip
        super().__init__()
        if variant not in VARIANTS:
            raise ValueError(unknown("variant", variant, VARIANTS))
        self.dim, self.variant = dim, variant
        inner, rank = expand * dim, dt_rank or -(-dim // 16)
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False)
        self.forth = SelectiveState(inner, state_dim=state_dim, conv_size=conv_size, dt_rank=rank)
        if variant == "bi-bi":
            self.back = SelectiveState(inner, state_dim=state_dim, conv_size=conv_size, dt_rank=rank)
        if variant == "fo-bi":
            self.A_log_back = nn.Parameter(self.forth.A_log.detach().clone())
        self.out_proj = nn.Linear(inner, dim, bias=False)

    def forward(self, x: Tensor, *, present: Tensor | None = None) -> Tensor:
        """x [batch, len, dim]; present: bool [batch, len], False where a row is padding. Returns [batch, len, dim]."""
        positions, n = positions_of(x, present, self.dim), x.shape[1]
        # A row's tokens come first, zeros behind them: the way back starts with those, and they write nothing.
        there = None if present is None else torch.arange(n, device=x.device) < present.sum(1, keepdim=True)
        u, z = self.in_proj(to_front(x, positions, n)).chunk(2, -1)
        chosen = self.forth.choose(u)
        y = self.forth.scan(*chosen, self.forth.A_log)
        if self.variant == "fo-bi":
            y = y + _backwards(self.forth, tuple(t.flip(1) for t in chosen), there, self.A_log_back)
        elif self.variant == "bi-bi":
            y = (y + _backwards(self.back, self.back.choose(u.flip(1)), there, self.back.A_log)) / 2
        return from_front(self.out_proj(y * F.silu(z)), positions, n)


def _backwards(own: SelectiveState, chosen: tuple[Tensor, ...], there: Tensor | None, A_log: Tensor) -> Tensor:
    """The scan of what was chosen from the last token on; its outputs in the order of the row."""
    u, dt, b, c = chosen
    if there is not None:
        dt = dt.masked_fill(~there.flip(1)[..., None], 0.0)
    return own.scan(u, dt, b, c, A_log).flip(1)
