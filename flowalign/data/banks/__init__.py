"""Latents on disk: written, found again, and drawn from."""
