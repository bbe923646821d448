"""Configurations of other projects, read without running them, and what they are here."""
