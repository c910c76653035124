"""Sparse: fixed or chosen subsets of the keys."""
