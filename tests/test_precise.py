"""Population statistics, against the mean and variance of all inputs joined in float64; and the callback."""

import copy
import os
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from ranks import RankError
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import syncbn
from syncbn.compat import DDP_OPTIONS
from syncbn.distributed import exchange
from syncbn.lightning import NormConverter, PreciseStatistics

EXACT = {"rtol": 1e-10, "atol": 1e-12}  # float64, another order of summation


def make_model(convert=False, process_group=None, dtype=torch.float64):
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 3, 1),
        nn.BatchNorm2d(3, momentum=None),
        nn.ReLU(),
    ).to(dtype)
    with torch.no_grad():
        for layer in (model[1], model[4]):
            layer.weight.copy_(torch.rand(layer.num_features) + 0.5)
            layer.running_mean.fill_(7)  # what must not matter
    return syncbn.convert(model, process_group=process_group) if convert else model


def make_batches(sizes, seed=0):
    """Draw one batch per size; the later, the larger its mean, so that the variance between batches counts."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(n, 2, 3, 2, dtype=torch.float64, generator=generator) * 2 + i + seed for i, n in enumerate(sizes)
    ]


def inputs_by_hand(model, x):
    """Compute what the two norm layers of `make_model` receive if ``x`` is normalized as one batch."""
    first = model[0](x)
    mean, var = first.mean((0, 2, 3), keepdim=True), first.var((0, 2, 3), correction=0, keepdim=True)
    weight, bias = (p.view(1, -1, 1, 1) for p in (model[1].weight, model[1].bias))
    return first, model[3](((first - mean) / (var + model[1].eps).sqrt() * weight + bias).relu())


def pooled(inputs):
    """Compute mean and unbiased variance per channel of all ``inputs`` joined."""
    values = torch.cat([x.double().movedim(1, 0).flatten(1) for x in inputs], dim=1)
    return {"running_mean": values.mean(1), "running_var": values.var(1)}


@torch.no_grad()
def expected_of(model, batches):
    firsts, seconds = zip(*(inputs_by_hand(model, x) for x in batches), strict=True)
    return {
        f"{layer}.{k}": v for layer, inputs in ((1, firsts), (4, seconds)) for k, v in pooled(inputs).items()
    }  # fmt: skip


def statistics(model):
    return {name: b.clone() for name, b in model.named_buffers() if "running" in name}


def assert_same_on_all_ranks(results):
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=0, atol=0)


def count_exchanges(function):
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        for module, name in ((dist, "all_reduce"), (exchange, "all_gather_single")):
            original = getattr(module, name)
            count = lambda *args, _of=original, **kwargs: (calls.append(args), _of(*args, **kwargs))[1]  # noqa: E731
            patch.setattr(module, name, count)
        function()
    return len(calls)


SIZES = {1: [[4, 2, 3]], 2: [[4, 2], [1, 3, 2]], 3: [[4, 1], [], [2, 2, 2]]}  # of the ranks, uneven, without any


def plain(rank, world_size):
    model = make_model()
    batches = make_batches(SIZES[world_size][rank], rank)
    assert count_exchanges(lambda: syncbn.update_bn_stats(model, iter(batches))) == (world_size > 1)
    assert [model[i].num_batches_tracked for i in (1, 4)] == [0, 0]
    return statistics(model)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_plain_batchnorm_pools_all_batches_of_all_ranks(run, world_size):
    results = run(plain, world_size)
    batches = [x for rank, sizes in enumerate(SIZES[world_size]) for x in make_batches(sizes, rank)]
    torch.testing.assert_close(results[0], expected_of(make_model(), batches), **EXACT)
    assert_same_on_all_ranks(results)


def synchronized(rank, world_size, shares):
    model = make_model(convert=True)
    batches = [x.split(share)[rank] for x, share in zip(make_batches([6, 4, 5]), shares, strict=True)]
    return statistics(syncbn.update_bn_stats(model, batches))


@pytest.mark.parametrize(
    "shares",
    [
        [[6], [4], [5]],
        [[3, 3], [2, 2], [4, 1]],
        [[6, 0, 0], [0, 4, 0], [2, 1, 2]],  # empty parts
    ],
)
def test_synchronized_layers_do_not_depend_on_the_number_of_ranks(run, shares):
    results = run(synchronized, len(shares[0]), shares)
    torch.testing.assert_close(results[0], expected_of(make_model(), make_batches([6, 4, 5])), **EXACT)
    assert_same_on_all_ranks(results)


def grouped(rank, world_size):
    model = make_model(convert=True, process_group=2)
    return statistics(syncbn.update_bn_stats(model, make_batches([3, 2], rank)))


def test_subgroups_normalize_apart_and_pool_together(run):
    results = run(grouped, 4)
    parts = [make_batches([3, 2], rank) for rank in range(4)]
    joined = [torch.cat([parts[r][i], parts[r + 1][i]]) for r in (0, 2) for i in range(2)]
    torch.testing.assert_close(results[0], expected_of(make_model(), joined), **EXACT)
    assert_same_on_all_ranks(results)


def test_the_pooled_variance_is_not_the_mean_of_the_variances():
    """The comparisons above can fail."""
    batches = make_batches([4, 4])
    apart = [expected_of(make_model(), [x])["1.running_var"] for x in batches]
    assert (expected_of(make_model(), batches)["1.running_var"] > 1.02 * sum(apart) / 2).any()


def test_a_layer_called_twice_pools_its_calls():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = self.alias = nn.BatchNorm1d(3, dtype=torch.float64)

        def forward(self, x):
            return self.norm(x).sum() + self.alias(input=5 * x[:2] + 1).sum()

    x = torch.randn(6, 3, dtype=torch.float64)
    model = syncbn.update_bn_stats(Twice(), [x[:4], x[4:]])
    inputs = [x, 5 * x[:2] + 1, 5 * x[4:] + 1]
    torch.testing.assert_close(statistics(model), {f"norm.{k}": v for k, v in pooled(inputs).items()}, **EXACT)


class EvalOnly(nn.BatchNorm1d):
    def train(self, mode=True):
        return super().train(False)


def test_frozen_and_unreached_layers_keep_their_statistics():
    layers = {"bn": nn.BatchNorm1d(3), "frozen": syncbn.freeze(nn.BatchNorm1d(3)), "eval_only": EvalOnly(3).train()}
    model = nn.Sequential()
    for name, layer in (layers | {"stateless": nn.BatchNorm1d(3, track_running_stats=False)}).items():
        model.add_module(name, layer)
    model.unreached = nn.Sequential(nn.BatchNorm1d(2))
    with torch.no_grad():
        for layer in (*layers.values(), model.unreached[0]):
            layer.running_mean.fill_(3)
    x = torch.randn(5, 3)
    model.eval()
    syncbn.update_bn_stats(model, [x], forward=lambda m, x: m.stateless(m.eval_only(m.frozen(m.bn(x)))))
    torch.testing.assert_close(model.bn.running_mean, x.mean(0))
    for layer in (model.frozen, model.eval_only, model.unreached[0]):
        assert (layer.running_mean == 3).all()
        assert (layer.running_var == 1).all()
    assert not any(m.training for m in model.modules())
    assert not any(m.training for m in syncbn.unfreeze(model).modules())


def test_a_part_in_eval_mode_of_a_model_in_train_mode_stays():
    model = make_model()
    model[4].eval()
    before = statistics(model[4])
    syncbn.update_bn_stats(model, make_batches([4]))
    torch.testing.assert_close(statistics(model[4]), before, rtol=0, atol=0)
    assert [m.training for m in model] == [True, True, True, True, False, True]
    syncbn.update_bn_stats(model.eval(), make_batches([4]))
    torch.testing.assert_close(statistics(model), expected_of(model, make_batches([4])), **EXACT)


def test_an_exception_leaves_everything_as_it_was():
    model = make_model().eval()
    model[3].train()
    model.register_buffer("seen", torch.zeros(3).expand(2, 3))
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    buffers = dict(model.named_buffers())

    def batches():
        yield make_batches([4])[0]
        model[1].running_mean = torch.ones(4)
        raise RuntimeError("the disk is full")

    with pytest.raises(RuntimeError, match="disk"):
        syncbn.update_bn_stats(model, batches())
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert [m.training for m in model.modules()] == modes
    assert all(buffer is buffers[name] for name, buffer in model.named_buffers())
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_other_state_of_the_forward_pass_does_not_move():
    model = nn.Sequential(
        nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3)), nn.InstanceNorm1d(4, track_running_stats=True),
        nn.BatchNorm1d(4), nn.BatchNorm1d(4),
    )  # fmt: skip
    model[2].running_mean.fill_(float("nan"))  # the old statistics do not matter
    before = {k: v for k, v in copy.deepcopy(model.state_dict()).items() if not k.startswith(("2.run", "3.run"))}
    syncbn.update_bn_stats(model, [torch.randn(5, 4, 3)])
    assert all(b.isfinite().all() for b in model.buffers())
    torch.testing.assert_close({k: model.state_dict()[k] for k in before}, before, rtol=0, atol=0)
    assert all(p.grad is None for p in model.parameters())


def test_half_precision_and_large_means():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 500, 3, dtype=torch.float64, generator=generator) * 1e-2 + 1e2  # mean/std is 1e4
    for dtype, rtol in ((torch.float64, 1e-7), (torch.float32, 1e-6)):  # the sums cancel 1e8 of 2e-16; the buffer
        batches = [part.to(dtype) for part in x]
        model = syncbn.update_bn_stats(nn.BatchNorm1d(3, dtype=dtype), batches)
        expected = {k: v.to(dtype) for k, v in pooled(batches).items()}
        torch.testing.assert_close(statistics(model), expected, rtol=rtol, atol=0)
    for dtype in (torch.float16, torch.bfloat16):
        batches = [part.to(dtype) for part in x - 99]
        model = syncbn.update_bn_stats(nn.BatchNorm1d(3), batches)  # float32 buffers
        torch.testing.assert_close(
            statistics(model), {k: v.float() for k, v in pooled(batches).items()}, rtol=1e-6, atol=0
        )


@pytest.mark.parametrize("convert", [False, True])
def test_timms_fused_layer(convert):
    from timm.layers import BatchNormAct2d

    model = nn.Sequential(BatchNormAct2d(2), BatchNormAct2d(2)).double()
    batches = make_batches([4, 3])
    if convert:
        syncbn.convert(model)
    syncbn.update_bn_stats(model, batches)
    expected = {f"0.{k}": v for k, v in pooled(batches).items()}
    inner = [F.batch_norm(x, None, None, training=True).relu() for x in batches]
    torch.testing.assert_close(statistics(model), expected | {f"1.{k}": v for k, v in pooled(inner).items()}, **EXACT)


def test_ghost_batch_norm_pools_its_splits():
    x = torch.randn(8, 3)
    model = syncbn.update_bn_stats(syncbn.GhostBatchNorm(3, 2), [x])
    torch.testing.assert_close(statistics(model), {k: v.float() for k, v in pooled([x]).items()})


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, when it compiles
def test_compiled_code_runs_eagerly_meanwhile():
    model = nn.Sequential(nn.BatchNorm1d(3, dtype=torch.float64), nn.ReLU())
    compiled = torch.compile(model, backend="eager")
    x = torch.randn(5, 3, dtype=torch.float64)
    with torch.no_grad():
        compiled(x)  # compiled code for just such a call, without the hooks
    assert syncbn.update_bn_stats(compiled, [x]) is compiled
    torch.testing.assert_close(statistics(model), {f"0.{k}": v for k, v in pooled([x]).items()}, **EXACT)


def test_batches_as_loaders_give_them():
    x = make_batches([4])[0]
    expected = expected_of(make_model(), [x])
    for batch in (x, [x, None], (x,)):
        torch.testing.assert_close(statistics(syncbn.update_bn_stats(make_model(), [batch])), expected, **EXACT)
    own = syncbn.update_bn_stats(make_model(), [{"image": x}], forward=lambda model, batch: model(batch["image"]))
    torch.testing.assert_close(statistics(own), expected, **EXACT)
    with pytest.raises(ValueError, match="got dict; pass forward"):
        syncbn.update_bn_stats(make_model(), [{"image": x}])


class OverLast(nn.BatchNorm1d):
    """Channels last, as no layer of torch."""

    def forward(self, x):
        return super().forward(x.flatten(0, -2)).view(x.shape)


def run_norm(model, x):
    return model["norm"](x)


def test_what_cannot_be_measured_is_an_error():
    with pytest.raises(ValueError, match=r"expected an input \(N, 3, \*\) for the OverLast 'norm', got \(2, 4, 3\)"):
        syncbn.update_bn_stats(nn.ModuleDict({"norm": OverLast(3)}), [torch.randn(2, 4, 3)], forward=run_norm)
    with pytest.warns(UserWarning, match="found no BatchNorm layer in train mode"):
        syncbn.update_bn_stats(nn.Linear(1, 1), iter([]))
    with pytest.raises(ValueError, match="got none on any"):
        syncbn.update_bn_stats(make_model(), [])


def no_batches(rank, world_size):
    syncbn.update_bn_stats(make_model(), [])


def test_no_batches_on_any_rank_is_an_error_on_all(run):
    with pytest.raises(RankError) as error:
        run(no_batches, 2)
    assert [error.value.errors[rank][0] for rank in (0, 1)] == ["ValueError"] * 2


def wrapped(rank, world_size):
    model = nn.parallel.DistributedDataParallel(make_model())
    syncbn.update_bn_stats(model, make_batches([4, 2] if rank else []))
    return statistics(model.module)


def test_a_model_in_ddp_runs_unwrapped(run):
    results = run(wrapped, 2)  # DDP's own forward would wait for the rank without a batch
    torch.testing.assert_close(results[0], expected_of(make_model(), make_batches([4, 2])), **EXACT)
    assert_same_on_all_ranks(results)


def averaged(rank, world_size):
    model = make_model(dtype=torch.float32)
    with torch.no_grad():
        model[1].running_mean.fill_(rank)
        model[1].running_var.fill_(0.1 + rank)
        model[4].running_mean.fill_(rank)
    syncbn.freeze(model[4])
    assert count_exchanges(lambda: syncbn.average_bn_stats(model)) == (world_size > 1)
    return model[1].running_mean, model[1].running_var, model[4].running_mean


@pytest.mark.parametrize("world_size", [1, 3])
def test_averaging_weighs_the_ranks_equally(run, world_size):
    results = run(averaged, world_size)
    assert_same_on_all_ranks([result[:2] for result in results])
    mean = (world_size - 1) / 2
    torch.testing.assert_close(results[0][:2], (torch.full((4,), mean), torch.full((4,), mean + 0.1)))
    assert [result[2][0] for result in results] == list(range(world_size))  # frozen
    with pytest.warns(UserWarning, match="no BatchNorm layer to average"):
        syncbn.average_bn_stats(nn.Linear(1, 1))


# The callback


class Project(LightningModule):
    """A small net with dropout and random augmentation, so that training depends on every random number."""

    def __init__(self, **loader):
        super().__init__()
        torch.manual_seed(0)
        self.frozen = nn.BatchNorm1d(4).eval()  # Lightning keeps this mode
        self.net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.3), nn.Linear(6, 2))
        self.inputs, self.at = [], {}
        self.double()
        self.loader = loader

    def forward(self, x):
        if self.trainer.training and not torch.is_grad_enabled():
            self.inputs.append(self.net[0](self.frozen(x)).detach())
        return self.net(self.frozen(x))

    def train_dataloader(self):
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(24, 4, dtype=torch.float64, generator=generator) * 2 + 1
        options = {"batch_size": 4, "shuffle": True, "generator": generator} | self.loader
        return DataLoader(TensorDataset(x, (x.sum(1) > 4).long()), **options)

    def val_dataloader(self):
        return DataLoader(TensorDataset(torch.ones(2, 4, dtype=torch.float64)), batch_size=1)

    def on_after_batch_transfer(self, batch, dataloader_idx):
        if self.trainer.training:
            return batch[0] + 0.1 * torch.randn_like(batch[0]), batch[1]
        return batch

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        assert not self.net.training
        self.log("val", self(batch[0]).sum(), sync_dist=True)

    def on_validation_epoch_start(self):
        self.at[self.global_step] = (statistics(self), self.inputs)
        self.inputs = []

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(rank, world_size, path, callbacks, module=None, **options):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "TORCHELASTIC_RUN_ID"):
        os.environ.pop(name, None)
    if world_size > 1:
        values = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
        values |= {"GROUP_RANK": 0, "TORCHELASTIC_RUN_ID": "test", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0}
        os.environ |= {k: str(v) for k, v in values.items()}
        options["strategy"] = DDPStrategy(process_group_backend="gloo", **DDP_OPTIONS)
    module = module or Project()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")  # hints: workers, log intervals, checkpoint folders
        warnings.filterwarnings("ignore", message=".*(isinstance\\(treespec|lightning|num_workers).*")
        trainer = Trainer(
            accelerator="cpu", devices=world_size, precision="64-true", logger=False, default_root_dir=path,
            enable_progress_bar=False, enable_model_summary=False, callbacks=callbacks,
            **{"enable_checkpointing": False, "max_epochs": 2, "num_sanity_val_steps": 1} | options,
        )  # fmt: skip
        trainer.fit(module)
    return module, trainer


def both_fits(rank, world_size, path, loader, options):
    torch.manual_seed(rank)
    converters = [NormConverter()] if world_size > 1 else []
    without = fit(rank, world_size, path, converters, Project(**loader), **options)[0]
    torch.manual_seed(rank)
    module = fit(rank, world_size, path, [*converters, PreciseStatistics(4)], Project(**loader), **options)[0]
    torch.testing.assert_close(
        dict(module.named_parameters()), dict(without.named_parameters()), rtol=0, atol=0
    )  # fmt: skip
    assert torch.equal(module.frozen.running_mean, torch.zeros(4))
    assert module.net[1].num_batches_tracked == without.net[1].num_batches_tracked > 0
    return module.at


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_fit_is_not_disturbed_and_validates_with_precise_statistics(run, tmp_path, world_size):
    options = {"val_check_interval": 1 / 3}  # validations inside an epoch too
    results = run(both_fits, world_size, str(tmp_path), {}, options, initialize=world_size > 1)
    num_batches = 6 // world_size  # of an epoch
    steps = list(range(0, 2 * num_batches + 1, num_batches // 3))
    assert list(results[0]) == steps
    assert not results[0][0][1]  # the sanity check
    for step in steps[1:]:
        check(results, step, min(4, num_batches))


@pytest.mark.slow
def test_persistent_workers_are_not_disturbed(tmp_path):
    at = both_fits(0, 1, str(tmp_path), {"num_workers": 1, "persistent_workers": True}, {"val_check_interval": 1 / 2})
    assert list(at) == [0, 3, 6, 9, 12]
    for step in (3, 6, 9, 12):
        check([at], step, 4)


def check(results, step, num_batches):
    """Check the statistics at one validation against the inputs of all ranks."""
    inputs = [x for at in results for x in at[step][1]]
    assert len(inputs) == num_batches * len(results)
    expected = {f"net.1.{k}": v for k, v in pooled(inputs).items()}
    for at in results:
        torch.testing.assert_close({k: at[step][0][k] for k in expected}, expected, **EXACT)
    assert_same_on_all_ranks([at[step][0] for at in results])


def test_a_checkpoint_of_an_epoch_without_validation_is_precise(tmp_path):
    keep = ModelCheckpoint(tmp_path, filename="epoch")
    options = {"limit_val_batches": 0, "enable_checkpointing": True, "max_epochs": 1}
    seen = []

    def forward(module, batch):
        seen.append(batch[0])
        return module(batch[0])

    module, _ = fit(0, 1, str(tmp_path), [PreciseStatistics(100, forward=forward), keep], **options)
    state = torch.load(keep.best_model_path, weights_only=True)["state_dict"]
    assert len(seen) == len(module.inputs) == 6  # at most an epoch, once
    expected = {f"net.1.{k}": v for k, v in pooled(module.inputs).items()}
    torch.testing.assert_close({k: state[k] for k in expected}, expected, **EXACT)


def test_only_fits_are_touched_and_only_one_loader_is_taken(tmp_path):
    module, trainer = fit(0, 1, str(tmp_path), [PreciseStatistics()], max_epochs=1)
    module.net[1].running_mean.fill_(5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.validate(module, verbose=False)
    assert (module.net[1].running_mean == 5).all()

    class Two(Project):
        def train_dataloader(self):
            return {"a": super().train_dataloader(), "b": super().train_dataloader()}

    with pytest.raises(ValueError, match="in one torch DataLoader, got dict"):
        fit(0, 1, str(tmp_path), [PreciseStatistics()], Two())
    with pytest.raises(ValueError, match="at least 1, got 0"):
        PreciseStatistics(0)


class WithoutForward(Project):
    forward = LightningModule.forward

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        assert self.trainer.sanity_checking or self.trainer.global_step


class WithLengths(WithoutForward):
    def forward(self, x, lengths, scale=1):
        return self.net(x) / lengths * scale


class WithDictionaries(WithoutForward):
    forward = Project.forward

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return {"x": batch[0], "y": batch[1]} if self.trainer.training else batch

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch["x"]), batch["y"])


def refused_before_the_first_step(rank, world_size, path):
    for cls, message in (
        (WithoutForward, r"WithoutForward.forward, which has none; say how .* PreciseStatistics\(forward=lambda"),
        (WithLengths, "WithLengths.forward, which is called with the first item .*missing .* argument: 'lengths'"),
        (WithDictionaries, "begins with the input, got dict; pass forward"),
    ):
        module = cls()
        before = copy.deepcopy(module.state_dict())
        with pytest.raises(ValueError, match=message):
            fit(rank, world_size, path, [PreciseStatistics()], module)
        torch.testing.assert_close(module.state_dict(), before, rtol=0, atol=0)
        assert module.trainer.global_step == 0


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_module_that_does_not_run_on_the_batch_is_refused_before_the_first_step(run, tmp_path, world_size):
    run(refused_before_the_first_step, world_size, str(tmp_path), initialize=world_size > 1)


def test_with_forward_the_module_needs_none(tmp_path):
    def forward(module, batch):
        module.inputs.append(module.net[0](batch[0]))
        module.net(batch[0])

    for cls in (WithoutForward, WithLengths):
        module, _ = fit(0, 1, str(tmp_path), [PreciseStatistics(4, forward=forward)], cls(), max_epochs=1)
        (last,) = [at for step, at in module.at.items() if step]
        expected = {f"net.1.{k}": v for k, v in pooled(last[1]).items()}
        torch.testing.assert_close({k: last[0][k] for k in expected}, expected, **EXACT)


@pytest.mark.parametrize("empty", [(), []])
def test_an_empty_tuple_or_list_is_no_batch(empty):
    with pytest.raises(ValueError, match=f"got nothing in a {type(empty).__name__}; pass forward"):
        syncbn.update_bn_stats(nn.Sequential(nn.BatchNorm1d(2)), [empty])


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
def test_lazy_layers_are_named():
    model = nn.Sequential(nn.LazyBatchNorm1d())
    for run in (lambda: syncbn.update_bn_stats(model, [torch.ones(2, 3)]), lambda: syncbn.average_bn_stats(model)):
        with pytest.raises(ValueError, match="the lazy layers 0 do not know their shapes yet: run one batch first"):
            run()
