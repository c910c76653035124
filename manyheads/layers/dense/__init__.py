"""Layers in which every token scores every other that it may see."""
