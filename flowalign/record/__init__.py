"""Records of a run, written and read again: files, checkpoints, metrics, locks, requests to end."""
