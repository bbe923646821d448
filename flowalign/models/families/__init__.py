"""One module a model family, each with a value ``FAMILY``."""
