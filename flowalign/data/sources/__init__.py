"""Prompts as people have them: text, tables, JSON Lines, parquet, folders of these, data sets of ``datasets``."""
