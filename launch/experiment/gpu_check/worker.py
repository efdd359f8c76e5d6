"""Run one part in this process, and write its record.

    python -m experiment.gpu_check.worker '{"name": "machine", …}' cpu outputs/gpu_check/machine.json

`runner` starts it. Whatever ends this process before the record is written costs this part alone.
"""

import importlib
import json
import sys
import traceback
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

from experiment.training.atomic_files import write_file

from . import requirements
from .registry import Part
from .result import FAILED, OK, Outcome, Record, make_record, to_json

_NUM_LINES = 12  # of a traceback, in the report; all of it goes to the part's log


def main(arguments: list[str]) -> None:
    """Run the part that the arguments describe."""
    description, device, path = arguments
    part = Part(**json.loads(description))
    write_file(Path(path), to_json(run(part, device)))


def run(part: Part, device: str) -> Record:
    """Run a part, or find out what it lacks; an exception makes it a failed one."""
    try:
        missing = requirements.unmet(part, device)
        if missing is not None:
            status, text = missing
            return make_record(part.name, status, text, failures=[text] if status == FAILED else [])
        torch.manual_seed(0)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            outcome = _load(part.target)(device)
        outcome.failures += _fallbacks(caught)
    except Exception as error:
        traceback.print_exc()
        text = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        last = traceback.format_exc().splitlines()[-_NUM_LINES:]
        return make_record(part.name, FAILED, text, failures=[text], error="\n".join(last))
    if outcome.failures:
        first, more = outcome.failures[0], len(outcome.failures) - 1
        outcome.summary = f"{first}{f' (and {more} more)' if more else ''}"
    return make_record(part.name, FAILED if outcome.failures else OK, **asdict(outcome))


def _load(target: str) -> Callable[[str], Outcome]:
    module, function = target.split(":")
    loaded: Callable[[str], Outcome] = getattr(importlib.import_module(module), function)
    return loaded


def _fallbacks(caught: list[warnings.WarningMessage]) -> list[str]:
    """Return syncbn's warnings that it went on with slower kernels: what was measured is not what was asked for."""
    found = []
    for warning in caught:
        print(warnings.formatwarning(warning.message, warning.category, warning.filename, warning.lineno), end="")
        text = str(warning.message)
        if issubclass(warning.category, RuntimeWarning) and text.lower().startswith(
            "syncb"
        ):  # syncbn.ops…, SYNCBN_KERNELS, SyncBatchNorm
            found.append(f"RuntimeWarning: {text}")
    return found


if __name__ == "__main__":
    main(sys.argv[1:])
