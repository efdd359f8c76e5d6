"""Train one model on one data set with one normalization.

    torchrun launch/train.py +norm=syncbn                                  # 1 process
    torchrun --nproc-per-node 4 launch/train.py +norm=gn data.per_rank_batch_size=2
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 launch/train.py +norm=syncbn
    torchrun launch/train.py +norm=syncbn model=timm model.arch=efficientnet_b0 data=imagefolder data.root=PATH
    torchrun launch/train.py +norm=syncbn ckpt_path=outputs/RUN/checkpoints/last.ckpt    # resume
    python launch/train.py --help                                          # every group and setting

Each run makes one folder in `outputs`: config, versions, command, metrics, checkpoint and results.
"""

from __future__ import annotations

import copy
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import hydra
import lightning as L
import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.callbacks import ModelCheckpoint, Timer
from lightning.pytorch.strategies import DDPStrategy
from omegaconf import DictConfig

import syncbn
from syncbn.collectives import check_size
from syncbn.experiment import nets, report
from syncbn.experiment.batches import World
from syncbn.experiment.data import ImageData
from syncbn.experiment.known_warnings import ignore_known_warnings
from syncbn.experiment.task import Classifier

TIMEOUT = timedelta(minutes=5)  # of a collective: a rank that waits longer has lost its peers


def make(config: DictConfig, *args: Any, **kwargs: Any) -> Any:
    """Make what the configuration names; an error appears as it is, without Hydra's wrapping."""
    try:
        return instantiate(config, *args, **kwargs)
    except InstantiationException as error:
        raise (error.__cause__ or error) from None


def build(config: DictConfig, world: World) -> tuple[ImageData, Classifier]:
    """Make data and task, and find every mistake in the configuration, before any process group exists."""
    if config.ckpt_path is not None and not Path(config.ckpt_path).is_file():
        raise FileNotFoundError(f"expected ckpt_path to be a checkpoint to resume, found no file {config.ckpt_path}")
    data: ImageData = make(config.data, world=world, seed=config.seed)
    data.load()
    L.seed_everything(config.seed, workers=True, verbose=False)
    example = data.example()
    net = make(config.model, num_classes=data.num_classes, in_channels=example.shape[1])
    net.to(memory_format=torch.channels_last)
    nets.check_reads(net, example, data.num_classes)
    size = data.plan.global_batch_size
    task: Classifier = make(config.task, net, data.num_classes, global_batch_size=size, seed=config.seed)
    if config.norm:  # the callback converts later; what it would refuse is found here
        options = {k: v for k, v in config.norm.items() if k != "_target_"}
        syncbn.convert(copy.deepcopy(task), **options)
        if isinstance(options.get("process_group"), int):
            check_size(options["process_group"], world.world_size)
    return data, task


def make_trainer(config: DictConfig, world: World, folder: Path, accumulate: int) -> L.Trainer:
    """Make the trainer for this world; `folder` matters on rank 0, which alone writes."""
    checkpoint = ModelCheckpoint(folder / "checkpoints", filename="last", enable_version_counter=False)
    converter = [make(config.norm)] if config.norm else []
    # no broadcast of buffers before each forward: it would overwrite statistics of subgroups
    ddp = DDPStrategy(forward_sync_buffers=False, timeout=TIMEOUT)
    trainer: L.Trainer = make(
        config.trainer,
        devices=world.local_world_size,
        num_nodes=world.num_nodes,
        strategy=ddp if world.world_size > 1 else "auto",
        plugins=[TorchElasticEnvironment() if world.by_torchrun else LightningEnvironment()],
        accumulate_grad_batches=accumulate,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        logger=make(config.logger, save_dir=str(folder)) if config.logger else False,
        callbacks=[checkpoint, Timer(), *converter],
        default_root_dir=str(folder),
        enable_model_summary=False,
    )
    return trainer


@hydra.main(version_base="1.3", config_path="../conf", config_name="train")
def main(config: DictConfig) -> None:
    """Train, test, and write down what came out."""
    ignore_known_warnings()
    world = World.from_env()
    data, task = build(config, world)
    if world.world_size == 1:
        print("world size 1: SyncBatchNorm equals BatchNorm; torchrun --nproc-per-node N starts N processes")
    folder = Path(config.output_dir)
    if world.rank == 0:  # Lightning tells the others
        folder = report.new_folder(folder, datetime.now())
        report.write_inputs(folder, config)
    trainer = make_trainer(config, world, folder, data.plan.accumulate)
    trainer.fit(task, datamodule=data, ckpt_path=config.ckpt_path, weights_only=True)
    trainer.test(task, datamodule=data, verbose=False)
    if world.rank == 0:
        arm = config.norm.norm if config.norm else "as written"
        results = report.summarize(trainer, task, data.plan, arm=arm, seed=config.seed)
        report.write_results(folder, results)
        report.print_table(results, folder)


if __name__ == "__main__":
    main()
