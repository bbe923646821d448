"""What goes wrong with models."""

from __future__ import annotations


class ModelError(ValueError):
    """A model directory that is missing, incomplete or of the wrong kind."""
