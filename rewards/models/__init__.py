"""Models that scorers and detectors stand on."""
