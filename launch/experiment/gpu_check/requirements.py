"""What a part needs of the machine, and what to say where it is missing."""

import importlib
import warnings

import torch
import torch.distributed as dist

from .registry import Part
from .result import FAILED, SKIPPED

GIB = 2**30


def unmet(part: Part, device: str) -> tuple[str, str] | None:
    """Return the status of a part that cannot run here, and what it needs; None if it can.

    What a CPU cannot do, and what takes more GPUs, is skipped. On a GPU all else that is missing leaves the check
    incomplete, and is a failure, but for an optional part.
    """
    if device == "cpu":
        if "cuda" in part.needs:
            return SKIPPED, "needs a CUDA GPU"
        if "2 gpus" in part.needs:
            return SKIPPED, "needs 2 CUDA GPUs"
    elif "2 gpus" in part.needs and num_gpus() < 2:
        return SKIPPED, f"needs 2 GPUs, {num_gpus()} is here"
    for text in (_package(part, device), _memory(part, device)):
        if text is not None:
            return SKIPPED if part.is_optional else FAILED, text
    return None


def _package(part: Part, device: str) -> str | None:
    if "pytest" in part.needs and (problem := import_problem("pytest")):
        return f"needs pytest (pip install pytest): {problem}"
    if device == "cpu":
        return None
    if "nccl" in part.needs and not has_nccl():
        return f"needs NCCL, which this torch ({torch.__version__}) was built without"
    if "triton" in part.needs and (problem := import_problem("triton")):
        return f"needs Triton (pip install triton): {problem}"
    return None


def _memory(part: Part, device: str) -> str | None:
    if device == "cpu":
        return None
    wanted = f"needs {part.gib:g} GiB free on cuda:0"
    try:
        free, total = free_memory()
    except RuntimeError as error:  # too full for a context
        return f"{wanted}, and could not even look: {str(error).splitlines()[0]}"
    if free >= part.gib * GIB:
        return None
    return f"{wanted}, {free / GIB:.1f} GiB are free of {total / GIB:.0f}"


def num_gpus() -> int:
    """Count the GPUs that torch sees."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a driver that is missing or too old; `why_no_gpu` says so
        return torch.cuda.device_count() if torch.cuda.is_available() else 0


def why_no_gpu() -> str:
    """Say what torch sees where it sees no GPU."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        is_available = torch.cuda.is_available()
    said = "".join(f"; {str(warning.message).splitlines()[0]}" for warning in caught)
    return f"torch {torch.__version__}: torch.cuda.is_available() is {is_available}{said}"


def has_nccl() -> bool:
    """Whether this torch can make NCCL groups."""
    return dist.is_available() and dist.is_nccl_available()


def import_problem(name: str) -> str:
    """Return why a module does not import, or nothing."""
    try:
        importlib.import_module(name)
    except Exception as error:  # of any kind, from a broken installation too
        return f"{type(error).__name__}: {error}"
    return ""


def free_memory() -> tuple[int, int]:
    """Return the free and the total memory of the first GPU, in bytes; makes a context there."""
    free, total = torch.cuda.mem_get_info(0)
    return free, total
