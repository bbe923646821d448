"""What commands make from a model or a source: pairs, preferences, banks, merges, calibrations."""
