"""Linear: a state instead of a cache, or a few templates instead of all keys."""
