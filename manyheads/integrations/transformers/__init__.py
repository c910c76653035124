"""Hugging Face transformers 5: any mechanism and cache policy in an unpatched model, then its ordinary `generate`."""

from manyheads.integrations.transformers.applied import Applied, apply, label
from manyheads.integrations.transformers.layers import cache_bytes

__all__ = ["Applied", "apply", "cache_bytes", "label"]
