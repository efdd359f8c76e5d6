"""Compare normalizations over per-rank batch sizes, and report it as one page.

    python launch/compare.py                                                   # about 10 minutes on two cores
    python launch/compare.py seeds=[0,1,2,3,4] arms=[bn,syncbn,syncbn_2,gn,ln,in] output_dir=outputs/larger
    python launch/compare.py data=digit_scenes model=unet task=segmentation per_rank_batch_sizes=[1,2]
    python launch/compare.py engine=torchrun world_sizes=[2]                   # real ranks instead of simulated ones
    python launch/compare.py group_sizes=[null,2] arms=[syncbn]                # also synchronized in pairs

Stopped at any moment, the same command goes on where it was. Results, report and logs lie in `output_dir`.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from rich.console import Console

from syncbn.experiment import report
from syncbn.experiment.comparison import page, table
from syncbn.experiment.comparison.grid import Cell, base_config, make_cells, shared_overrides
from syncbn.experiment.comparison.live import watch
from syncbn.experiment.comparison.runner import Share, run_cells
from syncbn.experiment.comparison.store import Results
from syncbn.experiment.known_warnings import ignore_known_warnings


def made_with(config: DictConfig) -> dict[str, str]:
    """Tell what results of this process depend on beside the grid."""
    on_cpu = config.trainer.accelerator == "cpu" or not torch.cuda.is_available()
    names = ("python", "syncbn", *report.PACKAGES)
    return {**{k: v for k, v in report.versions().items() if k in names}, "device": "cpu" if on_cpu else "cuda"}


def finish(results: Results, cells: Sequence[Cell], folder: Path, console: Console) -> int:
    """Write the report over the cells of this grid, print the table, and count what failed."""
    rows = [results.rows[cell.id] for cell in cells if cell.id in results.rows]
    arguments = [a for a in sys.argv[1:] if not a.startswith("output_dir=")]
    command = shlex.join(["python", "launch/compare.py", *arguments])
    title = "Normalization at small per-rank batches"
    path = page.write_report(rows, folder, title=title, command=command, missing=len(cells) - len(rows))
    table.print_table(rows, console)
    console.print(f"report: {path}", markup=False, soft_wrap=True)
    return sum(row["status"] == "failed" for row in rows)


@hydra.main(version_base="1.3", config_path="../conf", config_name="compare")
def main(config: DictConfig) -> None:
    """Run the cells that have no result yet, then report."""
    ignore_known_warnings()
    console = Console()
    shared = shared_overrides(HydraConfig.get().overrides.task)
    cells = make_cells(config, shared)
    num_processes = max(cell.world_size for cell in cells) if config.engine == "torchrun" else 1
    share = Share.of_machine(num_processes, config.jobs)
    folder = Path(config.output_dir)
    with Results(folder / "results.jsonl", base_config(config, shared), made_with(config)) as results:
        todo = [cell for cell in cells if results.rows.get(cell.id, {}).get("status") != "done"]
        if todo and results.others:
            raise ValueError(
                f"{results.path} holds results made with {' and '.join(results.others)}; here it is otherwise, and "
                "mixed results do not compare: set output_dir, or use those versions. Nothing was changed"
            )
        for cell in todo:
            results.rows.pop(cell.id, None)  # failed before: the report waits for the new try
        for note in results.notes:
            console.print(note, markup=False)

        def finished(row: dict[str, Any]) -> None:
            results.append({**row, "isolate": config.isolate})

        with closing(run_cells(todo, config.engine, folder, share, finished)) as running:
            watch(running, cells, results.rows, share.jobs, console)
        num_failed = finish(results, cells, folder, console)
    if num_failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
