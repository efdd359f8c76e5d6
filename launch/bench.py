"""Measure the layer, a training step, collectives, memory and growth, next to other implementations in the same run.

    python launch/bench.py                                                   # about ten minutes on two cores
    python launch/bench.py 'parts=[layer]' 'layer.shapes=[[4,64,56,56]]'
    python launch/bench.py 'parts=[step]' model.arch=resnet50 step.world_size=4
    python launch/bench.py device=cuda                                       # NCCL, one GPU per rank

Tables appear here and, with all numbers and a plot, in `output_dir`: bench.md, bench.json, bench.svg, bench.png.
"""

import shlex
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import hydra
import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from experiment.bench import registry, report


@hydra.main(version_base="1.3", config_path="../conf", config_name="bench")
def main(config: DictConfig) -> None:
    """Measure part by part; each is shown and written as soon as it is finished."""
    registry.check(config)
    torch.set_num_threads(config.threads)
    console = Console(width=None if sys.stdout.isatty() else 140)
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith("output_dir=")]
    results: dict[str, Any] = {
        "command": shlex.join(["python", "launch/bench.py", *arguments]),
        "date": f"{datetime.now():%Y-%m-%d %H:%M}",
        "machine": report.machine(config.device, config.threads),
        "config": OmegaConf.to_container(config, resolve=True),
        "parts": {},
    }
    for name in config.parts:
        part = registry.PARTS[name]
        rows = results["parts"][name] = part.measure(config)
        for table in part.tabulate(rows):
            table.show(console)
        report.write_report(Path(config.output_dir), results)
    console.print(f"report: {Path(config.output_dir) / 'bench.md'}", markup=False, soft_wrap=True)


if __name__ == "__main__":
    main()
