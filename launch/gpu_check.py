"""Check the CUDA path on a GPU: numbers, waits, launches, time, memory, CUDA graph and compile.

    python launch/gpu_check.py                              # on a machine with a CUDA GPU
    python launch/gpu_check.py --parts phases,layer         # some parts
    python launch/gpu_check.py --device cpu                 # what a CPU can run: a test of this program
    compute-sanitizer --tool memcheck --target-processes all python3 launch/gpu_check.py --parts phases

torch, Triton, pytest and numpy are enough, and the tree need not be installed. Each part is a process of its own with
its own time limit; one that fails is reported, and the others go on. `output_dir` receives gpu_check.md and
gpu_check.json, written anew after each part, and a log for each. The limits add up to some 25 minutes; about 10 are
expected on a GPU, not yet measured. The exit code is 0 if nothing failed, 1 if a part failed, 2 without a GPU.

The memory checker sees where a tensor ends only with PYTORCH_NO_CUDA_MEMORY_CACHING=1 in the environment.
"""

import argparse
import shlex
import signal
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from experiment.gpu_check import report, requirements
from experiment.gpu_check.registry import PARTS, Part, choose
from experiment.gpu_check.result import FAILED, Record
from experiment.gpu_check.runner import run_parts


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts that the command line names; return the exit code."""
    options = _parse(arguments)
    if options.device == "cuda" and not requirements.num_gpus():
        print(
            f"gpu_check: expected a CUDA GPU, found none ({requirements.why_no_gpu()}). "
            "--device cpu runs what a CPU can run of it.",
            file=sys.stderr,
        )
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the part under way is ended, too
    given = sys.argv[1:] if arguments is None else arguments
    return check(options.parts, options.device, options.output_dir, shlex.join(["launch/gpu_check.py", *given]))


def check(parts: Sequence[Part], device: str, folder: Path, command: str) -> int:
    """Run parts, write the report after each, print the table at the end; return the exit code."""
    facts = report.collect_facts(device, f"python {command}", f"{datetime.now():%Y-%m-%d %H:%M}")

    def show(records: list[Record]) -> None:
        report.write(folder, facts, records)
        if records:
            last = records[-1]
            print(f"{last['name']}: {last['status']} after {last['seconds']:.1f} s", flush=True)

    records = run_parts(parts, device, folder, show)
    print(f"\n{report.plain_table(records)}\n\nreport: {folder / 'gpu_check.md'}", flush=True)
    return int(any(record["status"] == FAILED for record in records))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    names = ", ".join(part.name for part in PARTS)
    parser.add_argument("--parts", default="", help=f"comma-separated, of {names}; all by default")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/gpu_check"), help="%(default)s by default")
    options = parser.parse_args(arguments)
    try:
        options.parts = choose(options.parts)
    except ValueError as error:
        parser.error(f"--parts: {error}")
    return options


if __name__ == "__main__":
    sys.exit(main())
