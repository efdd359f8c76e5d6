"""The comparison: a grid of runs, each called a cell, and the report of their results."""
