"""Looks at what a run would stand on: this machine, or a model."""
