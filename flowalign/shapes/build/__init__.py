"""Trains the embedded world's networks from procedural data; the only part of ``shapes`` that needs torch."""
