"""`python -m manyheads.cli`."""

from manyheads.cli import app

app()
