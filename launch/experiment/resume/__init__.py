"""Stop and resume a run: its directory, its progress, its checkpoints."""
