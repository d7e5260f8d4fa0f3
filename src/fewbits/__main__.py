"""`python -m fewbits`."""

from fewbits.cli import app

app()
