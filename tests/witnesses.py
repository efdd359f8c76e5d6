"""Layers of other packages as witnesses: each runs in a process of its own, where its imports disturb nobody.

`ask("keras_witness.py", jobs)` returns ``[run(**job) for job in jobs]`` of that file's ``run``; arrays are numpy's.
"""

import os
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent


def ask(program, jobs, **environment):
    """Run all jobs in one process: to import such a package takes seconds."""
    with tempfile.TemporaryDirectory() as folder:
        asked, answered = Path(folder, "asked"), Path(folder, "answered")
        asked.write_bytes(pickle.dumps(jobs))
        command = [sys.executable, str(HERE / program), str(asked), str(answered)]
        env = os.environ | {"KERAS_HOME": folder, "CUDA_VISIBLE_DEVICES": ""} | environment
        result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)
        assert result.returncode == 0, result.stdout + result.stderr
        return pickle.loads(answered.read_bytes())


def answer(run):
    """Do in the witness' process what `ask` asks for."""
    asked, answered = map(Path, sys.argv[1:])
    answered.write_bytes(pickle.dumps([run(**job) for job in pickle.loads(asked.read_bytes())]))
