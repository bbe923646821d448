"""Samples of a checkpoint or a policy, and their scores."""
