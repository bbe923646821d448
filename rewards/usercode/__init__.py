"""Python files of users: found, read, kept as they were, and run."""
