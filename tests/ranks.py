"""Run a function on W ranks: processes that stay alive between tests, a fresh process group for each call.

A test calls ``run(function, world_size, *args)`` and gets the list of what ``function(rank, world_size, *args)``
returned. The function must stand at the top level of a test module. An error on any rank raises `RankError` with that
rank's traceback; ranks that do not answer in time are named, and all processes are replaced.
"""

import builtins
import warnings

from versions import IS_DEVELOPMENT, MAY_WARN

from experiment.bench.rank_pool import RankError, RankPool

__all__ = ["RankError", "Ranks", "device"]
TIMEOUT = 60  # seconds for one call; a compiling test asks for more

_device_type = "cpu"  # of this process, where it is a rank


def device():
    """Return the device of this rank: its GPU, which it may share with others, else the CPU."""
    import torch

    return torch.device("cuda", torch.cuda.current_device()) if _device_type == "cuda" else torch.device("cpu")


class Ranks(RankPool):
    """A pool of rank processes in which warnings are errors, as they are in this one."""

    def __init__(self, folder, device="cpu"):
        super().__init__(folder, device, 1, ["torch", "torch.distributed", "syncbn"], _prepare)

    def run(self, function, world_size, *args, timeout=TIMEOUT, initialize=True):
        options = {"timeout": timeout, "initialize": initialize}
        try:
            return super().run(function, world_size, *args, **options)
        except RankError as error:
            if "connectFullMesh failed" not in str(error):  # gloo's, about once in ten suites, of new groups
                raise
            print(f"once more, since gloo did not connect the ranks: {error}")
            self.close()
            return super().run(function, world_size, *args, **options)


def _prepare(device):
    global _device_type
    _device_type = device
    warnings.simplefilter("error")
    for line in () if IS_DEVELOPMENT else MAY_WARN:
        action, message, category = line.split(":")
        warnings.filterwarnings(action, message, getattr(builtins, category))
    for message in ("`torch.jit.script", ".*autograd.function.Function.* should not be instantiated"):
        warnings.filterwarnings("ignore", message, DeprecationWarning)  # torch 2.13's own, while it compiles
    warnings.filterwarnings("ignore", "`torch.jit.script`", FutureWarning)  # torch's own, of jvp
    warnings.filterwarnings("ignore", "The `srun` command is available on your system but is not used")
