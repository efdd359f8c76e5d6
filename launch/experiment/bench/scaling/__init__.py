"""How the cost grows with ranks and network delay: measurements and a cost model."""
