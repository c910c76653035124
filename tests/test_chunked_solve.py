"""The inverse of a chunk's triangle: in the interpreter for chunks of both lengths, and on a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from manyheads.engines.triton.launch import INTERPRETED
from tests.interpreter import interpret

NOISE = {"apart": 1e3, "alike": 0.1, "the same": 0.0}  # of keys, beside what they have in common
N, D = 150, 24  # tokens: of whole chunks and of a part


def drawn(keys: str, strength: float, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """k of length 1, [1, 1, N, D], g and beta for two heads that share it."""
    draw = torch.Generator().manual_seed(0)
    k = torch.randn(1, 1, 1, D, generator=draw) + NOISE[keys] * torch.randn(1, 1, N, D, generator=draw)
    g, beta = -0.1 * torch.rand(1, 2, N, generator=draw), strength * torch.rand(1, 2, N, generator=draw)
    return (k / k.norm(dim=-1, keepdim=True)).bfloat16().to(device), g.to(device), beta.to(device)


def by_hand(k: Tensor, g: Tensor | None, beta: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """T and B in float64, [heads, chunks, chunk, chunk]. Behind the last token nothing is written."""
    more = -N % chunk
    k = torch.nn.functional.pad(k.double(), (0, 0, 0, more)).unflatten(2, (-1, chunk)).expand(1, 2, -1, -1, -1)[0]
    b = (k @ k.mT).tril(-1)
    if g is not None:
        sums = torch.nn.functional.pad(g.double(), (0, more)).unflatten(2, (-1, chunk))[0].cumsum(2)
        b = b * (sums[..., :, None] - sums[..., None, :]).tril().exp()
    return inverse(b, beta), b


def inverse(b: Tensor, beta: Tensor) -> Tensor:
    chunk = b.shape[-1]
    beta = torch.nn.functional.pad(beta.double(), (0, -N % chunk)).unflatten(2, (-1, chunk))[0]
    return torch.linalg.inv(torch.eye(chunk, device=b.device) + beta[..., None] * b.double())


def solved(k: Tensor, g: Tensor | None, beta: Tensor, b: Tensor | None, chunk: int, like: torch.dtype) -> Tensor:
    """What the kernel makes of them, from `b` if there is one."""
    from manyheads.engines.triton.chunked.kernels.solve import LEAST, solve

    chunks = -(-N // chunk)
    t = torch.full((2, chunks, chunk, chunk), torch.nan, dtype=like, device=k.device)
    sums, strengths, fades = (torch.zeros(2, n, device=k.device) for n in (chunks * chunk, chunks * chunk, chunks + 1))
    decays, steps = (None, (0, 0, 0)) if b is not None or g is None else (g, g.stride())
    known = (None, strengths, None) if decays is None else (sums, strengths, fades)
    steps = *k.stride()[:3], *steps, *beta.stride()
    sizes = N, 2, 2, D, 32, 16, chunk, 1, INTERPRETED
    solve[(2 * chunks,)](k, decays, beta, b, t, *known, *steps, *sizes, num_warps=1)
    least = beta[0].where(beta[0].abs() >= LEAST.value, LEAST.value)
    assert torch.equal(strengths[:, :N], least) and not strengths[:, N:].any()
    return t


def error(found: Tensor, true: Tensor) -> float:
    return ((found.double() - true).norm() / true.norm()).item()


def small() -> None:
    """In the interpreter products are those of float32; the same keys at strengths up to 2 take five of its digits."""
    for chunk in (32, 64):
        for keys in NOISE:
            k, g, beta = drawn(keys, 2.0)
            for decays, given in ((None, False), (g, False), (g, True)):
                t, b = by_hand(k, decays, beta, chunk)
                found = error(solved(k, decays, beta, b.float() if given else None, chunk, torch.float32), t)
                assert found < 1e-5, (chunk, keys, decays is None, given, found)
    beta[:, :, ::3] = 0  # no writes, which are taken for the least there are
    assert error(solved(k, g, beta, None, 64, torch.float32), by_hand(k, g, beta, 64)[0]) < 1e-5
    print("done")


def test_in_the_interpreter():
    assert interpret("test_chunked_solve", "small()") == "done"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("keys", NOISE)
@pytest.mark.parametrize("strength", [1.0, 2.0])
def test_on_a_gpu(keys, strength):
    """A bfloat16 is off by 2^-9 at most, and what is computed in more bits by less."""
    k, g, beta = drawn(keys, strength, "cuda")
    t, b = by_hand(k, g, beta, 64)
    found = solved(k, g, beta, None, 64, torch.bfloat16)
    assert error(found, t) < 2e-3 and torch.equal(found, solved(k, g, beta, None, 64, torch.bfloat16))
    given = b.bfloat16()
    t = inverse(given, beta)
    assert error(solved(k, g, beta, given, 64, torch.bfloat16), t) < 2e-3
