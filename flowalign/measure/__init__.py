"""Evaluations of checkpoints, and distances between sets of images."""
