"""Sentences on what the numbers of a comparison show, and what they do not."""

from experiment.comparison.formatting import count, limits, p_text, percent
from experiment.comparison.plan import Plan
from experiment.comparison.results_table import REFERENCE, Difference, ResultsTable
from experiment.comparison.statistics import Interval

ASKED = ("bn", "syncbn")  # how does their error change with the batch?
UNDER_TRAINED = 2.0  # times the train error of the reference
EXPLORATORY = "Exploratory: "  # before each sentence on what was not stated beforehand


def draw_conclusions(results: ResultsTable, plan: Plan) -> dict[str, list[str]]:
    """Answer the comparison's questions, a list of sentences for every world size.

    Args:
        results: The cells.
        plan: What was stated beforehand to be tested.
    """
    if not results.done:
        return {"": ["No cell has finished, so nothing can be told."]}
    planned = plan.differences(results)
    sentences = {}
    for world_size in results.world_sizes:
        lines = [line for line in planned if line.world_size == world_size]
        found = [_against(line, plan.verdict(line)) for line in lines]
        found += _missing(plan, lines) if world_size in plan.world_sizes else []
        others = [_change(results, label, world_size, plan.margin) for label in ASKED]
        others += _training(results, world_size)
        sentences[count(world_size, "rank")] = [*found, *(EXPLORATORY + sentence for sentence in others)]
    return sentences


def _missing(plan: Plan, lines: list[Difference]) -> list[str]:
    ended = [(line.label, line.against) for line in lines]
    where = f"at {_per_rank(plan.per_rank_batch_size)}"
    return [
        f"Stated beforehand: {first} was to be compared with {second} {where}, and no seed has both."
        for first, second in plan.pairs
        if (first, second) not in ended
    ]


def _against(line: Difference, verdict: str) -> str:
    where = f"at {_per_rank(line.batch)} {line.label} has"
    how = (
        f"the test error of {line.against}"
        if line.interval.mean == 0
        else f"{_points(line.interval, 'more', 'less')} test error than {line.against}"
    )
    facts = _certainty(line.interval) + ("" if line.p is None else f", corrected p {_p(line)}")
    return f"Stated beforehand: {where} {how} ({facts}): {verdict}."


def _change(results: ResultsTable, label: str, world_size: int, margin: float) -> str:
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
    return f"{_change_verdict(label, line, margin)}: {facts}."


def _change_verdict(label: str, line: Difference, margin: float) -> str:
    lower, upper = line.interval.lower, line.interval.upper
    if line.p is None or lower is None or upper is None:
        return f"whether {label} changes with the batch cannot be told from one seed"
    if lower >= -margin and upper <= margin:
        return f"{label} changes with the batch by less than {percent(margin)} points"
    if line.interval.half and (lower > 0 or upper < 0):
        return f"{label} {'degrades' if lower > 0 else 'is better'} at small batches"
    return f"no change of {label} with the batch is seen, but its interval holds {percent(margin)} points and more"


def _training(results: ResultsTable, world_size: int) -> list[str]:
    """Name the arms that fit the training images far less than syncbn, whichever statistics read them."""
    batch, known = results.batches(world_size)[0], dict[str, float]()
    for label in results.labels:
        errors = [results.mean(label, world_size, batch, mode, "train_error") for mode in results.modes]
        if means := [error.mean for error in errors if error is not None]:
            known[label] = min(means)
    if REFERENCE not in known:
        return []
    limit = max(UNDER_TRAINED * known[REFERENCE], known[REFERENCE] + 0.005)
    far = [f"{label} {percent(error)} %" for label, error in known.items() if error > limit]
    if not far:
        return []
    return [
        f"at {_per_rank(batch)} the train error, with the statistics that are best for each arm, is more than twice "
        f"that of {REFERENCE} ({percent(known[REFERENCE])} %) for {', '.join(far)}: "
        "these arms fit the training images less, too."
    ]


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
