"""The comparison: cells of a grid, run one after another, and the report of their results."""
