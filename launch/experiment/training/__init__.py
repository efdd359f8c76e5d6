"""Train one model: data, models, tasks, how a batch is shared over the ranks, and the record of a run."""
