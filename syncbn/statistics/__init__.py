"""Statistics after training: recomputed over many batches and ranks, averaged, frozen."""
