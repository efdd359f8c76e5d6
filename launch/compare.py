"""Compare normalizations over per-rank batch sizes, and report it as one page.

    python launch/compare.py                                         # about a quarter of an hour on two cores
    python launch/compare.py grid=classification output_dir=outputs/classification       # conf/grid: larger ones
    python launch/compare.py data=imagefolder data.root=PATH model=torchvision model.arch=resnet50
    python launch/compare.py select_lr=null 'arms=[bn,syncbn]'                 # every arm at the task's learning rate
    python launch/compare.py engine=torchrun 'world_sizes=[2]'                 # real ranks instead of simulated ones
    python launch/compare.py 'group_sizes=[null,2]' 'arms=[syncbn]'            # also synchronized in pairs

First each arm's learning rate is chosen on validation images, then the grid is run, and only that reads test images.
Stopped at any moment, the same command goes on where it was. Results, report and logs lie in `output_dir`.
"""

import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from rich.console import Console

from experiment.comparison import page, terminal_table
from experiment.comparison.cell import Cell
from experiment.comparison.grid import base_config, make_cells, make_selections, with_choice
from experiment.comparison.overrides import shared_overrides
from experiment.comparison.plan import Plan
from experiment.comparison.progress_display import watch
from experiment.comparison.results_file import Results
from experiment.comparison.runner import Share, run_cells
from experiment.comparison.selection import ArmSelection
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
    """Refuse to add to results that do not compare with what would be added.

    Args:
        results: Those there are.
        cells: Of the grid and of the choice of learning rates.
        todo: Those that would be run.
    """
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


def is_done(results: Results, cell: Cell) -> bool:
    """Whether a cell has its result, by the learning rate that is chosen now."""
    row = results.rows.get(cell.id, {})
    if row.get("status") != "done" or cell.selection is None:
        return row.get("status") == "done"
    before = row.get("selection") or {}
    return all(before.get(name) == cell.selection[name] for name in ("lr", "options"))


def choose(selections: Sequence[ArmSelection], results: Results, run: Callable[[list[Cell]], None]) -> dict[str, Any]:
    """Run the selection of every arm to its end, and give what was chosen, for arms of which any run ended."""
    while todo := [cell for selection in selections for cell in selection.next(results.rows)]:
        run(todo)
    found = {selection.like.arm: selection.choice(results.rows) for selection in selections}
    return {arm: choice for arm, choice in found.items() if choice is not None}


def finish(
    results: Results, cells: Sequence[Cell], selections: Sequence[ArmSelection], config: DictConfig, console: Console
) -> int:
    """Write the report over the cells of this grid, print the table, and count what failed."""
    rows = [results.rows[cell.id] for cell in cells if cell.id in results.rows]
    tried = [row for selection in selections for row in selection.rows(results.rows)]
    arguments = [a for a in sys.argv[1:] if not a.startswith("output_dir=")]
    command = shlex.join(["python", "launch/compare.py", *arguments])
    path = page.write_report(
        [*tried, *rows],
        Path(str(config.output_dir)),
        title="Normalization at small per-rank batches",
        command=command,
        plan=plan_of(config),
        missing=len(cells) - len(rows),
    )
    terminal_table.print_table([*tried, *rows], console, plan_of(config))
    console.print(f"report: {path}", markup=False, soft_wrap=True)
    return sum(row["status"] == "failed" for row in (*tried, *rows))


def plan_of(config: DictConfig) -> Plan:
    """Give what the settings state beforehand, of the arms that are compared."""
    pairs = [(str(first), str(second)) for first, second in config.planned]
    return Plan(
        tuple((first, second) for first, second in pairs if {first, second} <= set(config.arms)),
        min(config.per_rank_batch_sizes),
        tuple(sorted(set(config.world_sizes))),
        config.margin,
    )


@hydra.main(version_base="1.3", config_path="../conf", config_name="compare")
def main(config: DictConfig) -> None:
    """Choose learning rates, run the cells that have no result yet, then report."""
    ignore_known_warnings()
    console, settings = Console(), HydraConfig.get()
    shared = shared_overrides(config, settings.runtime.choices, settings.overrides.task, search_folders())
    cells, selections = make_cells(config, shared), make_selections(config, shared)
    num_processes = max(cell.world_size for cell in cells) if config.engine == "torchrun" else 1
    versions = made_with(config)
    share = Share.of_machine(num_processes, config.jobs, versions["device"])
    folder = Path(str(config.output_dir))
    with Results(folder / "results.jsonl", base_config(config, shared), versions) as results:
        candidates = [cell for selection in selections for cell in selection.known(results.rows)]
        waiting = [cell for cell in (*candidates, *cells) if not is_done(results, cell)]
        check_resumable(results, [*candidates, *cells], waiting)
        for failed in [cell for cell, row in results.rows.items() if row["status"] != "done"]:
            results.rows.pop(failed)  # the report waits for the new try
        for note in results.notes:
            console.print(note, markup=False)

        def finished(row: dict[str, Any]) -> None:
            results.append({**row, "isolate": config.isolate})

        def run(todo: list[Cell], of: Sequence[Cell] = ()) -> None:
            with closing(run_cells(todo, config.engine, folder, share, finished)) as running:
                watch(running, of or todo, results.rows, console)

        try:
            choices = choose(selections, results, run)
            cells = [with_choice(cell, choices[cell.arm]) if cell.arm in choices else cell for cell in cells]
            for cell in cells:
                if not is_done(results, cell):
                    results.rows.pop(cell.id, None)
            runnable = [cell for cell in cells if not selections or cell.arm in choices]
            run([cell for cell in runnable if cell.id not in results.rows], runnable)
        except KeyboardInterrupt:
            num_done = sum(cell.id in results.rows for cell in cells)
            console.print(f"stopped with {num_done} of {len(cells)} cells done; the same command goes on")
            sys.exit(130)
        num_failed = finish(results, cells, selections, config, console)
    if num_failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
