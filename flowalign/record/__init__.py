"""What a run writes down and reads again: files, checkpoints, metrics, locks, requests to end."""
