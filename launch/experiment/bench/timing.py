"""Time contenders in turn, and compare what was measured in the same round.

A machine that others use too is now faster, now slower. So every round runs each contender once, and a ratio is taken
within a round before the median is taken over rounds. What ran before leaves its mark on caches and on the memory
allocator (the same code behind two different others was seen 15 % apart), so each round has an order of its own.
"""

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch

Times = dict[str, list[float]]  # seconds of every round, by contender
NUM_WARM_UP = 3  # rounds that are not counted: caches fill, kernels compile


class Quartiles(NamedTuple):
    """A quarter of the values lies below ``low``, a quarter above ``high``."""

    low: float
    median: float
    high: float


def interleave(
    contenders: Mapping[str, Callable[[], object]],
    num_rounds: int,
    around: Callable[[str], AbstractContextManager[Any]] = nullcontext,
    device: str = "cpu",
) -> Times:
    """Time every contender once per round, in an order drawn by the number of the round: the same on all ranks.

    Args:
        contenders: What to run, by name.
        num_rounds: Rounds that count; some go before that do not.
        around: Makes a context for a contender's name that is entered before its clock starts.
        device: "cuda" waits for the GPU at both ends.
    """
    names = list(contenders)
    times: Times = {name: [] for name in names}
    with _without_garbage_collection():
        for number in range(-NUM_WARM_UP, num_rounds):
            for name in random.Random(number).sample(names, len(names)):
                with around(name):
                    seconds = _time(contenders[name], device)
                if number >= 0:
                    times[name].append(seconds)
    return times


def _time(contender: Callable[[], object], device: str) -> float:
    synchronize(device)
    start = time.perf_counter()
    result = contender()
    synchronize(device)
    seconds = time.perf_counter() - start
    del result  # freeing it is not timed
    return seconds


def synchronize(device: str) -> None:
    """Wait for the GPU, if there is one."""
    if device == "cuda":
        torch.cuda.synchronize()


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def slowest(times_of_ranks: Sequence[Times]) -> Times:
    """Take for each contender and round the time of the rank that took longest."""
    first, *_ = times_of_ranks
    return {name: [max(t) for t in zip(*(times[name] for times in times_of_ranks), strict=True)] for name in first}


def quartiles(values: Sequence[float]) -> Quartiles:
    """Compute the quartiles of two or more values."""
    return Quartiles(*statistics.quantiles(values, n=4, method="inclusive"))


def ratios(times: Times, name: str, base: str) -> list[float]:
    """Divide a contender's time by that of ``base`` in the same round."""
    return [mine / others for mine, others in zip(times[name], times[base], strict=True)]


def geometric_mean(values: Sequence[float]) -> float:
    """Compute ``exp(mean(log(value)))``."""
    return math.exp(statistics.fmean(map(math.log, values)))


def summarize(times: Times, bases: Sequence[str]) -> list[dict[str, Any]]:
    """Make a row of each contender.

    Returns:
        Rows of `contender`, `ms` (quartiles) and `ratios`: the quartiles of the ratios within a round, by base; a base
        that did not run is left out.
    """
    return [
        {
            "contender": name,
            "ms": quartiles([1e3 * seconds for seconds in times[name]]),
            "ratios": {base: quartiles(ratios(times, name, base)) for base in bases if base in times},
        }
        for name in times
    ]
