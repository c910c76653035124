"""A selection as a mask that reads a map of the chosen blocks: for engines that compile masks.

Which tiles are empty or full follows from the map as it does from any table that a mask reads.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

from torch import Tensor

from manyheads.core.forms import Blocks, Form, Operand, Scores, Selection
from manyheads.core.inputs import Inputs
from manyheads.core.tiling import choose

CHOSEN = "chosen_blocks"


def why_no_scores(form: Selection) -> str | None:
    if form.scores.program.mask_reads_operands:
        return "a selection whose own mask reads operands"
    return None


def fixed(form: Form, blocks: Blocks) -> Selection:
    """The selection that chooses these blocks."""
    assert isinstance(form, Selection), "others choose none"
    return replace(form, select=lambda q, k, *, scale, offset: blocks)


def as_scores(form: Selection, x: Inputs, blocks: Blocks | None = None) -> tuple[Scores, Inputs]:
    """The scores of the blocks that `form` chooses for x, and x with the map [batch, heads, query blocks, key blocks]
    of them as an operand. Rows are whole: keys stand at 0, 1, ..., queries at the end. blocks: if chosen already."""
    assert not isinstance(x.q_positions, Tensor), "rows are run one by one"
    chosen = (blocks or choose(form, x)).to_map(-(-x.kv_len // form.key_block))
    first = x.q_positions.start // form.query_block
    return _scores(form, first), x.with_(operands={**x.operands, CHOSEN: chosen})


@lru_cache(maxsize=256)  # a step of decoding has a first block of its own, the same in all layers
def _scores(form: Selection, first: int) -> Scores:
    inner, q_size, k_size = form.scores.mask, form.query_block, form.key_block

    def alone(b, h, i, j, chosen_blocks):
        return chosen_blocks[b, h, i // q_size - first, j // k_size]

    def both(b, h, i, j, chosen_blocks):
        return inner(b, h, i, j) & chosen_blocks[b, h, i // q_size - first, j // k_size]  # type: ignore[misc]  it is called where there is one

    blocks = Operand("batch heads 0 0", kind="b")  # as many blocks as the lengths give
    return replace(
        form.scores, mask=alone if inner is None else both, operands={**form.scores.operands, CHOSEN: blocks}
    )
