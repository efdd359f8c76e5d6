"""Measurements of speed, collectives and memory, with peers beside us in the same run: `launch/bench.py`."""
