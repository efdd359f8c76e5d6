"""The settings of the runs as the page lists them, and its warnings about them."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

from experiment.comparison.formatting import MINUS, count
from experiment.comparison.results_table import ResultsTable, Row, is_number

MODES = {
    "rank0": "running statistics of rank 0, what DDP keeps and a checkpoint holds",
    "averaged": "running statistics averaged over the ranks",
    "precise": "statistics computed anew from training images after training",
    "batch": "the statistics of each test batch, as large as in training",
}
ISOLATE = {
    "accumulate": "accumulate: gradients are accumulated to one SGD batch, so only the normalization batch changes",
    "linear": "linear: the learning rate is scaled by the global batch; steps and SGD noise change with it",
    "sqrt": "sqrt: the learning rate is scaled by the root of the global batch; steps and SGD noise change with it",
    "none": "none: nothing is held constant; the SGD batch changes with the normalization batch",
}
WEAK = 0.5  # validation error of a choice that says little
ENGINES = {
    "simulate": "simulate: one process stands for all ranks and computes what they would",
    "torchrun": "torchrun: each cell is a job of real processes",
}


def warnings(results: ResultsTable, missing: int) -> list[str]:
    """List what a reader must know before trusting the page."""
    found = []
    if missing:
        found.append(f"{count(missing, 'cell')} of the grid {_are(missing)} missing: not run yet, or not finished.")
    if results.failed:
        found.append(
            f"{count(len(results.failed), 'cell')} failed and {_are(len(results.failed))} in no figure: see below."
        )
    for name, noun in {
        "device": "devices",
        "engine": "engines",
        "isolate": "settings of isolate",
        "score": "scores",
    }.items():
        counts = Counter(str(row.get(name)) for row in results.done)
        if len(counts) > 1:
            found.append(f"The cells come from different {noun}: {_counted(counts)}.")
    found += _mixed_versions(results.done)
    edges = sorted({row["arm"] for row in results.done if (row.get("selection") or {}).get("at_edge")})
    if edges:
        found.append(f"The chosen learning rate lies at the edge of its grid for {', '.join(edges)}.")
    weak = sorted({r["arm"] for r in results.done if (r.get("selection") or {}).get("val_error", 0) > WEAK})
    if weak:
        found.append(
            f"At none of the learning rates tried did {', '.join(weak)} learn half of the validation images in the "
            "epochs of that choice: it says little."
        )
    common = sorted({row["arm"] for row in results.done if not row.get("selection")})
    if common:
        found.append(
            f"No learning rate was chosen for {', '.join(common)}: an arm that the common one suits badly looks worse "
            "than it is."
        )
    lost = [row["cell"] for row in results.candidates if row["status"] != "done"]
    if lost:
        found.append(f"{count(len(lost), 'run')} that tried a learning rate failed: {', '.join(lost)}; see below.")
    without = [r["cell"] for r in results.done if any(_is_lost(m) for m in (r.get("evaluations") or {}).values())]
    if without:
        found.append(
            f"The test error is no number, and left out, in {count(len(without), 'cell')}: {', '.join(without)}."
        )
    if results.num_replaced:
        found.append(f"{count(results.num_replaced, 'cell')} with the arm, ranks, batch and seed of another left out.")
    return found


def _mixed_versions(rows: list[Row]) -> list[str]:
    found = []
    for name in sorted({name for row in rows for name in row.get("versions") or {}}):
        counts = Counter(str((row.get("versions") or {}).get(name, "none")) for row in rows)
        if len(counts) > 1:
            found.append(f"The cells come from different versions of {name}: {_counted(counts)}.")
    return found


def _is_lost(evaluation: dict[str, Any] | None) -> bool:
    return not is_number((evaluation or {}).get("test_error"))


def _counted(counts: Counter[str]) -> str:
    return ", ".join(f"{name} in {count(number, 'cell')}" for name, number in sorted(counts.items()))


def _are(number: int) -> str:
    return "is" if number == 1 else "are"


def settings(results: ResultsTable) -> list[tuple[str, str]]:
    """List how the cells were run; several values of one setting stand side by side."""

    def all_of(name: str, known: dict[str, str] | None = None) -> str:
        values = [row[name] for row in results.done if row.get(name) is not None]
        return _listed((known or {}).get(str(value), value) for value in _sorted(values))

    packages = sorted({(n, str(v)) for row in results.done for n, v in (row.get("versions") or {}).items()})
    return [
        ("Isolating the normalization", all_of("isolate", ISOLATE)),
        ("Engine", all_of("engine", ENGINES)),
        ("Score", f"{all_of('score')}; error = 1 {MINUS} score"),
        ("Seeds", f"n = {len(results.seeds)}: {_listed(results.seeds)}"),
        ("Ranks", all_of("world_size")),
        ("Images per rank", all_of("per_rank_batch_size")),
        ("Batches accumulated", all_of("accumulate")),
        ("Images per SGD step", all_of("global_batch_size")),
        ("Learning rate at its peak", all_of("lr")),
        ("Run once per seed, since their norms do not use the batch", _listed(results.once_per_seed) or "no arm"),
        ("SGD steps", all_of("num_steps")),
        ("Device", all_of("device")),
        ("Threads per process", all_of("num_threads")),
        ("Versions", _listed(f"{name} {version}" for name, version in packages)),
    ]


def _sorted(values: Iterable[Any]) -> list[Any]:
    unique = list(dict.fromkeys(values))
    try:
        return sorted(unique)
    except TypeError:
        return sorted(unique, key=str)


def _listed(values: Iterable[Any]) -> str:
    return ", ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values)
