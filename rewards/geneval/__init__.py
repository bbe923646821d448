"""GenEval's rows and judge, its colours, and the detectors that find the objects."""
