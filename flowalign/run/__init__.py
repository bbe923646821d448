"""A run: its loop, its learner, its workers in one process, and what it writes while it goes. Free of Ray."""
