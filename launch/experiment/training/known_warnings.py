"""Warnings of other libraries that are silenced, each with the reason."""

import logging
import warnings

KNOWN = (
    r".*isinstance\(treespec, LeafSpec\).*",  # Lightning 2.6 uses a name that torch 2.14 renamed
    r".*does not have many workers.*",  # images in memory are read faster without workers
    r"Grad strides do not match bucket view strides.*",  # 1x1 kernels: strides of length-1 dimensions, no copy
    r"Total length of `list` across ranks is zero.*",  # a source without validation images
    r"You're resuming from a checkpoint that ended before the epoch.*",  # see TrainBatches.resume
    r"The `srun` command is available on your system but is not used.*",  # torchrun on a machine that has SLURM
    r".*``compute`` method of metric .* was called before the ``update``.*",  # more ranks than images to evaluate
)


def ignore_known_warnings() -> None:
    """Silence the warnings above and no others, and Lightning's hints below the level of a warning."""
    for message in KNOWN:
        warnings.filterwarnings("ignore", message=message)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
