"""What processes leave for each other in a run directory: who holds it, and who asks it to end."""
