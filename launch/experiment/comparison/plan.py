"""What a comparison states before its first run: which differences it tests, and which it would not care about."""

from dataclasses import dataclass

from experiment.comparison.formatting import percent
from experiment.comparison.results_table import Difference, ResultsTable
from experiment.comparison.statistics import SIGNIFICANCE, holm, seeds_to_settle


@dataclass(frozen=True)
class Plan:
    """Pairs of arms, compared at one batch size of every world size.

    Args:
        pairs: The arms; the difference is the error of the first less that of the second.
        per_rank_batch_size: The smallest of the grid.
        world_sizes: Those of the grid.
        margin: A difference of error that surely is smaller than this is none to care about.
    """

    pairs: tuple[tuple[str, str], ...] = ()
    per_rank_batch_size: int = 1
    world_sizes: tuple[int, ...] = ()
    margin: float = 0.02

    @property
    def num_tests(self) -> int:
        """Count the tests that were stated, whether their runs have ended or not."""
        return len(self.pairs) * len(self.world_sizes)

    def differences(self, results: ResultsTable) -> list[Difference]:
        """Test what has results; the p values are corrected for all that was stated."""
        found = [
            results.difference((first, world_size, self.per_rank_batch_size), second)
            for world_size in self.world_sizes
            for first, second in self.pairs
        ]
        lines = [line for line in found if line is not None]
        corrected = holm([line.p for line in lines], self.num_tests)
        return [line.with_corrected(p) for line, p in zip(lines, corrected, strict=True)]

    def verdict(self, line: Difference) -> str:
        """Say what a difference comes to: shown, smaller than the margin, or how many seeds would settle it."""
        lower, upper = line.interval.lower, line.interval.upper
        if line.corrected is None or lower is None or upper is None:
            return "one seed cannot settle it"
        if lower >= -self.margin and upper <= self.margin:
            small = f"less than {percent(self.margin)} points"
            return f"shown, and {small}" if line.corrected < SIGNIFICANCE else small
        if line.corrected < SIGNIFICANCE:
            return "shown"
        n = seeds_to_settle(line.interval, SIGNIFICANCE / self.num_tests, self.margin)
        return "open" if n is None else f"open; {n} new seeds, in an output_dir of their own, would probably settle it"
