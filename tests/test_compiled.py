"""The Hopper kernels as machine code, compiled without a GPU."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("triton.experimental.gluon")

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import compiled
import in_flight

# Words that a kernel spills, where a tile that spills them ran faster than a smaller one that does not: docs/log.md.
# Dropout has the tile of softcap; queries 256 wide spill outside of their loop.
SPILLED = {"keys softcap 128": 40, "keys causal 128": 40, "keys full 64": 4, "keys dropout 128": 48}
SPILLED |= {"keys of 1 and 128, 128": 48, "keys top-k 128": 16, "keys causal 256 dK": 4}
SPILLED |= {"queries of 64 and 32, 256": 2}
CHECKED = [
    "attend full 64", "keys full 64", "queries full 64", "attend causal 128", "keys causal 128", "queries causal 128",
    "attend softcap 128", "keys softcap 128", "queries softcap 128", "attend causal 256", "keys causal 256 dK",
    "attend dropout 64", "keys dropout 64", "queries dropout 64", "attend dropout 128", "keys dropout 128",
    "queries dropout 128", "levels entmax 64", "levels entmax 128", "levels sparsemax 256", "levels alphas 128",
    "attend entmax 128", "queries entmax 128", "keys entmax 64", "attend of 1 and 128, 128", "keys of 1 and 128, 64",
    "queries of 1 and 128, 128", "attend of 64 and 32, 64", "keys of 1 and 128, 128", "queries of 64 and 32, 256",
    "levels top-k 64", "levels top-k 128", "levels top-k 256", "attend top-k 128", "keys top-k 128",
    "queries top-k 128",
]  # fmt: skip


@pytest.mark.parametrize("name", CHECKED)
def test_uses_what_a_hopper_has(name):
    kernel = {**dict(compiled.hopper_kernels()), **dict(compiled.small_kernels())}[name]()
    made = compiled.read(kernel)
    assert not in_flight.overlaps(kernel.asm["ttgir"])
    assert made.spilled <= SPILLED.get(name, 0), made
    assert made.hgmma > 0 and made.shared <= compiled.LIMIT, made
    assert made.registers == 168, "more would leave no room for three warp groups"
