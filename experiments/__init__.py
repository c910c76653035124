"""Training experiments: what published attention systems claim to be good for, tried in small."""
