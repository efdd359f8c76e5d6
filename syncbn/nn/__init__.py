"""Layers: SyncBatchNorm, GhostBatchNorm, and what conversion can put in the place of a BatchNorm."""
