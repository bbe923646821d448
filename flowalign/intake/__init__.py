"""Intake of YAML and overrides as a checked run: it reads, resolves paths, and says what is wrong before anything
starts."""
