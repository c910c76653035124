"""Which tiles of a mask are empty or full, without building it.

A part of the mask that depends on i alone, on j alone, or on i - j alone is evaluated at every position, O(length), and
reduced to its extremes in each tile. What combines such parts follows from bounds, a value for each tile and no more.
That is exact for causal masks, windows, documents, prefixes, blocks, dilation and their like, with no special case.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from manyheads.core.expressions.graph import schedule
from manyheads.core.expressions.intervals import Bounds, known
from manyheads.core.expressions.ops import interval_of, widened, wrapped

if TYPE_CHECKING:
    from manyheads.core.expressions import Program

EMPTY, PARTIAL, FULL = 0, 1, 2

BINS = 128  # of the hashed sets of values that are compared for x[i] == y[j]
SPAN = 4  # a tensor read with indices that are bounded only is searched where they span no more values than this
CHUNK = {"cpu": 2**18}  # tiles that are classified at a time: what bounds memory, and fits a cache
CHUNK_ELSEWHERE = 2**21  # on a GPU, where a step on few tiles takes as long as one on many


class Axis:
    """The positions of one side [batch | 1, len], cut into tiles. Places behind the end count as nothing at all.

    values [batch | 1, 1, tiles * tile]: positions, the tile's last one where there is none, 0 if it has none.
    low, high [batch | 1, 1, tiles]: bounds of the positions. void: no token in the tile. gaps: a token is absent.
    start [batch | 1]: the position of place 0 if the tokens' positions are a run, else None.
    """

    def __init__(self, positions: Tensor | range, tile: int, device: torch.device):
        if not isinstance(positions, Tensor):
            self.is_range = positions.step == 1
            positions = torch.arange(positions.start, positions.stop, positions.step, device=device)
        else:
            self.is_range = False
            if positions.is_floating_point() or positions.ndim not in (1, 2):
                raise ValueError(
                    f"positions must be integers [len] or [batch, len], not {positions.dtype} {list(positions.shape)}"
                )
            positions = positions.to(device, torch.int64)
        positions = positions if positions.ndim == 2 else positions[None]
        self.length, self.tile, self.count = positions.shape[1], tile, -(-positions.shape[1] // tile)
        padding, cut = (0, self.count * tile - self.length), (self.count, tile)
        padded = pad(positions, padding, value=-1)[:, None].unflatten(-1, cut)
        last = padded.amax(-1)
        self.void = last < 0
        self.gaps = pad(positions < 0, padding)[:, None].unflatten(-1, cut).any(-1)
        filled = torch.where(padded < 0, last.clamp(min=0)[..., None], padded)
        self.values, self.low, self.high = filled.flatten(-2), filled.amin(-1), filled.amax(-1)
        self.start = self._start(positions) if self.length else None

    def _start(self, positions: Tensor) -> Tensor | None:
        offsets = positions - torch.arange(self.length, device=positions.device)
        if self.is_range:
            return offsets[:, 0]
        present = positions >= 0
        start = torch.where(present, offsets, torch.iinfo(torch.int64).min).amax(-1)
        start = torch.where(present.any(-1), start, 0)
        is_run = bool(((offsets == start[:, None]) | ~present).all())
        return start if is_run else None

    def extremes(self, values: Tensor) -> Bounds:
        """The least and the greatest in each tile of values [batch | 1, heads | 1, tiles * tile]."""
        tiles = values.unflatten(-1, (self.count, self.tile))
        return tiles.amin(-1), tiles.amax(-1)


class Differences:
    """i - j over the tiles of two runs. All values lie on one line of q_len + kv_len - 1; a tile sees a stretch of it.

    Full tiles start at multiples of the greatest common divisor of the tile's sides; the tiles of the last row and
    column, if they stick out, see shorter stretches and come behind: full tiles | last row | last column | corner.
    """

    def __init__(self, queries: Axis, keys: Axis):
        assert queries.start is not None and keys.start is not None, "both sides are runs"
        self.rows, self.columns = queries, keys
        self.full_rows, self.rest_rows = divmod(queries.length, queries.tile)
        self.full_columns, self.rest_columns = divmod(keys.length, keys.tile)
        self.step = math.gcd(queries.tile, keys.tile)
        line = torch.arange(queries.length + keys.length - 1, device=queries.values.device) - (keys.length - 1)
        self.values = (line + (queries.start - keys.start)[:, None])[:, None]

    def extremes(self, values: Tensor) -> Bounds:
        """The least and the greatest in each stretch of values [batch | 1, heads | 1, q_len + kv_len - 1]."""
        parts = list(filter(None, (self._stretches(values, *stretch) for stretch in self._layout())))
        return torch.cat([low for low, _ in parts], -1), torch.cat([high for _, high in parts], -1)

    def _layout(self) -> list[tuple[int, int, int, int]]:
        """(first start, length, step, count) of each part. Later keys mean smaller differences: columns run back."""
        rows, columns = self.rows.tile, self.columns.tile
        last_row = self.full_rows * rows
        full = (self.full_rows - 1) * rows + (self.full_columns - 1) * columns
        has_row, has_column = self.rest_rows > 0, self.rest_columns > 0
        return [
            (self.rest_columns, rows + columns - 1, self.step, self._full_count(full)),
            (last_row + self.rest_columns, self.rest_rows + columns - 1, columns, has_row * self.full_columns),
            (0, rows + self.rest_columns - 1, rows, has_column * self.full_rows),
            (last_row, self.rest_rows + self.rest_columns - 1, 1, has_row * has_column),
        ]

    def _full_count(self, span: int) -> int:
        return span // self.step + 1 if self.full_rows and self.full_columns else 0

    @staticmethod
    def _stretches(values: Tensor, start: int, length: int, step: int, count: int) -> Bounds | None:
        if not count:
            return None
        stretches = values[..., start : start + length + step * (count - 1)].unfold(-1, length, step)
        return stretches.amin(-1), stretches.amax(-1)

    def index(self, rows: Tensor) -> Tensor:
        """Where the stretches of the tiles [rows, all columns] are among the extremes."""
        x, y = rows[:, None], torch.arange(self.columns.count, device=rows.device)
        _, (_, _, _, in_row), (_, _, _, in_column), _ = layout = self._layout()
        full = layout[0][3]
        full_row, full_column = x < self.full_rows, y < self.full_columns
        backwards = self.full_columns - 1 - y
        inside = (x * self.rows.tile + backwards * self.columns.tile) // self.step
        last_row, last_column, corner = full + backwards, full + in_row + x, full + in_row + in_column
        at_end = torch.where(full_row, last_column, corner)
        return torch.where(full_column, torch.where(full_row, inside, last_row), at_end)


class Classifier:
    """Bounds of the nodes of one program over the tiles of one pair of axes.

    A reader maps a slice of tile rows to a node's bounds there, [batch | 1, heads | 1, rows | 1, columns | 1].
    """

    def __init__(
        self, program: Program, queries: Axis, keys: Axis, batch: int, heads: int, operands: Mapping[str, Tensor]
    ):
        self.program, self.queries, self.keys, self.operands = program, queries, keys, operands
        self.nodes = program.graph.nodes
        self.device = queries.values.device
        runs = queries.start is not None and keys.start is not None and queries.length > 0 and keys.length > 0
        self.differences = Differences(queries, keys) if runs else None
        self.inputs = {
            "b": torch.arange(batch, device=self.device).view(-1, 1, 1),
            "h": torch.arange(heads, device=self.device).view(1, -1, 1),
            "i": queries.values,
            "j": keys.values,
        }
        if self.differences is not None:
            self.inputs["d"] = self.differences.values
        assert program.graph.mask is not None, "a program without a mask has no tiles to tell apart"
        self.root = program.graph.mask
        leaves = frozenset(k for k in range(self.root + 1) if self._is_leaf(k))
        self.steps = schedule(self.nodes, self.root, leaves)
        self.readers = {k: self._reader(k) for k, _ in self.steps if k in leaves}
        self.sets = {k: found for k, _ in self.steps if k not in leaves and (found := self._value_sets(k)) is not None}
        self.tables: dict[int | str, tuple[Tensor, Bounds]] = {}

    def positions_of(self, index: int) -> frozenset[str]:
        return self.nodes[index].depends - {"b", "h"}

    def _is_leaf(self, index: int) -> bool:
        positions = self.positions_of(index)
        exact = {"i", "j"} if self.differences is None else {"i", "j", "d"}
        return self.nodes[index].op == "input" or (len(positions) <= 1 and positions <= exact)

    def _evaluate(self, index: int) -> Any:
        return self.program.evaluate(index, self.inputs, self.operands)

    def _reader(self, index: int) -> Callable[[slice], Bounds]:
        """Of a node that is known exactly: it depends on one of i, j and i - j, or on none of them."""
        positions = self.positions_of(index)
        if positions == {"d"} and self.differences is None:
            return self._difference_bounds
        value = self._evaluate(index)
        if not positions:
            low, high = _constant(value, self.device)
            return lambda rows: (low[..., None], high[..., None])
        if positions == {"i"}:
            low, high = known(*self.queries.extremes(value))
            return lambda rows: (low[..., rows, None], high[..., rows, None])
        if positions == {"j"}:
            low, high = known(*self.keys.extremes(value))
            return lambda rows: (low[..., None, :], high[..., None, :])
        differences = self.differences
        assert differences is not None, "i - j is exact for runs alone"
        low, high = known(*differences.extremes(value))

        def read(rows: slice) -> Bounds:
            index = differences.index(torch.arange(rows.start, rows.stop, device=self.device))
            return low[..., index], high[..., index]

        return read

    def _difference_bounds(self, rows: slice) -> Bounds:
        i, j = self.queries, self.keys
        return (
            i.low[..., rows, None] - j.high[..., None, :],
            i.high[..., rows, None] - j.low[..., None, :],
        )

    def _value_sets(self, index: int) -> tuple[Tensor, Tensor] | None:
        """For x(i) == y(j): which of the hashed values each tile of queries and of keys holds."""
        node = self.nodes[index]
        if node.op != "eq" or any(self.nodes[a].kind != "i" for a in node.args):
            return None
        sides = {self.positions_of(a): a for a in node.args}
        if sides.keys() != {frozenset("i"), frozenset("j")}:
            return None
        x, y = sides[frozenset("i")], sides[frozenset("j")]
        return self._hashed(x, self.queries), self._hashed(y, self.keys)

    def _hashed(self, index: int, axis: Axis) -> Tensor:
        value = self._evaluate(index)
        bins = ((value ^ (value >> 7) ^ (value >> 14)) % BINS).unflatten(-1, (axis.count, axis.tile))
        return torch.zeros(*bins.shape[:-1], BINS, device=self.device).scatter_(-1, bins, 1.0)

    def bounds(self, rows: slice) -> Bounds:
        """Of the mask, over the tiles of some rows: certainly true, possibly true."""
        values: dict[int, Bounds] = {}
        for index, dead in self.steps:
            values[index] = self._bounds(index, rows, values)
            for other in dead:
                del values[other]
        return values[self.root]

    def _bounds(self, index: int, rows: slice, values: dict[int, Bounds]) -> Bounds:
        if index in self.readers:
            return self.readers[index](rows)
        node = self.nodes[index]
        operands = [values[a] for a in node.args]
        if node.op == "load":
            return self._load_bounds(node.payload, operands)
        low, high = interval_of(node.op, node.kind, operands)
        if index in self.sets:
            x, y = self.sets[index]
            high = high & (x[..., rows, :] @ y.mT > 0)
        return low, high

    def _load_bounds(self, payload: int | str, indices: list[Bounds]) -> Bounds:
        """Exact where each index is one of a few values, the extremes of the whole tensor elsewhere."""
        table, (everywhere_least, everywhere_greatest) = self._table(payload)
        firsts = [wrapped(low, size) for (low, _), size in zip(indices, table.shape, strict=True)]
        lasts = [wrapped(high, size) for (_, high), size in zip(indices, table.shape, strict=True)]
        few = torch.ones((), dtype=torch.bool, device=self.device)
        for (low, high), first, last in zip(indices, firsts, lasts, strict=True):
            # An index that may be negative or not reads from both ends of the tensor.
            few = few & (last - first < SPAN) & ((low >= 0) | (high < 0))
        least, greatest = None, None
        for k in range(SPAN ** len(firsts)):
            steps = (k // SPAN**dim % SPAN for dim in range(len(firsts)))
            at = [torch.minimum(low + step, high) for low, high, step in zip(firsts, lasts, steps, strict=True)]
            value = table[tuple(at)]
            least = value if least is None else torch.minimum(least, value)
            greatest = value if greatest is None else torch.maximum(greatest, value)
        assert least is not None and greatest is not None
        return known(torch.where(few, least, everywhere_least), torch.where(few, greatest, everywhere_greatest))

    def _table(self, payload: int | str) -> tuple[Tensor, Bounds]:
        """A captured tensor or an operand, and its extremes."""
        if payload not in self.tables:
            table = widened(self.program.table(payload, self.operands).to(self.device), torch.float32)
            self.tables[payload] = table, (table.amin(), table.amax())
        return self.tables[payload]


def _constant(value: Any, device: torch.device) -> Bounds:
    """Of what depends on no position. A double may be rounded to float32 where it meets a tensor."""
    if not isinstance(value, Tensor):
        value = torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else None, device=device)
    if not value.is_floating_point():
        return value, value
    rounded = value.float()
    return known(torch.minimum(value, rounded), torch.maximum(value, rounded))


def classify(
    program: Program,
    i: Tensor | range,
    j: Tensor | range,
    tile: tuple[int, int],
    batch: int,
    heads: int,
    operands: Mapping[str, Tensor],
    device: torch.device | None = None,
) -> Tensor:
    """See Program.tiles."""
    if device is None:
        device = next((x.device for x in (i, j, *operands.values()) if isinstance(x, Tensor)), torch.device("cpu"))
    queries, keys = Axis(i, tile[0], device), Axis(j, tile[1], device)
    rows = {queries.values.shape[0], keys.values.shape[0]} - {1}
    if len(rows | ({batch} - {1})) > 1:
        raise ValueError(f"positions of {' and '.join(map(str, rows))} rows for a batch of {batch}")
    batch = max(batch, *rows) if rows else batch
    depends = program.mask_depends
    shape = batch if "b" in depends or rows else 1, heads if "h" in depends else 1
    result = torch.full((*shape, queries.count, keys.count), FULL, dtype=torch.uint8, device=device)
    if not result.numel():
        return result
    classifier = Classifier(program, queries, keys, batch, heads, operands) if program.has_mask else None
    size = max(1, CHUNK.get(device.type, CHUNK_ELSEWHERE) // (shape[0] * shape[1] * keys.count))
    for start in range(0, queries.count, size):
        rows = slice(start, min(start + size, queries.count))
        chunk = result[:, :, rows]
        if classifier is not None:
            sure, possible = classifier.bounds(rows)
            chunk.copy_(sure.to(torch.uint8) + possible.to(torch.uint8))
        gaps = queries.gaps[..., rows, None] | keys.gaps[..., None, :]
        void = queries.void[..., rows, None] | keys.void[..., None, :]
        chunk.copy_(torch.where(void, EMPTY, torch.where(gaps, chunk.clamp(max=PARTIAL), chunk)))
    return result
