"""The page's sentences: the answer, what was run, what the figures mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from manyheads.evaluate.report.numbers import count, date, join
from manyheads.evaluate.report.rows import Row


def no_answer(rows: Sequence[Row]) -> str:
    if any(row["kind"] != "dense" and not row["error"] for row in rows):
        return "What each attention costs and what it loses"
    return "Nothing has been measured yet but dense attention" if rows else "Nothing has been measured yet"


def unfinished(rows: Sequence[Row], results: Mapping[str, Any]) -> str:
    here, planned = len(rows) + len(results.get("untrained") or []), len(results.get("asked") or [])
    if planned:
        return f"This run has not finished: {here} of {planned} rows are here."
    return f"This run has not finished: {here} row{' is' if here == 1 else 's are'} here."


def winner(results: Mapping[str, Any], done: Sequence[Row]) -> Row | None:
    """The row that the answer names; where none is told, the least loss among those that save memory or time."""
    if "winner" in results:
        named = results["winner"]
        return next((row for row in done if named and named in (row["spec"], row["raw"].get("id"))), None)
    able = [row for row in done if row["kind"] != "dense" and row["use"] and row["values"]["ratio"] is not None]
    able = [row for row in able if row["label"] == "freed" or (row["values"]["prefill_up"] or 0) > 1.05]
    return min(able, key=lambda row: row["values"]["ratio"], default=None)


def run(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What was run on what, in pairs of words."""
    machine, model, text = (results.get(key) or {} for key in ("machine", "model", "text"))
    versions = [
        f"{name} {where[name]}"
        for where, name in ((results, "manyheads"), (machine, "torch"), (machine, "transformers"), (machine, "python"))
        if where.get(name)
    ]
    shape = [
        f"{count(model[key])} {words}"
        for key, words in (("parameters", "parameters"), ("layers", "layers"), ("heads", "heads"),
                           ("kv_heads", "KV heads"), ("head_dim", "dimensions a head"))
        if model.get(key) is not None
    ]  # fmt: skip
    pairs = [
        ("command", results.get("command")),
        ("model", join([model.get("name"), *shape, model.get("dtype")])),
        ("text", join([text.get("name"), _tokens(text.get("tokens")),
                       text.get("sha256") and f"SHA-256 {text['sha256']}"])),
        ("context", _tokens(results.get("context"))),
        ("machine", join([machine.get("cpu"), machine.get("threads") and f"{machine['threads']} threads",
                          machine.get("device") and f"device {machine['device']}"])),
        ("versions", join(versions)),
        ("seed", results.get("seed")),
        ("repeats", results.get("repeats")),
        ("made", date(results.get("created"))),
    ]  # fmt: skip
    return [(word, str(value)) for word, value in pairs if value not in (None, "")]


def _tokens(value: Any) -> str:
    return "" if value is None else f"{count(value)} tokens"


def method(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What each figure means, in pairs of words."""
    repeats = results.get("repeats")
    times = f"the median of {repeats} runs" if isinstance(repeats, int) and repeats > 1 else "one run"
    told = [
        ("Saw", "the share of query and key pairs that were computed, of those that plain causal attention computes."),
        ("Mass", "what the softmax weights of dense attention on these pairs sum to, in the mean over queries and "
         "heads of two layers in the middle of the model, on the model's own queries and keys."),
        ("Perplexity", "exp of the mean loss on the text that follows the prompt, where a cache policy has already "
         "dropped what it drops; × is the ratio to dense on the same tokens. It is the same at each run."),
        ("KL", "how far the next-token distribution is from that of the dense model on the same tokens, in nats: "
         "0 means that the two agree. It sees changes that perplexity averages away."),
        ("Needles", "facts hidden in the prompt at several depths, asked for at its end: found if greedy decoding "
         "gives the answer. The questions come after the prompt was read and the cache was cut."),
        ("First token", f"seconds to read the prompt: {times}, with the least and the greatest below."),
        ("Decoding", f"tokens a second after the prompt, one by one: {times}, with the least and the greatest below."),
        ("Cache", "the bytes that the cache holds after the prompt, counted from its tensors. The label says whether "
         "what was dropped is really gone."),
        ("Bold", "the best in its column, and those that the spread of the runs does not tell from it. Dense "
         "competes in speed and memory alone."),
    ]  # fmt: skip
    return told + [("Also", str(note)) for note in results.get("notes") or []]
