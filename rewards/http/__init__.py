"""The client of a reward server: one deadline over a request, retries, replicas."""
