"""The schema of configurations: sections, and what a number or a name in one may be. No torch, no YAML, no files."""
