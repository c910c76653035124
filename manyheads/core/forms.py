"""Forms: what a mechanism computes, as data. Mechanisms return forms, engines run them.

A form holds functions and numbers, no tensors of the call and no state. Two forms are equal only if they are the
same object; a mechanism returns the same object for the same settings, so engines may key compiled code on it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import count
from typing import Any, Literal
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from manyheads.core.builders import listed
from manyheads.core.expressions import Program, trace


def identity(x: Tensor) -> Tensor:
    return x


def inverse_sqrt(head_dim: int) -> float:
    return head_dim**-0.5


def one(head_dim: int) -> float:
    return 1.0


def unit(x: Tensor) -> Tensor:
    """Vectors of length 1; zero stays zero."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def as_linear(weight: Tensor) -> Tensor:
    """Filled in place as torch's linear layers start, by its last size."""
    bound = weight.shape[-1] ** -0.5
    return weight.uniform_(-bound, bound)


@dataclass(frozen=True, eq=False)
class Operand:
    """An input beside q, k and v. Declared once; test data, benchmark data and a layer's projection follow from it.

    dims: names from `batch heads kv_heads len head_dim v_head_dim`, or numbers, separated by blanks. With `len` the
        operand has a value for each token, and a layer projects it from x; without, it is a parameter of the layer.
    activation: takes what a projection gives (any real number) to the operand's own range.
    init: fills the layer's parameter in place: the operand before its activation or, with `len`, the projection's
        weight; zeros if absent.
    kind: "f" for floating numbers, "b" for booleans.
    """

    dims: str
    activation: Callable[[Tensor], Tensor] = identity
    init: Callable[[Tensor], object] = torch.Tensor.zero_
    kind: Literal["f", "b"] = "f"

    def __post_init__(self) -> None:
        if self.per_token and self.names[0] != "batch":
            raise ValueError(f"an operand with len has batch in front, as rows differ in length; not {self.dims!r}")

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.dims.split())

    @property
    def per_token(self) -> bool:
        return "len" in self.names

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        return tuple(int(name) if name.isdigit() else sizes[name] for name in self.names)


@dataclass(frozen=True)
class Projections:
    """What a layer around the form does differently from one q, k, v projection per head of the model.

    query_share: the share of the model's heads that keep a query projection (1 = all).
    scores_from: "content", or "positions": q and k are projections of positional encodings, the same for every input.
    """

    query_share: float = 1.0
    scores_from: Literal["content", "positions"] = "content"


@dataclass(frozen=True, eq=False, kw_only=True)
class Form:
    """The one abstract level: what every form carries. default_scale: head_dim -> what multiplies q.k unless asked.

    handle: an empty tensor whose first size is the form's number, see `form_of`. torch.compile compiles anew for each
        value of a number that it meets, but not for each size that is marked as one that changes.
    """

    operands: Mapping[str, Operand] = field(default_factory=dict)
    projections: Projections = Projections()
    default_scale: Callable[[int], float] = inverse_sqrt
    handle: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._register()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._register()  # a copy is a form of its own

    def _register(self) -> None:
        number = next(_NUMBERS)
        _FORMS[number] = self
        handle: Any = torch.empty(number, 0, device="cpu")
        handle._dynamo_dynamic_indices = {0}  # torch._dynamo.mark_dynamic, without a second for its import
        object.__setattr__(self, "handle", handle)


_NUMBERS = count(2)  # torch.compile compiles anew for 0 and 1
_FORMS: WeakValueDictionary[int, Form] = WeakValueDictionary()


@lru_cache(4096)  # kept for a backward pass, which has no more than the number
def form_of(number: int) -> Form:
    """The form of that number. Raises KeyError if it is gone."""
    return _FORMS[number]


