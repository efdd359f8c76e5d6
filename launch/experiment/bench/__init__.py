"""Measurements of speed, collectives and memory, beside other implementations in the same run: `launch/bench.py`."""
