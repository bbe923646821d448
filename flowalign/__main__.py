"""``python -m flowalign``."""

from flowalign.cli import app

app(prog_name="flowalign")
