"""The parts of `scripts/same_bits.py`: what it runs, in whose words, and how it compares."""
