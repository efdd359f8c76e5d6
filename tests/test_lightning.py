"""Lightning projects as users write them: layers from every hook, one device and DDP, saved, resumed and tested."""

import copy
import inspect
import os
import pickle
import sys
import warnings
from types import MethodType

import lightning.pytorch
import pytest
import pytorch_lightning
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

import syncbn
from syncbn.compat import DDP_OPTIONS
from syncbn.lightning import NormConverter, SyncBatchNormLayerSync

SIZE = 24

# Lightning has the argument from 2.6 on.
SAFE = {"weights_only": True} if "weights_only" in inspect.signature(Trainer.fit).parameters else {}


def data():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(SIZE, 4, dtype=torch.float64, generator=generator) * 2 + 1
    return torch.utils.data.TensorDataset(x, (x.sum(1) > 4).long())


class Steps:
    """Builds one BatchNorm in each of the three places."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8)).double()
        self.middle = self.head = None
        self.seen = []

    def setup(self, stage):
        if self.middle is None:
            torch.manual_seed(1)
            self.middle = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)).double()

    def configure_model(self):
        if self.head is None:
            torch.manual_seed(2)
            self.head = nn.Sequential(nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)).double()

    def forward(self, x):
        return self.head(self.middle(self.stem(x)))

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self(x), y)

    def on_train_batch_end(self, *args):
        self.seen.append({k: v.clone() for k, v in self.state_dict().items()})

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]), sync_dist=True)

    test_step = validation_step

    def predict_step(self, batch, batch_idx):
        return self(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class Project(Steps, LightningModule):
    pass


class OfTheOtherNamespace(Steps, pytorch_lightning.LightningModule):
    pass


PROJECTS = {lightning.pytorch: Project, pytorch_lightning: OfTheOtherNamespace}


def loader(rank, world_size, batch_size):
    """The batches of one rank: every W-th sample of what one process would see."""
    dataset = data()
    order = [
        i
        for start in range(0, SIZE, batch_size * world_size)
        for i in range(start + rank, start + batch_size * world_size, world_size)
    ]
    return torch.utils.data.DataLoader(torch.utils.data.Subset(dataset, order), batch_size=batch_size)


def trainer(rank, world_size, path, namespace=lightning.pytorch, **options):
    if world_size > 1:
        values = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
        values |= {"GROUP_RANK": 0, "TORCHELASTIC_RUN_ID": "test", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0}
        os.environ |= {k: str(v) for k, v in values.items()}
        strategy = namespace.strategies.DDPStrategy(process_group_backend="gloo", **DDP_OPTIONS)
        options.setdefault("strategy", strategy)
    warnings.filterwarnings(
        "ignore", module="(pytorch_)?lightning"
    )  # hints: workers, log intervals, checkpoint folders
    warnings.filterwarnings("ignore", message=".*(isinstance\\(treespec|lightning|num_workers).*")
    options = {"enable_checkpointing": False} | options
    return namespace.Trainer(
        accelerator="cpu", devices=world_size, precision="64-true", max_epochs=2, logger=False,
        default_root_dir=path, enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
        **options,
    )  # fmt: skip


def clean_environment():
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "TORCHELASTIC_RUN_ID"):
        os.environ.pop(name, None)


def fit(rank, world_size, path, callbacks, options=None, name="lightning.pytorch"):
    clean_environment()
    namespace = sys.modules[name]
    module = PROJECTS[namespace]()
    run = trainer(rank, world_size, path, namespace, callbacks=callbacks, **(options or {}))
    run.fit(module, loader(rank, world_size, 12 // world_size))
    kinds = [type(m).__name__ for m in module.modules() if "Norm" in type(m).__name__]
    return module.seen, kinds


NAMESPACES = pytest.mark.parametrize("name", ["lightning.pytorch", "pytorch_lightning"])


@NAMESPACES
def test_two_ranks_follow_one_process_step_by_step(run, tmp_path, name):
    ((one, _),) = run(fit, 1, str(tmp_path), [], initialize=False)
    results = run(fit, 2, str(tmp_path), [NormConverter()], {}, name)
    for seen, kinds in results:
        assert kinds == ["SyncBatchNorm1d"] * 3
        assert len(seen) == len(one) == 4
        for step, wanted in zip(seen, one, strict=True):
            torch.testing.assert_close(step, wanted, rtol=1e-9, atol=1e-10)


class Adapted(Project):
    """A part in front of all layers that rank 0 alone uses; on one process, for its rows."""

    def __init__(self):
        super().__init__()
        self.adapter = nn.Linear(4, 4).double()

    def forward(self, x):
        if self.trainer.world_size == 1:
            x = torch.stack([x[i] if i % 2 else self.adapter(x[i]) for i in range(len(x))])
        elif self.global_rank == 0:
            x = self.adapter(x)
        return super().forward(x)


def fit_with_unused(rank, world_size, path):
    clean_environment()
    module, options = Adapted(), {}
    if world_size > 1:
        unused = {"find_unused_parameters": True, "bucket_cap_mb": 1e-6, **DDP_OPTIONS}
        options["strategy"] = lightning.pytorch.strategies.DDPStrategy(process_group_backend="gloo", **unused)
    run = trainer(rank, world_size, path, callbacks=[NormConverter()], **options)
    run.fit(module, loader(rank, world_size, 12 // world_size))
    return module.seen


def test_parameters_unused_on_one_rank(run, tmp_path):
    (one,) = run(fit_with_unused, 1, str(tmp_path), initialize=False)
    for seen in run(fit_with_unused, 2, str(tmp_path)):
        assert len(seen) == len(one) == 4
        for step, wanted in zip(seen, one, strict=True):
            torch.testing.assert_close(step, wanted, rtol=1e-9, atol=1e-10)


@NAMESPACES
def test_the_plugin_does_the_same_for_a_fit_and_reverts_after_it(run, tmp_path, name):
    ((one, _),) = run(fit, 1, str(tmp_path), [], initialize=False)
    for seen, kinds in run(fit, 2, str(tmp_path), [], {"plugins": [SyncBatchNormLayerSync()]}, name):
        assert kinds == ["BatchNorm1d"] * 3
        for step, wanted in zip(seen, one, strict=True):
            torch.testing.assert_close(step, wanted, rtol=1e-9, atol=1e-10)


def test_without_conversion_two_ranks_differ(run, tmp_path):
    """The comparison above can fail: plain BatchNorm on two ranks is another computation."""
    ((one, _),) = run(fit, 1, str(tmp_path), [], initialize=False)
    for seen, _ in run(fit, 2, str(tmp_path), []):
        assert not torch.allclose(seen[-1]["stem.0.weight"], one[-1]["stem.0.weight"], rtol=1e-3)


def save_resume_test(rank, world_size, path):
    clean_environment()
    from lightning.pytorch.callbacks import ModelCheckpoint

    converter = NormConverter("gn", num_groups=4)
    keep = ModelCheckpoint(path, filename="first", save_top_k=-1, every_n_epochs=1)
    first = trainer(rank, world_size, path, callbacks=[converter, keep], enable_checkpointing=True)
    first.fit_loop.max_epochs = 1
    batches = loader(rank, world_size, 12 // world_size)
    module = Project()
    first.fit(module, batches)
    wanted = copy.deepcopy(module.state_dict())
    assert not [key for key in wanted if "running" in key]
    checkpoint = keep.best_model_path or keep.last_model_path

    resumed = Project()
    second = trainer(rank, world_size, path, callbacks=[NormConverter("gn", num_groups=4)])
    second.fit(resumed, batches, ckpt_path=checkpoint, **SAFE)
    assert second.global_step == 4
    assert len(resumed.seen) == 2

    tested = Project()
    third = trainer(rank, world_size, path, callbacks=[NormConverter("gn", num_groups=4)])
    (result,) = third.test(tested, batches, ckpt_path=checkpoint, verbose=False, **SAFE)
    torch.testing.assert_close(tested.state_dict(), wanted, rtol=0, atol=0)
    assert type(tested.head[0]) is nn.GroupNorm
    predicted = third.predict(tested, batches)
    assert len(predicted) == 2
    return result, resumed.state_dict()


def test_a_gn_run_is_saved_resumed_and_tested_on_one_device_and_two(run, tmp_path):
    ((one, state),) = run(save_resume_test, 1, str(tmp_path / "one"), initialize=False)
    for result, other in run(save_resume_test, 2, str(tmp_path / "two")):
        torch.testing.assert_close(result, one, rtol=1e-6, atol=0)
        torch.testing.assert_close(other, state, rtol=1e-9, atol=1e-10)


def twice_and_other_stages(rank, world_size, path):
    clean_environment()
    module, batches = Project(), loader(rank, world_size, 6)
    for _ in range(2):
        trainer(rank, world_size, path, callbacks=[NormConverter()]).fit(module, batches)
    trainer(rank, world_size, path, callbacks=[NormConverter()]).validate(module, batches, verbose=False)
    assert isinstance(module.head[0], syncbn.SyncBatchNorm)
    assert len(module.seen) == 2 * 2 * SIZE // (6 * world_size)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module.head))):
        assert any(isinstance(m, syncbn.SyncBatchNorm) for m in other.modules())
    syncbn.revert(module)
    assert type(module.head[0]) is nn.BatchNorm1d


def test_fit_twice_then_validate(run, tmp_path):
    run(twice_and_other_stages, 1, str(tmp_path), initialize=False)
    run(twice_and_other_stages, 2, str(tmp_path))


class CopiesInSetup(Callback):
    def setup(self, trainer, pl_module, stage):
        self.copies = [copy.deepcopy(pl_module), pickle.loads(pickle.dumps(pl_module))]


def copied_before(rank, world_size, path):
    clean_environment()
    module, keeper = Project(), CopiesInSetup()
    batches = loader(rank, world_size, 6)
    trainer(rank, world_size, path, callbacks=[NormConverter(), keeper]).fit(module, batches)
    assert isinstance(module.head[0], syncbn.SyncBatchNorm)
    for other in keeper.copies:
        trainer(rank, world_size, path).fit(other, batches)
        assert type(other.head[0]) is nn.BatchNorm1d
        assert other.setup.__func__ is Steps.setup
        assert other.configure_model.__func__ is Steps.configure_model


def test_a_copy_from_before_the_conversion_is_a_project_of_its_own(run, tmp_path):
    run(copied_before, 1, str(tmp_path), initialize=False)


class BuildsLate(Callback):
    def setup(self, trainer, pl_module, stage):
        pl_module.extra = nn.BatchNorm1d(3, affine=False)  # not used: DDP wants no parameter of it


def subgroups_and_late_callbacks(rank, world_size, path):
    clean_environment()
    module = Project()
    fit = trainer(rank, world_size, path, callbacks=[NormConverter(process_group=2, exclude=["stem.*"]), BuildsLate()])
    fit.fit(module, loader(rank, world_size, 3))
    assert [type(m).__name__ for m in (module.stem[1], module.extra)] == ["BatchNorm1d", "SyncBatchNorm1d"]
    return module.middle[1].running_mean


@pytest.mark.slow
def test_subgroups_filters_and_layers_of_later_callbacks(run, tmp_path):
    results = run(subgroups_and_late_callbacks, 4, str(tmp_path))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def two_arms(rank, world_size, path):
    clean_environment()
    module = Project()
    arms = [NormConverter(exclude=["head.*"]), NormConverter("gn", num_groups=4, include=["head.*"])]
    trainer(rank, world_size, path, callbacks=arms).fit(module, loader(rank, world_size, 6))
    return [type(m).__name__ for m in (module.stem[1], module.middle[1], module.head[0])]


def test_two_converters_work_in_their_order(run, tmp_path):
    assert run(two_arms, 2, str(tmp_path)) == [["SyncBatchNorm1d", "SyncBatchNorm1d", "GroupNorm"]] * 2


def compiles_itself(rank, world_size, path):
    """A project that converts and compiles in configure_model leaves the callback nothing to do."""
    clean_environment()

    class Compiled(Project):
        def configure_model(self):
            super().configure_model()
            syncbn.convert(self)
            self.head.compile(backend="eager")

    warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")  # torch's, compiling
    module = Compiled()
    trainer(rank, world_size, path, callbacks=[NormConverter()]).fit(module, loader(rank, world_size, 6))
    return type(module.head[0]).__name__


def test_a_project_that_converts_and_compiles_itself(run, tmp_path):
    assert run(compiles_itself, 1, str(tmp_path), initialize=False) == ["SyncBatchNorm1d"]


def hooks_of_the_instance_and_a_failed_fit(rank, world_size, path):
    clean_environment()
    module, batches = Project(), loader(rank, world_size, 6)
    calls = []

    def configure(self):
        calls.append("configure_model")
        Project.configure_model(self)

    module.configure_model = MethodType(configure, module)  # as some users do
    module.setup = lambda stage: (calls.append(stage), Project.setup(module, stage))
    own = dict(module.__dict__)
    failing = trainer(rank, world_size, path, callbacks=[NormConverter("gn", num_groups=4), Fails()])
    with pytest.raises(RuntimeError, match="the disk is full"):
        failing.fit(module, batches)
    assert [module.__dict__[name] for name in ("setup", "configure_model")] == [own["setup"], own["configure_model"]]
    assert calls == []
    trainer(rank, world_size, path).fit(module, batches)
    assert type(module.stem[1]) is nn.BatchNorm1d
    trainer(rank, world_size, path, callbacks=[NormConverter()]).validate(module, batches, verbose=False)
    assert calls == ["fit", "configure_model", "validate", "configure_model"]
    assert all(isinstance(m, syncbn.SyncBatchNorm) for m in (module.stem[1], module.head[0]))
    assert [module.__dict__[name] for name in ("setup", "configure_model")] == [own["setup"], own["configure_model"]]


class Fails(Callback):
    def setup(self, trainer, pl_module, stage):
        raise RuntimeError("the disk is full")


def test_hooks_of_the_instance_are_called_and_kept_also_when_a_fit_fails(run, tmp_path):
    run(hooks_of_the_instance_and_a_failed_fit, 1, str(tmp_path), initialize=False)


def two_converters(rank, world_size, path):
    clean_environment()
    both = trainer(rank, world_size, path, callbacks=[NormConverter()], sync_batchnorm=True)
    with pytest.raises(ValueError, match="drop sync_batchnorm=True"):
        both.fit(Project(), loader(rank, world_size, 6))


def test_sync_batchnorm_beside_the_callback_is_an_error(run, tmp_path):
    run(two_converters, 1, str(tmp_path), initialize=False)
    run(two_converters, 2, str(tmp_path))


def test_arguments_are_checked_at_once():
    with pytest.raises(ValueError, match="unknown norm 'grn'"):
        NormConverter("grn")
    with pytest.raises(ValueError, match="takes num_groups"):
        NormConverter("gn", groups=2)


def test_the_plugin_is_a_layer_sync():
    model = nn.Sequential(nn.BatchNorm1d(2))
    plugin = SyncBatchNormLayerSync()
    for namespace in PROJECTS:
        assert isinstance(plugin, namespace.plugins.LayerSync)
        assert isinstance(NormConverter(), namespace.Callback)
    assert isinstance(plugin.apply(model)[0], syncbn.SyncBatchNorm)
    assert type(plugin.revert(model)[0]) is nn.BatchNorm1d
    syncbn.convert(model)
    plugin.revert(plugin.apply(model))
    assert isinstance(model[0], syncbn.SyncBatchNorm)  # the user's own conversion stays