@dataclass(frozen=True, eq=False, kw_only=True)
class Scores(Form):
    """o_i = sum_j normalise_j(score(scale q_i.k_j)) v_j over the keys that mask lets query i see.

    mask(b, h, i, j) -> bool and score(s, b, h, i, j) -> s are plain functions of batch, head and absolute query and
    key position; operands follow j by name.
    normaliser: "softmax"; "signed" (sign(s) softmax(|s|)); "entmax" (core/entmax.py) or "top_k", a softmax over the
        largest scores of a row, whose rows need all their keys and have no lse; or "none": score gives the weights
        themselves, as for sigmoid attention, and parts of the keys merge by addition.
    alpha: with "entmax", a number >= 1 (2: sparsemax), or an operand "heads" with values from 1 to 2.
    top_k: with "top_k", how many scores of each row are kept, beside those that equal the last of them.
    sink: with "softmax", an operand "heads" that is one more score in each row, of a key whose value is zero. It counts
        once: where keys are split, one part has it and the others have -inf in its place.
    """

    mask: Callable | None = None
    score: Callable | None = None
    normaliser: Literal["softmax", "signed", "entmax", "top_k", "none"] = "softmax"
    alpha: float | str | None = None
    top_k: int | None = None
    sink: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.program  # noqa: B018  torch.compile follows what is there, but cannot make it
        if (self.alpha is None) == (self.normaliser == "entmax"):
            raise ValueError(f"entmax takes an alpha, others none; not {self.normaliser!r} and {self.alpha!r}")
        if (self.top_k is None) == (self.normaliser == "top_k"):
            raise ValueError(f"top_k takes a number top_k, others none; not {self.normaliser!r} and {self.top_k!r}")
        if self.top_k is not None and (type(self.top_k) is not int or self.top_k < 1):
            raise ValueError(f"top_k keeps a whole number of scores, 1 or more, not {self.top_k!r}")
        if isinstance(self.alpha, str):
            self._check_declared("alpha", self.alpha)
        elif self.alpha is not None and not 1 <= self.alpha < math.inf:
            raise ValueError(f"the alpha of entmax is a finite number >= 1, or an operand's name, not {self.alpha!r}")
        if self.sink is not None:
            if self.normaliser != "softmax":
                raise ValueError(f"a sink is one more score in a softmax; the normaliser {self.normaliser!r} has none")
            self._check_declared("sink", self.sink)

    def _check_declared(self, what: str, name: str) -> None:
        if name not in self.operands or self.operands[name].names != ("heads",):
            raise ValueError(f"the {what} {name!r} must be declared in operands, as Operand('heads')")

    @property
    def has_lse(self) -> bool:
        """Whether weights are exp(score - lse)."""
        return self.normaliser in ("softmax", "signed")

    @cached_property
    def program(self) -> Program:
        declared = {name: (len(operand.names), operand.kind) for name, operand in self.operands.items()}
        return trace(mask=self.mask, score=self.score, operands=declared)


@dataclass(frozen=True, eq=False)
class Blocks:
    """Lists of key blocks: `indices` [batch, heads, query blocks, n], of which the first `counts` [batch, heads,
    query blocks] are meant, in ascending order."""

    indices: Tensor
    counts: Tensor

    @classmethod
    def from_map(cls, keep: Tensor) -> Blocks:
        """From a boolean map [batch, heads, query blocks, key blocks]; n is its width, as nobody waits for counts."""
        return cls(*listed(keep))

    @classmethod
    def from_indices(cls, indices: Tensor, there: Tensor | None = None) -> Blocks:
        """From the numbers of key blocks [batch, heads, query blocks, n] in any order, no block twice in a row; of them
        those that are `there`. Makes no map, so that it is linear in what is listed."""
        if there is None:
            return cls(indices.sort(-1).values, indices.new_full(indices.shape[:-1], indices.shape[-1]))
        last = torch.iinfo(indices.dtype).max
        return cls(torch.where(there, indices, last).sort(-1).values, there.sum(-1))

    @property
    def shared(self) -> Blocks:
        """With one head, if in memory all heads have the same lists; else these."""
        same = self.indices.shape[1] > 1 and self.indices.stride(1) == self.counts.stride(1) == 0
        return Blocks(self.indices[:, :1], self.counts[:, :1]) if same else self

    def to_map(self, key_blocks: int) -> Tensor:
        """The boolean map [batch, heads, query blocks, key blocks] again; heads that share lists share it."""
        own = self.shared
        meant = torch.arange(own.indices.shape[-1], device=own.indices.device) < own.counts[..., None]
        keep = torch.zeros(*own.counts.shape, key_blocks + 1, dtype=torch.bool, device=own.indices.device)
        keep = keep.scatter(-1, torch.where(meant, own.indices.long(), key_blocks), True)[..., :key_blocks]
        return keep.expand(-1, self.indices.shape[1], -1, -1)


