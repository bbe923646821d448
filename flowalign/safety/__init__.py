"""What a run shows of a collapse, and the alarms that follow."""
