"""Sentences on what the numbers of a comparison show, and what they do not."""

from experiment.comparison.formatting import count, limits, p_text, percent
from experiment.comparison.results_table import REFERENCE, Difference, ResultsTable
from experiment.comparison.statistics import SIGNIFICANCE, Interval

NEAR = 0.02  # of error: an arm whose change surely lies within 2 points stays near, is flat, does not degrade
QUESTIONS = {  # asked arm: what it does if its change surely lies within NEAR
    "bn": "does not degrade at small batches",
    "syncbn": "stays near its large-batch error",
    "gn": "is flat",
}


def draw_conclusions(results: ResultsTable) -> dict[str, list[str]]:
    """Answer the comparison's questions, a list of sentences for every world size."""
    if not results.done:
        return {"": ["No cell has finished, so nothing can be told."]}
    differences = results.differences()
    sentences = {}
    for world_size in results.world_sizes:
        found = [_change(results, label, world_size) for label in QUESTIONS]
        found += [_against(line) for line in _smallest(differences, world_size)]
        sentences[count(world_size, "rank")] = found
    return sentences


def _change(results: ResultsTable, label: str, world_size: int) -> str:
    """Say how an arm's error at its smallest batch differs from that at its largest."""
    batches = results.batches(world_size, label)
    if not batches:
        return f"{label} has no finished cell, so nothing can be told about it."
    if len(batches) == 1:
        return f"{label} was run at one batch size, so how it changes with the batch cannot be told."
    small, large = batches[0], batches[-1]
    line = next((line for line in results.changes(label, world_size) if line.batch == small), None)
    if line is None:
        return f"{label} has no seed finished both at {small} and at {large} per rank, so its change cannot be told."
    if line.interval.mean == 0:
        how = f"the same at {_per_rank(small)} as at {large}"
    else:
        how = f"{_points(line.interval, 'higher', 'lower')} at {_per_rank(small)} than at {large}"
    facts = f"its test error is {how} ({_certainty(line.interval)})"
    return f"{_verdict(label, line)}: {facts}."


def _verdict(label: str, line: Difference) -> str:
    change, lower, upper = line.interval, line.interval.lower, line.interval.upper
    if line.p is None or lower is None or upper is None:
        return f"Whether {label} changes with the batch cannot be told from one seed"
    if lower >= -NEAR and upper <= NEAR:
        return f"{label} {QUESTIONS[label]}, within {100 * NEAR:.0f} points"
    if line.p < SIGNIFICANCE:
        return f"{label} {'degrades' if change.mean > 0 else 'is better'} at small batches"
    large = f"{100 * NEAR:.0f} points or more"
    return f"No change of {label} with the batch is shown, but {change.n} seeds cannot exclude one of {large}"


def _smallest(differences: list[Difference], world_size: int) -> list[Difference]:
    """The differences of the asked arms to syncbn at the smallest batch of each."""
    here = [line for line in differences if line.world_size == world_size and line.label in QUESTIONS]
    firsts: dict[str, Difference] = {}
    for line in here:  # batches rise
        firsts.setdefault(line.label, line)
    return list(firsts.values())


def _against(line: Difference) -> str:
    where = f"at {_per_rank(line.batch)} {line.label} has"
    how = (
        f"the test error of {REFERENCE}"
        if line.interval.mean == 0
        else f"{_points(line.interval, 'more', 'less')} test error than {REFERENCE}"
    )
    if line.p is None:
        return f"Compared seed by seed, {where} {how}; from one seed, so whether that is real cannot be told."
    real = "this is real" if line.verdict == "yes" else "that this is real is not shown"
    return f"Compared seed by seed, {where} {how} ({_certainty(line.interval)}): {real} (corrected p {_p(line)})."


def _p(line: Difference) -> str:
    text = p_text(line.corrected)
    return text if text.startswith("<") else f"= {text}"


def _points(change: Interval, up: str, down: str) -> str:
    return f"{percent(abs(change.mean))} points {up if change.mean > 0 else down}"


def _certainty(change: Interval) -> str:
    if change.half is None:
        return "n = 1"
    return f"95 % interval of the difference {limits(change)}, n = {change.n} seeds"


def _per_rank(batch: int) -> str:
    return f"{count(batch, 'image')} per rank"
