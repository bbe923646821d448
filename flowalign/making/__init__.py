"""Work of the commands that make something of a model or a source: pairs, preferences, banks, merges, calibrations."""
