"""Run launch/train.py by Ray Train, which starts the ranks, and starts all of them anew when one is lost.

    python launch/ray_train.py +norm=syncbn run_dir=runs/a                                # 2 workers on this machine
    python launch/ray_train.py --num-workers 4 --use-gpu +norm=syncbn run_dir=runs/a      # one GPU each
    RAY_ADDRESS=HOST:6379 python launch/ray_train.py --num-workers 16 +norm=syncbn run_dir=runs/a    # in a Ray cluster

Settings, results and run directory are those of launch/train.py under torchrun: each goes on where the other stopped.
This is no folder `launch/ray`: to Python that would be a package `ray`, where the real one is not installed.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

LAUNCH = Path(__file__).resolve().parent
MAX_FAILURES = 3  # starts after the first, each from the last checkpoint
IS_LOCAL = "RAY_ADDRESS" not in os.environ

# Ray reads these when it is imported: send no usage statistics; print once; be silent about the missing dashboard; and
# off, the last has Ray listen on the loopback alone: on Linux it takes the host's address even when given 127.0.0.1.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "Failed to query Ray Train Controller")
if IS_LOCAL:
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"

import ray  # noqa: E402
from hydra import compose, initialize_config_dir  # noqa: E402
from omegaconf import DictConfig, OmegaConf  # noqa: E402
from ray.train import FailureConfig, RunConfig, ScalingConfig  # noqa: E402
from ray.train.torch import TorchConfig, TorchTrainer  # noqa: E402


def work(job: dict[str, Any]) -> None:
    """Be one rank: run launch/train.py in the folder of the command; Ray has made the process group."""
    os.chdir(job["folder"])
    os.environ["TORCHELASTIC_RUN_ID"] = "ray"  # Ray sets torchrun's other variables
    sys.argv = job["command"]  # for run.json
    sys.path.insert(0, job["launch"])
    import train

    train.main(job["config"])


def fit(config: DictConfig, num_workers: int, use_gpu: bool, storage: str) -> None:
    """Train, with Ray's own notes in `storage`; without a run_dir nothing goes on, so nothing is started anew."""
    failures = FailureConfig(max_failures=0 if config.run_dir is None else MAX_FAILURES)
    TorchTrainer(
        work,
        train_loop_config={"config": config, "launch": str(LAUNCH), "folder": os.getcwd(), "command": sys.argv},
        torch_config=TorchConfig(timeout_s=config.timeout),
        scaling_config=ScalingConfig(num_workers=num_workers, use_gpu=use_gpu),
        run_config=RunConfig(name="syncbn", storage_path=storage, failure_config=failures),
    ).fit()


def main() -> None:
    """Read the command, start Ray or join it, and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-workers", type=int, default=2, help="processes, over all nodes (2)")
    parser.add_argument("--use-gpu", action="store_true", help="give each a GPU")
    parser.add_argument("overrides", nargs="*", help="settings, as for launch/train.py")
    arguments = parser.parse_args()
    with initialize_config_dir(str(LAUNCH.parent / "conf"), version_base="1.3"):
        config = compose("train", overrides=arguments.overrides)
    OmegaConf.resolve(config)
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:  # for this user alone; Ray opens its own to everybody
        if IS_LOCAL:
            own = {"_temp_dir": f"{folder}/ray", "include_dashboard": False, "num_cpus": arguments.num_workers}
            ray.init("local", **own)
        else:
            ray.init()
        try:
            fit(config, arguments.num_workers, arguments.use_gpu, f"{folder}/train")
        finally:
            ray.shutdown()


if __name__ == "__main__":
    main()
