"""Cache policies and budgets, against the papers' equations written out row by row."""

import math

import pytest
import torch

import manyheads
from manyheads.cache import Context, Policy, budgets, policies
from manyheads.cache.eviction import keep


def make_context(q_positions, kv_positions, heads=4, kv_heads=2, head_dim=8):
    """Normal q, k, v for these positions [batch, len]."""
    batch, q_len = q_positions.shape
    n = kv_positions.shape[1]
    return Context(
        torch.randn(batch, heads, q_len, head_dim), torch.randn(batch, kv_heads, n, head_dim),
        torch.randn(batch, kv_heads, n, head_dim), q_positions, kv_positions[:, None].expand(-1, kv_heads, -1), 0.3,
    )  # fmt: skip


def row(n, *, left=0, right=0):
    return torch.tensor([-1] * left + list(range(n)) + [-1] * right)


def kept(policy, context, budget):
    """For each row and head the positions that stay, ascending."""
    importance = policy.score(context)
    positions = context.kv_positions[:, : importance.shape[1]]
    budget = torch.full((positions.shape[0],), budget)
    _, stay = keep(importance, positions, budget, min(positions.shape[2], int(budget.max())))
    return [[[j for j in head.tolist() if j >= 0] for head in rows] for rows in stay]


# ---- names ----


def test_policies_are_found_by_name():
    assert policies.names() == ("keep_all", "sink_window", "snapkv")
    assert manyheads.policies is policies
    for name in policies.names():
        recipe = policies.get(name)
        assert recipe.name == name and recipe.arxiv in recipe.text and recipe.summary.endswith(".")
        assert isinstance(recipe(), Policy) and recipe().name == name
        assert recipe().when in ("always", "prefill", "never") and recipe().least >= 1
    assert policies.get("snapkv").system == "snapkv"


def test_an_unknown_policy_or_setting_names_the_nearest():
    with pytest.raises(KeyError, match="Did you mean 'snapkv'"):
        policies.get("snap_kv")
    with pytest.raises(TypeError, match="Did you mean 'window'"):
        policies.get("snapkv")(windows=3)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("snapkv", {"window": 0}),
        ("snapkv", {"window": 2.5}),
        ("snapkv", {"kernel": 4}),
        ("snapkv", {"pooling": "median"}),
        ("sink_window", {"sinks": -1}),
        ("sink_window", {"sinks": True}),
    ],
)
def test_a_bad_setting_is_named(name, settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        policies.get(name)(**settings)


# ---- what stays ----


def test_keep_takes_the_best_of_what_is_there_in_stored_order():
    importance = torch.tensor([[[5.0, 1.0, 9.0, 3.0, 3.0]], [[9.0, 9.0, 1.0, 2.0, 3.0]]])
    positions = torch.tensor([[[0, 1, 2, 3, 4]], [[-1, -1, 0, 1, 2]]])
    index, at = keep(importance, positions, torch.tensor([3, 2]), 3)
    assert index[0].tolist() == [[0, 2, 3]]  # of two equal ones the earlier
    assert at.tolist() == [[[0, 2, 3]], [[-1, 1, 2]]]  # absent ones never, free places in front


@pytest.mark.parametrize("budget", [5, 9, 40])
def test_sink_window_keeps_the_first_and_the_last(budget):
    positions = torch.stack([row(20), row(13, left=7), row(3, left=17)])
    context = make_context(positions[:, -2:], positions)
    for rows, n in zip(kept(policies.get("sink_window")(sinks=4), context, budget), (20, 13, 3), strict=True):
        wanted = [j for j in range(n) if j < 4 or j >= n - (budget - 4)]
        assert rows == [wanted]  # one list for all heads


def snapkv_by_hand(context, b, budget, window, kernel, pooling):
    """The authors' steps for one row without its padding, head by head; the heads of a group are averaged."""
    real_q, real_k = context.q_positions[b] >= 0, context.kv_positions[b, 0] >= 0
    q, k = context.q[b][:, real_q][:, -window:], context.k[b][:, real_k]
    n, group = k.shape[1], q.shape[0] // k.shape[0]
    result = []
    for head in range(k.shape[0]):
        votes = torch.zeros(n - window)
        for h in range(head * group, (head + 1) * group):
            s = q[h] @ k[head].T * context.scale
            s[:, n - window :] += torch.full((window, window), -math.inf).triu(1)
            votes += s.softmax(-1)[:, : n - window].sum(0) / group
        side = kernel // 2
        around = [votes[max(0, j - side) : j + side + 1] for j in range(n - window)]
        pooled = torch.stack([x.sum() / kernel if pooling == "mean" else x.max() for x in around])
        best = sorted(pooled.argsort(descending=True, stable=True)[: budget - window].tolist())
        result.append(best + list(range(n - window, n)))
    return result


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize(("kernel", "pooling"), [(1, "mean"), (5, "mean"), (3, "max")])
def test_snapkv_is_the_authors_row_by_row(kv_heads, kernel, pooling):
    positions = torch.stack([row(30), row(22, left=8), row(25, right=5), row(20, left=4, right=6)])
    context = make_context(positions, positions, kv_heads=kv_heads)
    found = kept(policies.get("snapkv")(window=4, kernel=kernel, pooling=pooling), context, 12)
    for b, rows in enumerate(found):
        assert rows == snapkv_by_hand(context, b, 12, 4, kernel, pooling)


def test_snapkv_keeps_its_window_and_all_of_a_short_row():
    positions = torch.stack([row(16), row(3, left=13)])
    context = make_context(positions[:, -6:], positions)
    long, short = kept(policies.get("snapkv")(window=4), context, 4)
    assert long == [[12, 13, 14, 15]] * 2
    assert short == [[0, 1, 2]] * 2


# ---- budgets ----


@pytest.mark.parametrize(
    ("budget", "wanted"),
    [(5, (5, 5, 5)), (0.25, (0.25,) * 3), (1.0, (1.0,) * 3), ([4, 0.5, 6], (4, 0.5, 6)), (range(2, 5), (2, 3, 4))],
)
def test_a_budget_is_for_all_layers_or_one_for_each(budget, wanted):
    got = budgets.per_layer(budget, 3)
    assert got == wanted and list(map(type, got)) == list(map(type, wanted))


@pytest.mark.parametrize("budget", [0, -3, 0.0, -0.5, 1.5, math.nan, math.inf, True, "8", None, 1j, [4, 4], [4, 4, 0]])
def test_a_bad_budget_raises_one_sentence(budget):
    with pytest.raises(ValueError, match="budget") as error:
        budgets.per_layer(budget, 3)
    assert "\n" not in str(error.value)


def test_a_budget_below_the_policys_least_raises():
    with pytest.raises(ValueError, match="at least 5"):
        budgets.per_layer(4, 2, policies.get("sink_window")(sinks=4).least)


def test_a_share_is_of_each_rows_own_tokens():
    lengths = torch.tensor([40, 30, 3])
    assert budgets.tokens(0.1, lengths, least=2).tolist() == [4, 3, 2]
    assert budgets.tokens(1.0, lengths).tolist() == [40, 30, 3]
    assert budgets.tokens(7, lengths).tolist() == [7, 7, 7]
