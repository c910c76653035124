"""Weights again from scores, and how a gradient goes through them. With p the weights and dp = dO V^T, the score's
gradient is p (dp - delta) times the derivative of the score function."""

from __future__ import annotations

from manyheads.engines.triton.hopper.kernels.common import ENDS, LOG2E, NONE, SIGNED, branch
from manyheads.engines.triton.hopper.names import gl, gluon


@gluon.jit
def weights(
    s, top, b, h, i, j, inside, partial, scale, A,
    SCORE: gl.constexpr, DSCORE: gl.constexpr, MASK: gl.constexpr, MASKED: gl.constexpr, NORMALISER: gl.constexpr,
):  # fmt: skip
    """The weights, and what (dp - delta) is multiplied with for the gradient of the product s."""
    changed = s * scale
    if SCORE is not None:
        changed = SCORE(changed, b, h, i, j, A)
    if NORMALISER == NONE:
        weight = changed
        slope = gl.full(s.shape, 1.0, gl.float32, s.type.layout)
    else:
        if SCORE is None and NORMALISER != SIGNED:
            weight = gl.exp2(s * (scale * LOG2E) - top)
        elif NORMALISER == SIGNED:
            weight = gl.exp2(gl.abs(changed) * LOG2E - top)
            weight = gl.where(changed > 0.0, weight, gl.where(changed < 0.0, -weight, 0.0))
        else:
            weight = gl.exp2(changed * LOG2E - top)
        slope = weight
    if DSCORE is not None:
        slope = slope * DSCORE(s * scale, b, h, i, j, A)
    if MASKED:  # noqa: SIM102  one is known to the compiler, the other is not
        if partial:  # what lies outside may have any derivative, NaN as well
            branch()
            if MASK is not None:
                seen = MASK(b, h, i, j, A)
                weight = gl.where(seen, weight, 0.0)
                slope = gl.where(seen, slope, 0.0)
            if MASKED == ENDS:
                weight = gl.where(inside, weight, 0.0)
                slope = gl.where(inside, slope, 0.0)
    return weight, slope


@gluon.jit
def through(slope, weight, dp, delta, NORMALISER: gl.constexpr):
    """The gradient of the product."""
    if NORMALISER == SIGNED:
        return slope * (gl.where(weight < 0.0, -dp, dp) - delta)
    else:
        return slope * (dp - delta)
