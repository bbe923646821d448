"""Optimizers over one or more ranks: `build.build_engine` and the contract in ``base``."""