@dataclass(frozen=True, eq=False, kw_only=True)
class Selection(Form):
    """Scores over the key blocks that `select` chooses for each block of queries.

    select(q, k, *, scale, offset) -> Blocks: q [batch, heads, q_len, head_dim] stands at positions offset,
    offset + 1, ...; k [batch, kv_heads, kv_len, head_dim] at 0, 1, .... Block n of either side holds the positions
    n * block to (n + 1) * block - 1, and the first listed query block is offset // query_block. No gradient flows
    through the choice unless select lets it.
    together: the lists of all heads that share a key head are the same.
    """

    select: Callable[..., Blocks]
    scores: Scores
    query_block: int
    key_block: int
    together: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.scores.program.mask_reads_operands  # noqa: B018  torch.compile follows what is there, but cannot make it


@dataclass(frozen=True, eq=False, kw_only=True)
class Recurrence(Form):
    """A state S [head_dim, v_head_dim] for each head, written by keys and values and read by queries.

    S_t = decay_t S_{t-1} + write_t, o_t = S_t^T (scale q_t), with q, k after `query_feature`, `key_feature`.
    decay: None; or a function (h, heads) -> log decay of each head, constant in time. An operand named `g` (log decay,
        <= 0; "batch heads len" for one a step, with head_dim behind for one a channel) decays as well.
    write: "add": k_t v_t^T. "delta": beta_t k_t (v_t - S'^T k_t)^T after the decay, with the operand `beta`
        "batch heads len"; n of them one after the other with the operands `more_keys` and `more_values`, "batch
        kv_heads len n-1 head_dim" and "... v_head_dim", written behind k_t and v_t, and `beta` "batch heads len n".
        "slots": (1 - exp(g_t)) (k_t, v_t)^T, with an operand `g` "batch heads len m" for m slots; S = (K~, V~) is
        [m, head_dim + v_head_dim] then, and o_t = V~_t^T softmax(K~_t (scale q_t)).
    normaliser: "none"; or "sum": o_t = S_t^T (scale q_t) / z_t^T (scale q_t), with z the same recurrence for a value
        that is 1 for each write; it is the last column of the state. The scale cancels, but for `least`.
    least: with "sum", what is divided by is at least this.
    causal: False reads the state after the last token for every query; it adds up without a decay.
    key_softmax: the keys' feature is a softmax over the tokens, channel by channel (needs causal=False).
    """

    query_feature: Callable[[Tensor], Tensor] = identity
    key_feature: Callable[[Tensor], Tensor] = identity
    decay: Callable[[Tensor, int], Tensor] | None = None
    write: Literal["add", "delta", "slots"] = "add"
    normaliser: Literal["none", "sum"] = "none"
    least: float | None = None
    causal: bool = True
    key_softmax: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if ("beta" in self.operands) != (self.write == "delta"):
            raise ValueError(f"an operand beta goes with write='delta', and with no other; not with {self.write!r}")
        if ("more_keys" in self.operands) != ("more_values" in self.operands) or (
            self.write != "delta" and self.writes > 1
        ):
            raise ValueError("the operands more_keys and more_values go together, and with write='delta'")
        if self.write == "slots" and ("g" not in self.operands or self.normaliser != "none" or self.decay is not None):
            raise ValueError("slots have an operand g, a softmax for a normaliser, and no other decay")
        if self.least is not None and self.normaliser != "sum":
            raise ValueError(f"least is a bound of a sum; the normaliser {self.normaliser!r} has none")
        if self.key_softmax and self.causal:
            raise ValueError("a softmax over all tokens needs causal=False")
        if not self.causal and (self.write != "add" or self.decay is not None or "g" in self.operands):
            raise ValueError("without causal there is no order of tokens: no decay, and no write but 'add'")

    @property
    def writes(self) -> int:
        """How many there are for each token."""
        return 1 + int(self.operands["more_keys"].names[3]) if "more_keys" in self.operands else 1


@dataclass(frozen=True, eq=False, kw_only=True)
class Sum(Form):
    """o = sum of gate * part, each part with its own scale; a scale that the caller gives changes all in proportion.

    gates: for each part the name of an operand "batch heads len", or None for 1.
    """

    parts: tuple[Form, ...]
    gates: tuple[str | None, ...]


@dataclass(frozen=True, eq=False, kw_only=True)
class Function(Form):
    """Anything else: forward(q, k, v, *, scale, **operands) -> o. Runs as it is written; torch.compile may be used on
    it, and what it is made of may be operators for which an engine has kernels (`core/builders.py`).

    query_context: how many queries before its own an output needs; a decoding step passes them along.
    """

    forward: Callable[..., Tensor]
    query_context: int = 0
