"""Our recurrences against the plain loops of fla-core, the library of linear attention: outputs and last states.

Its loops compute in float32, one step at a time: 1e-4 of the output's size is some hundred roundings of them.
"""

import warnings
from importlib import import_module

import pytest
import torch
from torch import Tensor

import manyheads
from manyheads import get
from manyheads.core import Operand, Recurrence

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # that this machine has no GPU
    pytest.importorskip("fla")

BATCH, HEADS, LENGTH, DIM, V_DIM = 2, 3, 70, 16, 24
STEP, CHANNEL = Operand("batch heads len"), Operand("batch heads len head_dim")


def naive(module: str, name: str):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(import_module(f"fla.ops.{module}.naive"), name)


def normal(*shape: int) -> Tensor:
    return torch.randn(BATCH, HEADS, *shape)


def made() -> dict[str, Tensor]:
    """q, k, v, decays and strengths as models have them; keys of length 1."""
    torch.manual_seed(0)
    return {
        "q": normal(LENGTH, DIM),
        "k": torch.nn.functional.normalize(normal(LENGTH, DIM), dim=-1),
        "v": normal(LENGTH, V_DIM),
        "g": -0.3 * normal(LENGTH).abs(),
        "channels": -0.3 * normal(LENGTH, DIM).abs(),
        "beta": normal(LENGTH).sigmoid(),
        "state": normal(DIM, V_DIM),
    }


def turned(*tensors: Tensor) -> list[Tensor]:
    """Tokens before heads, as fla has them."""
    return [t.transpose(1, 2) for t in tensors]


def near(ours: Tensor, theirs: Tensor) -> None:
    assert (ours - theirs).norm() < 1e-4 * theirs.norm()


# A form, its operands, and where fla has the loop.
CASES = {
    "none": (Recurrence(), (), ("linear_attn", "naive_recurrent_linear_attn")),
    "step": (Recurrence(operands={"g": STEP}), ("g",), ("simple_gla", "naive_recurrent_simple_gla")),
    "channel": (Recurrence(operands={"g": CHANNEL}), ("g",), ("gla", "naive_recurrent_gla")),
    "gated delta": (
        Recurrence(write="delta", operands={"g": STEP, "beta": STEP}),
        ("g", "beta"),
        ("gated_delta_rule", "naive_recurrent_gated_delta_rule"),
    ),
    "kda": (
        Recurrence(write="delta", operands={"g": CHANNEL, "beta": STEP}),
        ("g", "beta"),
        ("kda", "naive_recurrent_kda"),
    ),
}


@pytest.mark.parametrize("started", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_outputs_and_states_equal_those_of_the_loops(case, started):
    form, names, (module, function) = CASES[case]
    x = made()
    if case in ("channel", "kda"):
        x["g"] = x["channels"]
    own = {name: x[name] for name in names}
    # gla's names its decays gk
    theirs = {"gk" if case == "channel" and name == "g" else name: turned(t)[0] for name, t in own.items()}
    given = {"initial_state": x["state"]} if started else {}
    wanted, last = naive(module, function)(*turned(x["q"], x["k"], x["v"]), **theirs, **given, output_final_state=True)
    o, state = manyheads.attention(
        x["q"], x["k"], x["v"], form, **own, state=x["state"] if started else None, return_state=True
    )
    near(o, turned(wanted)[0])
    near(state, last)


@pytest.mark.parametrize("started", [False, True])
def test_the_delta_rule_without_decay(started):
    x = made()
    form = Recurrence(write="delta", operands={"beta": STEP})
    start = x["state"] if started else None
    wanted, last = naive("delta_rule", "delta_rule_recurrence")(x["q"], x["k"], x["v"], x["beta"], start)
    o, state = manyheads.attention(x["q"], x["k"], x["v"], form, beta=x["beta"], state=start, return_state=True)
    near(o, wanted)
    near(state, last)


def test_a_decay_of_each_head_is_that_of_retention():
    x = made()
    form = Recurrence(decay=lambda h, heads: torch.log1p(-torch.exp2(-5.0 - h)))
    near(
        manyheads.attention(x["q"], x["k"], x["v"], form), naive("retention", "naive_retention")(x["q"], x["k"], x["v"])
    )


@pytest.mark.parametrize("products", [2, 3])
def test_deltaproduct_makes_several_writes(products):
    x = made()
    keys, values = normal(LENGTH, products, DIM), normal(LENGTH, products, V_DIM)
    beta = 2 * normal(LENGTH, products).sigmoid()
    o = manyheads.attention(
        x["q"], keys[..., 0, :], values[..., 0, :], "deltaproduct", products=products, gated=True, g=x["g"], beta=beta,
        more_keys=keys[..., 1:, :], more_values=values[..., 1:, :],
    )  # fmt: skip
    q, unit = (torch.nn.functional.normalize(t, dim=-1) for t in (x["q"], keys))
    wanted, _ = naive("gated_delta_product", "naive_recurrent_gated_delta_product")(
        turned(q)[0], *turned(unit.flatten(2, 3), values.flatten(2, 3)), *turned(x["g"], beta.flatten(2, 3)),
        DIM**-0.5, num_householder=products,
    )  # fmt: skip
    near(o, turned(wanted)[0])


def test_gated_slots_are_written_with_what_they_forget():
    x, slots = made(), 8
    g = torch.nn.functional.logsigmoid(normal(LENGTH, slots)) / 8
    o = manyheads.attention(x["q"], x["k"], x["v"], get("gated_slot_attention")(slots=slots), g=g)
    wanted, _ = naive("gsa", "naive_recurrent_gsa")(*turned(x["q"], x["k"], x["v"], 1 - g.exp(), g), scale=1.0)
    near(o, turned(wanted)[0])
