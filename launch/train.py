"""Train one model on one data set with one normalization.

    torchrun launch/train.py +norm=syncbn                                  # 1 process
    torchrun --nproc-per-node 4 launch/train.py +norm=gn data.per_rank_batch_size=2
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 launch/train.py +norm=syncbn
    torchrun launch/train.py +norm=syncbn model=timm model.arch=efficientnet_b0 data=imagefolder data.root=PATH
    python launch/train.py +norm=bn simulate=4 data.per_rank_batch_size=1  # this process simulates 4 ranks
    python launch/train.py +norm=syncbn audit=true                         # look at the norm layers, do not train
    torchrun launch/train.py +norm=syncbn run_dir=runs/a                   # after a stop, the same command resumes
    torchrun launch/train.py +norm=syncbn ckpt_path=outputs/RUN/checkpoints/last.ckpt    # a new run from there
    python launch/train.py --help                                          # every group and setting

Each run writes one folder, a new one in `outputs` or `run_dir`: config, versions, command, metrics, checkpoints and
results.
"""

from datetime import datetime, timedelta
from functools import partial
from pathlib import Path

import hydra
import lightning as L
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from omegaconf import DictConfig

import syncbn
from experiment.comparison import worker
from experiment.evaluate import Statistics, check_modes, evaluate
from experiment.resume import run_folder
from experiment.resume.callback import Checkpoints
from experiment.resume.checkpoint_files import AtomicCheckpoints
from experiment.resume.progress import Progress, Start
from experiment.simulation.exactness import check_exact
from experiment.simulation.simulate import simulate
from experiment.training import memory_format, norm_config, report, shares
from experiment.training.data import ImageData
from experiment.training.freeze_late import FreezeLate
from experiment.training.instantiate import instantiate
from experiment.training.known_warnings import ignore_known_warnings
from experiment.training.models import classifiers
from experiment.training.task import Task
from experiment.training.world import World, listen_on_loopback, make_environment
from syncbn.compat import DDP_OPTIONS, destroy_process_group
from syncbn.lightning import NormConverter

# Training images for one forward, or as few as keep its memory in bounds.
NUM_AUDITED, NUM_INITIALIZED, MAX_PIXELS = 512, 256, 2**23


def build(config: DictConfig, world: World) -> tuple[ImageData, Task]:
    """Make data and task, and find every mistake in the configuration, before any process group exists."""
    run_folder.check_settings(config)
    make = instantiate(config.data, _partial_=True)
    data: ImageData = make(world=world, seed=config.seed, eval_split=config.eval_split)
    data.load()
    check_modes(config.evaluate, data)
    L.seed_everything(config.seed, workers=True, verbose=False)
    example = data.example()
    net = instantiate(config.model, num_classes=data.num_classes, in_channels=example.shape[1])
    data.memory_format, note = memory_format.choose(net, config.trainer.get("accelerator", "auto"))
    net.to(memory_format=data.memory_format)
    if note and world.rank == 0:
        print(note)
    size = data.plan.global_batch_size
    task: Task = instantiate(config.task, net, data.num_classes, global_batch_size=size, seed=config.seed)
    task.check_labels(data.splits.train.labels)
    classifiers.check_reads(net, example, data.num_classes, per_pixel=task.per_pixel)
    return data, task


def make_converter(config: DictConfig, data: ImageData) -> L.Callback | None:
    """Make the arm's converter, its steps as parts of this run turned into numbers."""
    num_forwards = norm_config.count_forwards(config.trainer, len(data.splits.train), data.plan)
    return norm_config.make_converter(config.norm, num_forwards)


def convert(config: DictConfig, world: World, data: ImageData, task: Task) -> list[L.Callback]:
    """Convert the model to the arm, at the same moment on real and on simulated ranks: a norm may draw parameters.

    Returns:
        For real ranks, the callback: it finds the model converted, and makes the process groups. For simulated ones
        only a callback that has more to do.
    """
    converter = make_converter(config, data)
    if isinstance(converter, NormConverter) or world.simulate is not None:
        norm_config.apply(converter, task, world.num_ranks)
        norm_config.initialize(converter, task.net, lambda: data.sample(_num_images(data, NUM_INITIALIZED)))
    if world.simulate is None:
        return [] if converter is None else [converter]
    simulate(task, data.plan, config.node_size)
    images, labels = next(iter(data.train_dataloader()))
    check_exact(task, (data.normalize(images), labels), data.plan)
    return [converter] if isinstance(converter, FreezeLate) else []


