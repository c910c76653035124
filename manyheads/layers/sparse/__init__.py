"""Layers that choose which tokens each head attends to."""
