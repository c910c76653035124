"""Errors about names say what was given, what is nearest and what is allowed."""

from collections.abc import Iterable
from difflib import get_close_matches


class UnknownName(KeyError):
    """A name that nothing has."""

    def __str__(self) -> str:  # KeyError would print the repr of the sentence
        return str(self.args[0])


MANY = 20  # names beyond which a sentence shows the nearest of them


def unknown(what: str, given: str, allowed: Iterable[str]) -> str:
    """One sentence for an unknown name."""
    allowed = sorted(allowed)
    near = get_close_matches(given, allowed, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    shown = allowed if len(allowed) <= MANY else get_close_matches(given, allowed, n=5, cutoff=0.0)
    rest = f" and {len(allowed) - len(shown)} more" if len(shown) < len(allowed) else ""
    return f"{given!r} is no {what}.{hint} Allowed: {', '.join(shown) or 'none'}{rest}."