def audit(config: DictConfig, data: ImageData, task: Task) -> str:
    """Audit the model as the arm makes it, on training images."""
    norm_config.apply(make_converter(config, data), task, data.plan.world_size)
    share = data.plan.per_rank_batch_size * data.plan.world_size
    num_images = max(4 * share, _num_images(data, NUM_AUDITED))
    sizes = {"per_rank_batch_size": data.plan.per_rank_batch_size, "world_size": data.plan.world_size}
    return str(syncbn.audit(task.net, data.sample(min(num_images, len(data.splits.train))), **sizes))


def _num_images(data: ImageData, at_most: int) -> int:
    return max(1, min(at_most, MAX_PIXELS // data.example()[0].numel()))


def find_start(config: DictConfig, world: World, data: ImageData, task: Task, *, converted: bool) -> Start:
    """Find and check the checkpoint that this run resumes from, before any process group exists."""
    now = Progress(data.plan, len(data.splits.train), config.seed, world.simulate, world.world_size, task.lr)
    return run_folder.find_start(config, now, task if converted else None)


def make_trainer(
    config: DictConfig, world: World, folder: Path, accumulate: int, callbacks: list[L.Callback]
) -> L.Trainer:
    """Make the trainer for this world; `folder` matters on rank 0, which alone writes."""
    listen_on_loopback(world)
    # no broadcast of buffers before each forward: it would overwrite statistics of subgroups
    ddp = DDPStrategy(timeout=timedelta(seconds=config.timeout), **DDP_OPTIONS)
    trainer: L.Trainer = instantiate(
        config.trainer,
        devices=world.local_world_size,
        num_nodes=world.num_nodes,
        strategy=ddp if world.world_size > 1 else "auto",
        plugins=[make_environment(world), AtomicCheckpoints()],
        accumulate_grad_batches=1 if world.simulate else accumulate,  # joined batches hold all of a step
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        logger=instantiate(config.logger, save_dir=str(folder)),
        callbacks=[report.Clock(), Statistics(), *callbacks],
        default_root_dir=str(folder),
        enable_model_summary=False,
    )
    return trainer


def run(config: DictConfig, world: World, data: ImageData, task: Task) -> None:
    """Train, from the beginning or a checkpoint, then test; every rank calls this."""
    callbacks = convert(config, world, data, task)
    converted = all(isinstance(callback, NormConverter) for callback in callbacks)  # others do it in the fit
    find = partial(find_start, config, world, data, task, converted=converted)
    start = find()
    if world.rank == 0:
        for note in start.notes:
            print(note)
    if world.num_ranks == 1:
        print("world size 1: SyncBatchNorm equals BatchNorm; torchrun --nproc-per-node N starts N processes")
    folder = Path(config.output_dir if config.run_dir is None else config.run_dir)
    if world.rank == 0:  # which alone writes
        folder = report.new_folder(folder, datetime.now()) if config.run_dir is None else folder
        report.write_inputs(folder, config)
    checkpoints = Checkpoints(folder / "checkpoints", start, config.checkpoint_every)
    callbacks.append(checkpoints)
    worker.follow(callbacks)
    trainer = make_trainer(config, world, folder, data.plan.accumulate, callbacks)
    checkpoints.agree(trainer, find)
    trainer.precision_plugin.convert_module(task)  # Lightning restores first, which would round float64 weights
    trainer.fit(task, datamodule=data, ckpt_path=checkpoints.start.path, weights_only=True)
    training = report.summarize_training(trainer, task, data.plan)  # before a test changes the trainer's timers
    evaluations = evaluate(trainer, task, data, list(config.evaluate))
    if world.rank == 0:
        about = {"arm": norm_config.arm_of(config.norm), "seed": config.seed, "simulate": world.simulate}
        tests = report.summarize_tests(task, evaluations, data.eval_split)
        results = {**about, **tests, **training, **shares.summarize(task.net)}
        report.write_results(folder, results)
        report.print_table(results, folder)


@hydra.main(version_base="1.3", config_path="../conf", config_name="train")
def main(config: DictConfig) -> None:
    """Train, test, and write down what came out."""
    ignore_known_warnings()
    world = World.from_env(config.simulate)
    if config.run_dir is not None and (done := run_folder.finished(config)) is not None:
        if world.rank == 0:
            report.print_table(done, Path(config.run_dir))
            print(f"{config.run_dir} is finished: nothing was run")
        return
    data, task = build(config, world)
    if config.audit:
        if world.rank == 0:
            print(audit(config, data, task))
        return
    with run_folder.claim(config, world.rank):
        run(config, world, data, task)
    if dist.is_initialized():  # torch now and then aborts an interpreter that ends with its process group
        destroy_process_group()


if __name__ == "__main__":
    main()
