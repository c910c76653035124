"""Layers that share heads: what heads share, which of them speak, and what of their projections can go."""
