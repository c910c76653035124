"""Toy tasks, each of which decides one claim: small enough for a CPU, most of them. A file for each: its data, its
model, and its EXPERIMENT, which is found by walking this folder.

The thresholds are those that a claim needs to be true in kind (solved or not solved), or the paper's own ratio.
"""
