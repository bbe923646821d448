"""``python -m flowalign.cli``."""

from flowalign.cli import app

app(prog_name="flowalign")
