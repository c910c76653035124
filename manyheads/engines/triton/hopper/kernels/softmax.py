"""The softmax of the forward pass, tile after tile: what a weight is 2 to the power of, weights and their sum, and how
what was before fades."""

from __future__ import annotations

from manyheads.engines.triton.hopper.kernels.common import LN2, LOG2E, NONE, SIGNED
from manyheads.engines.triton.hopper.kernels.dropping import dropped, kept
from manyheads.engines.triton.hopper.names import gl, gluon


@gluon.jit
def shifted(s, m, factor, NORMALISER: gl.constexpr):
    """What a weight is 2 to the power of, how the sum so far fades, and the largest score. A row that has seen nothing
    yet keeps m = -inf, and weights of 0, not NaN."""
    if NORMALISER == NONE:
        return s, m, m
    else:
        size = s
        if NORMALISER == SIGNED:
            size = gl.where(s == float("-inf"), s, gl.abs(s))
        top = gl.maximum(m, gl.max(size, 1) * factor)
        safe = gl.where(top == float("-inf"), 0.0, top)
        return size * factor - safe[:, None], gl.exp2(m - safe), top


@gluon.jit
def weighed(power, s, fade, l, i, j, low, high, threshold, inflation, NORMALISER: gl.constexpr):
    """The weights after dropout, and the sum of their sizes before it so far."""
    p = power
    if NORMALISER != NONE:
        p = gl.exp2(power)
        l = l * fade + gl.sum(p, 1)
        if NORMALISER == SIGNED:
            p = gl.where(s > 0.0, p, gl.where(s < 0.0, -p, 0.0))
    if threshold is not None:
        p = dropped(p, kept(low, high, i, j, threshold), inflation)
    return p, l


@gluon.jit
def faded(o, fade, NORMALISER: gl.constexpr):
    if NORMALISER == NONE:
        return o
    else:
        return o * gl.convert_layout(fade, gl.SliceLayout(1, o.type.layout))[:, None]


@gluon.jit
def finished(o, m, l, sink, h, NORMALISER: gl.constexpr):
    """o divided by the sum of the weights, and the natural lse."""
    if NORMALISER == NONE:
        return o, gl.full(m.shape, 0.0, gl.float32, m.type.layout)
    else:
        kept = gl.full(m.shape, 1.0, gl.float32, m.type.layout)
        if sink is not None:  # one more score, whose value is zero
            level = gl.load(sink + h) * LOG2E
            top = gl.maximum(m, level)
            kept = gl.exp2(m - top)
            l = l * kept + gl.exp2(level - top)
            m = top
        inverse = gl.where(l > 0.0, kept / l, 0.0)
        lse = gl.where(l > 0.0, (m + gl.log2(l)) * LN2, float("-inf"))
        return o * gl.convert_layout(inverse, gl.SliceLayout(1, o.type.layout))[:, None], lse
