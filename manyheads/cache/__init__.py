"""What stays in a cache of keys and values: policies score the stored tokens, a budget says how many stay."""

from manyheads.cache import policies
from manyheads.cache.policy import Context, Policy, Recipe, policy

__all__ = ["Context", "Policy", "Recipe", "policies", "policy"]
