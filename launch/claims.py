"""Put sentences of textbooks about BatchNorm to the test, and report which hold as one page.

    python launch/claims.py                                # all: about two hours of one core
    python launch/claims.py 'claims=[sigmoid_and_tanh]'    # some
    python launch/claims.py 'claims=[small_batches]' 'seeds=[0,1,2,3,4,5,6,7]' jobs=2

Stopped at any moment, the same command goes on where it was. Results and report lie in `output_dir`.
"""

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from experiment.claims import page
from experiment.claims.claim import Claim
from experiment.claims.execute import execute_all, made_with
from experiment.claims.findings import Outcome
from experiment.claims.registry import pick
from experiment.claims.selection import SEEDS, wanted
from experiment.comparison.results_file import Results
from experiment.training.known_warnings import ignore_known_warnings

GRID = {"claims": 3}  # raise it when the experiments change: results of others are then refused


def num_jobs(given: object) -> int:
    """Check the number of runs at once; None for one per core."""
    if given is None:
        here = hasattr(os, "sched_getaffinity")  # not on macOS
        return len(os.sched_getaffinity(0)) if here else os.cpu_count() or 1
    if isinstance(given, bool) or not isinstance(given, int) or given < 1:
        raise ValueError(f"expected jobs to be a number of runs, at least 1, got {given!r}")
    return given


def seeds_of_results(given: Any) -> list[int] | None:
    """Check the seeds that were asked for; None for each claim's own."""
    if given is None:
        return None
    seeds = list(given) if isinstance(given, Sequence) and not isinstance(given, str) else []
    are_numbers = bool(seeds) and all(type(seed) is int for seed in seeds)
    if not are_numbers or len(set(seeds)) < len(seeds) or set(seeds) & set(SEEDS):
        kind = f"a list of numbers that differ, and none of {SEEDS}, which choose rates"
        raise ValueError(f"expected seeds to be {kind}; got {given}, write for example 'seeds=[0,1,2]'")
    return seeds


def check_versions(results: Results) -> None:
    """Refuse to add to results that do not compare with what would be added."""
    if results.others:
        raise ValueError(
            f"{results.path} holds results made with {' and '.join(results.others)}, and mixed results do not "
            "compare: set output_dir, or use those versions. Nothing was changed"
        )


def run_all(
    claims: Sequence[Claim], seeds: Sequence[int] | None, results: Results, jobs: int, console: Console
) -> None:
    """Run what has no row yet: first what chooses rates, then what reports."""
    for row in [row for row in results.rows.values() if row["status"] != "done"]:
        results.rows.pop(row["cell"])  # failed before: a new try
    with Progress(console=console, transient=True) as progress:
        for claim in claims:
            while todo := wanted(claim, seeds or claim.seeds, results.rows):
                check_versions(results)
                for row in progress.track(execute_all(todo, jobs), len(todo), description=claim.name):
                    results.append(row)


def command_of(claim: str | None) -> str:
    """Write the command that gives the same numbers, of one claim or of all that were asked for."""
    left_out = ["output_dir=", "jobs=", *([] if claim is None else ["claims="])]  # the first two change no number
    given = [argument for argument in sys.argv[1:] if not argument.startswith(tuple(left_out))]
    return shlex.join(["python", "launch/claims.py", *([] if claim is None else [f"claims=[{claim}]"]), *given])


def print_table(outcomes: Sequence[Outcome], console: Console) -> None:
    """Print the verdicts."""
    table = Table("sentence", "verdict", "numbers")
    for outcome in outcomes:
        failed = f" ({len(outcome.failed)} runs failed)" if outcome.failed else ""
        table.add_row(outcome.claim.sentence, outcome.verdict, Text(outcome.line + failed))
    console.print(table)


@hydra.main(version_base="1.3", config_path="../conf", config_name="claims")
def main(config: DictConfig) -> None:
    """Run what is missing, then report."""
    ignore_known_warnings()
    console = Console()
    claims, seeds = pick(config.claims), seeds_of_results(config.seeds)
    folder, jobs = Path(str(config.output_dir)), num_jobs(config.jobs)
    with Results(folder / "results.jsonl", GRID, made_with()) as results:
        for note in results.notes:
            console.print(note, markup=False)
        try:
            run_all(claims, seeds, results, jobs, console)
        except KeyboardInterrupt:
            console.print(f"stopped with {len(results.rows)} runs done; the same command goes on")
            sys.exit(130)
        outcomes = page.write_report(claims, seeds, results.rows, folder, command_of)
    print_table(outcomes, console)
    console.print(f"report: {folder / 'index.html'}", markup=False, soft_wrap=True)
    if any(outcome.failed for outcome in outcomes):
        sys.exit(1)


if __name__ == "__main__":
    main()
