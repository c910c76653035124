"""Steps to the levels of entmax: tau such that sum_j max(0, z_j - tau)^power = 1, with z the scores.

The first look finds the largest z, m, and starts at tau = m - 1, where that key alone has the weight 1. Each later one
takes a step of Newton's on the norm of the weights,

    N(tau) = (sum_j max(0, z_j - tau)^power)^(1 / power) - 1,   tau += (S - S^(1 - 1 / power)) / R

with x_j = max(0, z_j - tau), S = sum_j x_j^power and R = sum_j x_j^(power - 1). As power >= 1, N is convex and falls:
tau grows, and does not pass the root but by rounding.
"""

from __future__ import annotations

from manyheads.engines.triton.hopper.kernels.common import lg2
from manyheads.engines.triton.hopper.names import gl, gluon

ENOUGH = gl.constexpr(2.0**-14)  # what the weights' sum may be above 1: far below what 16 bits tell apart


@gluon.jit
def nothing_weighed(rows: gl.constexpr, layout: gl.constexpr):
    """The largest z, S and R of no keys."""
    top = gl.full([rows], float("-inf"), gl.float32, layout)
    return top, gl.full([rows], 0.0, gl.float32, layout), gl.full([rows], 0.0, gl.float32, layout)


@gluon.jit
def weighed(z, tau, top, total, slope, power, FIRST: gl.constexpr, POWER: gl.constexpr):
    """One tile more in the largest z, or in S and R."""
    if FIRST:
        return gl.maximum(top, gl.max(z, 1)), total, slope
    else:
        x = gl.maximum(z - tau[:, None], 0.0)
        if POWER == 1:
            return top, total + gl.sum(x, 1), slope + gl.sum(gl.where(x > 0.0, 1.0, 0.0), 1)
        elif POWER == 2:
            return top, total + gl.sum(x * x, 1), slope + gl.sum(x, 1)
        else:
            log = lg2(x)
            slopes = gl.where(log > float("-inf"), gl.exp2(log * (power - 1.0)), 0.0)
            return top, total + gl.sum(gl.exp2(log * power), 1), slope + gl.sum(slopes, 1)


@gluon.jit
def moved(tau, top, total, slope, power, FIRST: gl.constexpr, POWER: gl.constexpr):
    """The next tau, and which rows have not arrived. Queries that see nothing get inf, above which is no score."""
    if FIRST:
        seen = top > float("-inf")
        return gl.where(seen, top - 1.0, float("inf")), seen
    else:
        if POWER == 1:
            rest = gl.full(total.shape, 1.0, gl.float32, total.type.layout)
        elif POWER == 2:
            rest = gl.sqrt(total)
        else:
            rest = gl.exp2(gl.log2(total) * (1.0 - 1.0 / power))
        found = gl.where(slope > 0.0, tau + (total - rest) / slope, tau)
        return found, (total > 1.0 + ENOUGH) & (found > tau)
