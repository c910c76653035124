"""The answer of a comparison in words: what to take, what it gains, what it loses."""

from __future__ import annotations

from typing import Any

# What counts as keeping the model's quality. Perplexity within five percent is below what readers notice between
# checkpoints of a model; of eight needles one may go, since a needle more or less is also luck.
PERPLEXITY = 1.05
NEEDLES = 1 / 8 + 1e-9


def keeps_quality(row: dict[str, Any], dense: dict[str, Any]) -> bool:
    quality = row["quality"]
    return (
        quality["perplexity_ratio"] <= PERPLEXITY
        and quality["needle_accuracy"] >= dense["quality"]["needle_accuracy"] - NEEDLES
    )


def gain(row: dict[str, Any], dense: dict[str, Any], speed: str) -> float | None:
    """How many times as fast as dense, or None if the spreads of the two overlap."""
    ours, theirs = row["speed"][speed], dense["speed"][speed]
    if speed == "prefill_s":
        return theirs["median"] / ours["median"] if ours["max"] < theirs["min"] else None
    return ours["median"] / theirs["median"] if ours["min"] > theirs["max"] else None


def winner(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Of the rows that keep quality, the one that gains most: memory freed times speed, where speed is beyond doubt."""
    dense = rows[0]

    def worth(row: dict[str, Any]) -> float:
        memory = row["memory"]["cache_bytes"] / dense["memory"]["cache_bytes"] if row["label"] == "freed" else 1.0
        fast = (gain(row, dense, "prefill_s") or 1.0) * (gain(row, dense, "decode_tokens_per_s") or 1.0)
        return fast / memory

    able = [row for row in rows[1:] if keeps_quality(row, dense) and worth(row) > 1.05]
    return max(able, key=worth, default=None)


def answer(results: dict[str, Any]) -> str:
    """One or two sentences. Also sets results["winner"], the winning row's spec or None."""
    rows = [row for row in results["rows"] if not row.get("error")]
    results["winner"] = None
    if len(rows) < 2:
        return ""
    dense, best = rows[0], winner(rows)
    where = f"{results['model']['name']}, a prompt of {results['context']} tokens, on {_device(results)}"
    needles = len(dense["quality"]["needle"])
    if best is None:
        return (
            f"Stay with dense attention ({where}): of {len(rows) - 1} others none kept its perplexity within "
            f"{PERPLEXITY - 1:.0%} and its needles within one while saving memory or time beyond the runs' spread."
        )
    results["winner"] = best["spec"]
    return (
        f"Take {best['spec']} ({where}): {_gains(best, dense)}, for {_change(best['quality']['perplexity_ratio'])} "
        f"in perplexity and {_found(best, needles)} needles found, where dense finds {_found(dense, needles)}."
    )


def _gains(row: dict[str, Any], dense: dict[str, Any]) -> str:
    parts = []
    if row["label"] == "freed":
        ours, theirs = row["memory"]["cache_bytes"], dense["memory"]["cache_bytes"]
        parts.append(f"a cache of {ours / 1e6:.1f} MB instead of {theirs / 1e6:.1f}")
    if (fast := gain(row, dense, "decode_tokens_per_s")) is not None:
        parts.append(f"decoding {fast:.2f} times as fast")
    if (fast := gain(row, dense, "prefill_s")) is not None:
        parts.append(f"the prompt read {fast:.2f} times as fast")
    return " and ".join(parts)


def _change(ratio: float) -> str:
    return f"{ratio - 1:+.1%}"


def _found(row: dict[str, Any], needles: int) -> str:
    return f"{round(row['quality']['needle_accuracy'] * needles)} of {needles}"


def _device(results: dict[str, Any]) -> str:
    machine = results["machine"]
    threads = machine["threads"]
    return f"{threads} CPU thread{'s' * (threads != 1)}" if machine["device"] == "cpu" else machine["device"]
