"""A reward server: who is let in, what is held at once, what is asked and answered."""
