"""Compare normalizations over per-rank batch sizes, and report it as one page.

    python launch/compare.py                                         # about a quarter of an hour on two cores
    python launch/compare.py 'seeds=[0,1,2,3,4]' 'arms=[bn,syncbn,syncbn_2,gn,ln,in]' output_dir=outputs/larger
    python launch/compare.py data=digit_scenes model=unet task=segmentation trainer.max_epochs=4
    python launch/compare.py engine=torchrun 'world_sizes=[2]'                 # real ranks instead of simulated ones
    python launch/compare.py 'group_sizes=[null,2]' 'arms=[syncbn]'            # also synchronized in pairs

Stopped at any moment, the same command goes on where it was. Results, report and logs lie in `output_dir`.
"""

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

from experiment.comparison import page, terminal_table
from experiment.comparison.grid import Cell, base_config, make_cells, shared_overrides
from experiment.comparison.progress_display import watch
from experiment.comparison.results_file import Results
from experiment.comparison.runner import Share, run_cells
from experiment.training import report
from experiment.training.known_warnings import ignore_known_warnings


def made_with(config: DictConfig) -> dict[str, str]:
    """Tell what results of this process depend on beside the grid."""
    names = ("python", "syncbn", *report.PACKAGES)
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    device = next(
        (name for name, is_there in there.items() if is_there and config.trainer.accelerator != "cpu"), "cpu"
    )
    return {**{k: v for k, v in report.versions().items() if k in names}, "device": device}


def search_folders() -> list[str]:
    """List the folders with configurations that the command line added."""
    sources = [source for source in HydraConfig.get().runtime.config_sources if "command-line" in source.provider]
    return [f"{s.schema}://{Path(s.path).absolute() if s.schema == 'file' else s.path}" for s in sources]


def check_resumable(results: Results, cells: Sequence[Cell], todo: Sequence[Cell]) -> None:
    """Refuse to add to results that do not compare with what would be added."""
    if todo and results.others:
        raise ValueError(
            f"{results.path} holds results made with {' and '.join(results.others)}; here it is otherwise, and "
            "mixed results do not compare: set output_dir, or use those versions. Nothing was changed"
        )
    for cell in cells:
        row = results.rows.get(cell.id, {})
        norm = row.get("norm", cell.norm)
        if row.get("status") == "done" and norm != cell.norm:
            raise ValueError(
                f"{results.path} holds results of another arm {cell.arm!r}, {norm}; here it is {cell.norm}: "
                "set output_dir, or give the new arm a file of its own name. Nothing was changed"
            )


def finish(results: Results, cells: Sequence[Cell], folder: Path, console: Console) -> int:
    """Write the report over the cells of this grid, print the table, and count what failed."""
    rows = [results.rows[cell.id] for cell in cells if cell.id in results.rows]
    arguments = [a for a in sys.argv[1:] if not a.startswith("output_dir=")]
    command = shlex.join(["python", "launch/compare.py", *arguments])
    title = "Normalization at small per-rank batches"
    path = page.write_report(rows, folder, title=title, command=command, missing=len(cells) - len(rows))
    terminal_table.print_table(rows, console)
    console.print(f"report: {path}", markup=False, soft_wrap=True)
    return sum(row["status"] == "failed" for row in rows)


@hydra.main(version_base="1.3", config_path="../conf", config_name="compare")
def main(config: DictConfig) -> None:
    """Run the cells that have no result yet, then report."""
    ignore_known_warnings()
    console = Console()
    shared = shared_overrides(HydraConfig.get().overrides.task, search_folders())
    cells = make_cells(config, shared)
    num_processes = max(cell.world_size for cell in cells) if config.engine == "torchrun" else 1
    versions = made_with(config)
    share = Share.of_machine(num_processes, config.jobs, versions["device"])
    folder = Path(str(config.output_dir))
    with Results(folder / "results.jsonl", base_config(config, shared), versions) as results:
        todo = [cell for cell in cells if results.rows.get(cell.id, {}).get("status") != "done"]
        check_resumable(results, cells, todo)
        for cell in todo:
            results.rows.pop(cell.id, None)  # failed before: the report waits for the new try
        for note in results.notes:
            console.print(note, markup=False)

        def finished(row: dict[str, Any]) -> None:
            results.append({**row, "isolate": config.isolate})

        try:
            with closing(run_cells(todo, config.engine, folder, share, finished)) as running:
                watch(running, cells, results.rows, console)
        except KeyboardInterrupt:
            num_done = sum(cell.id in results.rows for cell in cells)
            console.print(f"stopped with {num_done} of {len(cells)} cells done; the same command goes on")
            sys.exit(130)
        num_failed = finish(results, cells, folder, console)
    if num_failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
