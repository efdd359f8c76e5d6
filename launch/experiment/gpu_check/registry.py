"""The parts of the check, in the order they run: what each needs, and how long it may take."""

from dataclasses import dataclass

_HERE = "experiment.gpu_check"


@dataclass(frozen=True)
class Part:
    """One part, run in a process of its own.

    `target` names the function, as "module:function"; it takes the device's type and returns an `Outcome`. The limits
    are in seconds. `gib` is the GPU memory that must be free. `needs` are names that `requirements.unmet` knows; an
    optional part that lacks one is skipped.
    """

    name: str
    description: str
    target: str
    cuda_limit: float
    cpu_limit: float = 60
    gib: float = 1
    needs: tuple[str, ...] = ()
    is_optional: bool = False

    def limit(self, device: str) -> float:
        """Return the time limit, in seconds."""
        return self.cuda_limit if device == "cuda" else self.cpu_limit


# The first part that needs them builds the C++ kernels, at most 60 s on a slow machine: its CPU limit is longer. On a
# GPU several parts compile Triton's kernels, some 0.3 s each: `phases` some 300 of them, `layer` 70 or so.
# What says most comes first, as a caller may end the check.
PARTS = (
    Part("machine", "versions, bandwidth, cost of a launch", f"{_HERE}.machine:measure", 60),
    Part("phases", "each back end against float64", f"{_HERE}.phases:measure", 240, 150),
    Part(
        "nccl_one", "a group of one that exchanges all the same",
        f"{_HERE}.nccl_one_rank:measure", 60, gib=2, needs=("nccl",),
    ),
    Part("launches", "kernels and copies of a layer", f"{_HERE}.launches:measure", 60),
    Part("host_waits", "where the host waits for the GPU", f"{_HERE}.host_waits:measure", 60, gib=2, needs=("nccl",)),
    Part("layer", "time of a layer beside torch's", f"{_HERE}.layer:measure", 180, gib=4),
    Part("cuda_graph", "capture and replay against eager", f"{_HERE}.cuda_graph:measure", 60, gib=2,
         needs=("cuda", "nccl")),
    Part("determinism", "equal bits in 200 runs, and on two streams", f"{_HERE}.determinism:measure", 60, gib=2,
         needs=("nccl",)),
    Part(
        "ranks_one_gpu", "the matrix of tests on gloo ranks that share a GPU, and a DDP step",
        f"{_HERE}.rank_tests:measure_shared", 180, 180, gib=8, needs=("pytest",),
    ),
    Part(
        "nccl_ranks", "the matrix of tests with a GPU per rank",
        f"{_HERE}.rank_tests:measure_gpus", 180, gib=8, needs=("2 gpus", "nccl", "pytest"),
    ),
    Part("step", "a training step of a ResNet-50", f"{_HERE}.training_step:measure", 180, gib=12),
    Part("large", "Triton on more than 2**31 values", f"{_HERE}.large_tensors:measure", 60, gib=24,
         needs=("cuda", "triton"), is_optional=True),
    Part("memory", "what a layer saves and allocates", f"{_HERE}.memory:measure", 60, gib=2),
    Part("compile", "torch.compile against float64", f"{_HERE}.torch_compile:measure", 120, 120, gib=2,
         needs=("nccl", "triton")),
)  # fmt: skip


def choose(names: str) -> tuple[Part, ...]:
    """Return the parts of a comma-separated list, in their order; all for an empty one.

    Raises:
        ValueError: For a name that no part has.
    """
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    known = [part.name for part in PARTS]
    for name in wanted:
        if name not in known:
            raise ValueError(f"expected parts of {', '.join(known)}, got {name!r}")
    return tuple(part for part in PARTS if part.name in wanted) if wanted else PARTS
