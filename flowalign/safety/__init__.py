"""Signs of a collapse in a rollout, and the alarms that follow."""
