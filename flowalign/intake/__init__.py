"""From YAML and overrides to a checked run: reads, resolves paths, and says what is wrong before anything starts."""
