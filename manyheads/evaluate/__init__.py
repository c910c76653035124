"""What a mechanism costs and what it changes, measured with real models on real text."""
