"""What the rows of a claim amount to: an interval and a verdict for each part, and one verdict for the sentence."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from experiment.claims.claim import At, Claim, Part
from experiment.claims.runs import Row
from experiment.claims.selection import Choice, choices, wanted
from experiment.claims.verdicts import OPEN, whole
from experiment.comparison.formatting import MINUS
from experiment.comparison.statistics import Interval, holm, mean_interval


@dataclass(frozen=True)
class Finding:
    """The interval of a part's quantity over the seeds, and the verdict of its rule."""

    part: Part
    interval: Interval | None
    verdict: str
    p_value: float | None  # of the rule, not corrected
    seeds_needed: int | None  # about how many would decide an open part; None if it is not open, or no number would
    num_left_out: int  # seeds without the number, since a run failed or gave none

    @property
    def estimate(self) -> str:
        """Write mean, half of the interval and unit."""
        unit = self.part.rule.unit
        if self.interval is None:
            return "no result"
        if self.interval.half is None:
            return f"{number(self.interval.mean, sign=True)} {unit} (n = 1)"
        return f"{number(self.interval.mean, sign=True)} ± {number(self.interval.half)} {unit}"

    @property
    def limits(self) -> str:
        """Write the ends of the interval."""
        if self.interval is None or self.interval.lower is None or self.interval.upper is None:
            return "none"
        return f"{number(self.interval.lower, sign=True)} to {number(self.interval.upper, sign=True)}"


@dataclass(frozen=True)
class Outcome:
    """All that the page says about one claim."""

    claim: Claim
    seeds: Sequence[int]
    findings: list[Finding]
    choices: list[Choice]
    rows: list[Row]  # that report
    failed: list[Row]
    is_complete: bool

    @property
    def verdict(self) -> str:
        """The verdict of the sentence."""
        return whole([finding.verdict for finding in self.findings], needs_all=self.claim.needs_all)

    @property
    def line(self) -> str:
        """The numbers in one line."""
        return "; ".join(f"{finding.part.label}: {finding.verdict} ({finding.estimate})" for finding in self.findings)


def find(claim: Claim, seeds: Sequence[int], rows: Mapping[str, Row]) -> Outcome:
    """Judge every part of a claim by the rows with these seeds, whose order changes nothing."""
    ours = [rows[cell] for cell in sorted(rows) if rows[cell]["claim"] == claim.name]
    done = [row for row in ours if row["status"] == "done"]
    chosen = choices(claim, rows)
    rates = [(choice.setting, choice.rate) for choice in chosen]
    reported = [row for row in done if row["seed"] in seeds and _is_current(claim, row, rates)]
    return Outcome(
        claim,
        seeds,
        [_judge(part, reported, seeds) for part in claim.parts],
        chosen,
        reported,
        [row for row in ours if row["status"] != "done"],
        not wanted(claim, seeds, rows),
    )


def _is_current(claim: Claim, row: Row, rates: Sequence[tuple[object, float | None]]) -> bool:
    """Whether a row reports on a setting of the claim, at the rate that is chosen now."""
    if row["phase"] != "report" or row["setting"] not in claim.settings:
        return False
    return not claim.rates or (claim.tuned_as(row["setting"]), row["rate"]) in rates


def _judge(part: Part, rows: Sequence[Row], seeds: Sequence[int]) -> Finding:
    values = []
    for seed in seeds:
        try:
            values.append(part.value(At(rows, seed)))
        except LookupError:
            continue
    rule, num_left_out = part.rule, len(seeds) - len(values)
    by_student = mean_interval(values) if values else None
    interval = None if by_student is None else rule.widen(by_student)
    verdict = OPEN if num_left_out else rule.judge(interval)  # those left out may be those that would decide otherwise
    needed = rule.seeds_needed(by_student) if verdict == OPEN and not num_left_out else None
    return Finding(part, interval, verdict, rule.p_value(by_student), needed, num_left_out)


def corrected_p(outcomes: Sequence[Outcome]) -> list[list[float | None]]:
    """Give the p value of every part, by outcome, corrected by Holm for the number of all of them."""
    found = [finding for outcome in outcomes for finding in outcome.findings]
    p_values = iter(holm([finding.p_value for finding in found], len(found)))
    return [list(islice(p_values, len(outcome.findings))) for outcome in outcomes]


def number(value: float, *, sign: bool = False) -> str:
    """Write a number with two digits behind the point, more where it would be zero, fewer where it is large."""
    size = abs(value)
    digits = 2 if size >= 0.005 else 4
    text = f"{value:{'+' if sign else ''}.{1 if size >= 100 else digits}f}"
    return "0" if float(text) == 0 else text.replace("-", MINUS)
