"""The cells of a comparison: how many, what each runs, and every grid that cannot be run is refused."""

import itertools
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf

import syncbn
from experiment.comparison.cell import BATCH_FREE, is_batch_free
from experiment.comparison.grid import base_config, make_cells, make_selections
from experiment.comparison.grid_checks import AXES, OTHERS
from experiment.comparison.overrides import GROUPS, quoted, shared_overrides, value_text
from experiment.training.models.classifiers import ResNet8
from syncbn.conversion.norms.registry import REGISTRY

CONF = Path(__file__).parents[1] / "conf"
OWN = {"norm", "seed", "simulate", "eval_split", "audit", "ckpt_path", "run_dir", "checkpoint_every", "timeout"}
COMMON = {"compare": {*AXES, *OTHERS}, "train": OWN}
BOTH = {"node_size", "evaluate", "output_dir", *GROUPS}


@pytest.fixture(autouse=True)
def conf():
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield


def composed(*overrides, folders=()):
    """Compose as launch/compare.py does: the configuration, and what all cells have in common."""
    search = [f"hydra.searchpath=[{','.join(map(quoted, folders))}]"] if folders else []
    whole = compose("compare", [*search, *overrides], return_hydra_config=True)
    config = OmegaConf.masked_copy(whole, [name for name in whole if name != "hydra"])
    return config, shared_overrides(config, whole.hydra.runtime.choices, overrides, folders)


def made(config, shared):
    cells = make_cells(config, shared)
    make_selections(config, shared)
    return cells


def grid(*overrides, folders=()):
    return made(*composed(*overrides, folders=folders))


def as_config(cell):
    """Compose the configuration of the cell's own run."""
    return compose("train", overrides=list(cell.overrides))


def test_the_default_grid():
    cells = grid()
    points = [(c.seed, c.world_size, c.per_rank_batch_size, c.arm) for c in cells]
    expected = itertools.product([0, 1, 2], [4], [1, 2], ["bn", "syncbn", "gn"])
    assert sorted(points) == sorted(point for point in expected if point[2:] != (1, "gn"))
    assert {c.per_rank_batch_size * c.world_size * c.accumulate for c in cells} == {32}
    assert [c.id for c in cells][:4] == ["bn-w4-p1-s0", "syncbn-w4-p1-s0", "gn-w4-s0", "bn-w4-p2-s0"]
    assert {c.group_size for c in cells} == {None}
    assert cells[1].overrides == (
        "trainer.max_epochs=4",
        "+norm=syncbn",
        "seed=0",
        "data.per_rank_batch_size=1",
        "data.accumulate=8",
        "evaluate=[rank0,averaged,precise,batch]",
        "simulate=4",
    )


def test_an_arm_without_the_batch_runs_once_per_seed_if_only_the_batch_changes():
    axes = ["arms=[gn,wn,wn_mean_only]", "per_rank_batch_sizes=[4,1]", "world_sizes=[2,4]", "seeds=[5]"]
    ids = [cell.id for cell in grid(*axes)]
    several = [f"wn_mean_only-w{w}-p{p}-s5" for w in (2, 4) for p in (4, 1)]
    assert sorted(ids) == sorted(["gn-w2-s5", "gn-w4-s5", "wn-w2-s5", "wn-w4-s5", *several])
    assert len(grid(*axes, "isolate=linear")) == 12  # the SGD batch changes, too
    either = grid(*axes, "+select_lr.options.wn=[{mean_only: false}, {mean_only: true}]")
    assert len([cell for cell in either if cell.arm == "wn"]) == 4  # it may choose to use the batch


def test_which_arms_do_not_use_the_batch():
    """Against what they compute: the output for one image beside two different others."""
    images, others = torch.randn(1, 3, 8, 8), torch.randn(2, 1, 3, 8, 8)
    for path in CONF.glob("norm/*.yaml"):
        norm = OmegaConf.to_container(OmegaConf.load(path))
        if norm["_target_"] != "syncbn.lightning.NormConverter":
            continue
        options = {
            k: v for k, v in norm.items() if k not in ("_target_", "norm", "process_group") and "_steps" not in k
        }
        torch.manual_seed(0)
        net = syncbn.convert(ResNet8(width=8), norm["norm"], **options).train()
        [first, second] = [net(torch.cat([images, other]))[0].detach() for other in others]
        assert is_batch_free(norm) == torch.allclose(first, second, atol=1e-5), path.stem
    assert not is_batch_free({"_target_": "torch.nn.GroupNorm"})
    assert not is_batch_free({**OmegaConf.load(CONF / "norm" / "gn.yaml"), "exclude": ["1"]})
    assert not BATCH_FREE - set(REGISTRY)


def test_a_cells_overrides_are_its_place():
    cells = grid(
        "arms=[bn,syncbn_2,brn]", "world_sizes=[2,4]", "per_rank_batch_sizes=[2,4]", "seeds=[3]", "evaluate=[precise]"
    )
    assert len(cells) == 12
    for cell in cells:
        config = as_config(cell)
        assert OmegaConf.to_container(config.norm) == cell.norm == cell.coordinates()["norm"]
        assert (config.seed, config.simulate, config.evaluate) == (3, cell.world_size, ["precise"])
        assert config.data.per_rank_batch_size == cell.per_rank_batch_size
        assert config.data.accumulate == cell.accumulate == 32 // cell.world_size // cell.per_rank_batch_size
        assert config.task.lr_rule == "linear"


def test_group_sizes_are_for_arms_that_synchronize_and_count_once():
    cells = grid(
        "arms=[bn,syncbn,syncbn_2,gn]", "group_sizes=[null,2,node,2]", "per_rank_batch_sizes=[1,1]", "seeds=[0]"
    )
    labels = [cell.label for cell in cells]
    assert labels == [
        "bn",
        "syncbn",
        "syncbn, groups of 2",
        "syncbn, groups of node",
        "syncbn_2",
        "syncbn_2, groups of 2",
        "syncbn_2, groups of node",
        "gn",
    ]
    groups = [as_config(cell).norm.get("process_group", "no") for cell in cells]
    assert groups == ["no", None, 2, "node", 2, 2, "node", "no"]
    assert cells[2].id == "syncbn-g2-w4-p1-s0"
    assert [cell.norm for cell in cells] == [OmegaConf.to_container(as_config(cell).norm) for cell in cells]


@pytest.mark.parametrize(("isolate", "rule"), [("linear", "linear"), ("sqrt", "sqrt"), ("none", "constant")])
def test_without_accumulation_the_learning_rate_follows(isolate, rule):
    cells = grid(f"isolate={isolate}", "per_rank_batch_sizes=[3,100]", "seeds=[0]", "arms=[gn]")
    assert [(c.accumulate, as_config(c).task.lr_rule) for c in cells] == [(1, rule)] * 2


def test_torchrun_cells_do_not_simulate():
    [cell] = grid("engine=torchrun", "arms=[bn]", "per_rank_batch_sizes=[4]", "world_sizes=[2]", "seeds=[0]")
    assert as_config(cell).simulate is None
    assert cell.accumulate == 4


def test_simulated_nodes():
    cells = grid("arms=[syncbn_node]", "node_size=2", "seeds=[0]")
    assert {as_config(cell).node_size for cell in cells} == {2}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        *((f"{axis}=[]", f"the grid is empty: expected {axis} to be a list") for axis in (*AXES, "evaluate")),
        *((f"{axis}=bn", f"expected {axis} to be a list of at least one value, got 'bn'") for axis in AXES),
        ("arms=null", "expected arms to be a list"),
        ("evaluate=rank0", "expected evaluate to be a list"),
        ("arms=[bn,batchnorm]", "unknown arm 'batchnorm': .* bn, .*frozen, .*gn, .*none, .*syncbn, syncbn_2,"),
        ("arms=[null]", "unknown arm None"),
        ("per_rank_batch_sizes=[1,0]", r"per_rank_batch_sizes, at least 1, got \[0\]"),
        ("per_rank_batch_sizes=[1.5]", r"got \[1.5\]"),
        ("world_sizes=[true]", r"world_sizes, at least 1, got \[True\]"),
        ("seeds=[-1,x]", r"seeds, at least 0, got \[-1, 'x'\]"),
        ("group_sizes=[0,all,2.0,true]", r"group_sizes .* null for the arm's own, got \[0, 'all', 2.0, True\]"),
        ("per_rank_batch_sizes=[1,3,16]", r"3 images x 4 ranks cannot be .*=32; .*: \[1, 2, 4, 8\] \(or isolate="),
        ("per_rank_batch_sizes=[1,3,16]", r"\n  16 images x 4 ranks cannot"),
        ("world_sizes=[3]", r"1 images x 3 ranks cannot be .* no per-rank batch can"),
        ("arms=[bn,syncbn_4] world_sizes=[2]", r"syncbn_4: groups of 4 do not divide 2 ranks; choose one of \[1, 2\]"),
        ("arms=[syncbn] group_sizes=[null,3]", r"syncbn: groups of 3 do not divide 4 ranks; .* \[1, 2, 4\]"),
        ("arms=[syncbn_node] node_size=3", "syncbn_node: groups of 3 do not divide 4 ranks"),
        ("node_size=0", "expected node_size to be a number of ranks, at least 1"),
        ("node_size=2 engine=torchrun", "node_size .* engine=simulate alone"),
        ("engine=mpi", "expected engine to be one of simulate, torchrun, got 'mpi'"),
        ("isolate=lr", "expected isolate to be one of accumulate, linear, sqrt, none, got 'lr'"),
        ("evaluate=[rank0,best]", "evaluate to be a list of rank0, averaged, precise, batch, got"),
        ("data.per_rank_batch_size=2", r"belong to the cells: set per_rank_batch_sizes=\[...\]"),
        ("data.accumulate=2", "belong to the cells"),
        ("data.global_batch_size=0", "data.global_batch_size to be a whole number of at least 1, got 0"),
        ("data.global_batch_size=32.0", "whole number of at least 1, got 32.0"),
        ("select_lr.lr_factors=[1]", r"lr_factors to be two numbers or more, each above 0, got \[1\]"),
        ("select_lr.lr_factors=[1,-1]", "lr_factors to be two numbers or more"),
        ("select_lr.lr_factors=[1,1.0001]", "lr_factors to be two numbers or more"),
        ("+select_lr.options.bnn=[{eps:1}]", "select_lr.options has unknown arm 'bnn'"),
        ("+select_lr.options.syncbn=[{process_group:2}]", "options.syncbn cannot choose process_group"),
        ("select_lr.per_rank_batch_size=3", r"select_lr.per_rank_batch_size cannot be run:.*3 images x 4 ranks"),
        ("margin=0", "expected margin to be a fraction of error, above 0, got 0"),
        ("planned=[[bn,sycnbn]]", r"pairs of arms, .* got \[\['bn', 'sycnbn'\]\]; the arms are bn, brn"),
        ("select_lr.seed=2", r"select_lr.seed=2 is one of seeds=\[0, 1, 2\]"),
        ("select_lr.max_epochs=0.5", "select_lr.max_epochs to be a whole number of at least 1, got 0.5"),
        ("select_lr=true", "select_lr to be null, or to have lr_factors, seed"),
        ("+select_lr.rates=[1]", "select_lr to be null, or to have lr_factors, seed"),
        ("select_lr.options={gn:8}", "select_lr.options.gn to be a list of settings"),
        ("task.lr=null", "task.lr to be a learning rate, which select_lr varies, got None; select_lr=null"),
        ("planned=[bn,syncbn]", r"planned to be a list of pairs of arms, .* got \['bn', 'syncbn'\]"),
        ("planned=null", "planned to be a list of pairs"),
        ("+norm=gn", r"no setting of a comparison: norm\. .* in arms=\[...\]"),
        ("+seed=3 ++simulate=8", "no setting of a comparison: seed, simulate"),
    ],
)
def test_a_grid_that_cannot_be_run_is_refused(overrides, message):
    config = compose("compare", overrides=overrides.split())
    with pytest.raises(ValueError, match=f"(?s){message}"):
        made(config, [])


def test_every_problem_is_listed_once():
    with pytest.raises(ValueError) as error:
        grid("arms=[syncbn_4,syncbn]", "world_sizes=[2,4]", "per_rank_batch_sizes=[1,5]", "group_sizes=[null,4]")
    lines = str(error.value).splitlines()
    assert len(lines) == 1 + 2 + 2  # both arms at 2 ranks; the batch of 5 at 2 and at 4


@pytest.mark.parametrize("override", ["seed=3", "simulate=2", "norm=gn", "model=resnet81", "data.x=1", "arms=["])
def test_hydra_refuses_what_it_does_not_know(override):
    with pytest.raises(HydraException):
        grid(override)


def test_shared_overrides_reach_every_cell_as_they_are():
    """All forms of Hydra's grammar, and nothing that is the comparison's own."""
    given = [
        "model=timm",
        "+data.x=1",
        "++trainer.y=2",
        "~task.warmup",
        "model.arch='a, b=c'",
        'data.mean=[1, "2 3"]',
        "+task.more={a: 1, b: [x, y]}",
        "trainer.max_epochs=3",
        "logger.name=x.y",
    ]
    own = ["arms=[gn]", "seeds=[0]", "output_dir=data.d", "per_rank_batch_sizes=[1]", "evaluate=[batch]", "jobs=2"]
    mixed = [override for pair in itertools.zip_longest(own, given) for override in pair if override]
    assert composed(*mixed)[1] == given
    [cell] = grid(*mixed)
    assert cell.overrides[: len(given)] == tuple(given)
    config = as_config(cell)
    assert (config.data.x, config.trainer.y, config.model.arch) == (1, 2, "a, b=c")
    assert config.data.mean == [1, "2 3"]
    assert config.task.more == {"a": 1, "b": ["x", "y"]}
    assert "warmup" not in config.task


@pytest.mark.parametrize("text", ["a b", "a'b", "a\\b", "a\\", "a\\'b", "\\\\a\\\\'", "[1],{x}=:#~", 'ü"', "$x"])
def test_quoting_for_hydra(text):
    assert OverridesParser.create().parse_override(f"x={quoted(text)}").value() == text
    assert OverridesParser.create().parse_override(f"x=[{quoted(text)},1]").value() == [text, 1]


VALUES = [1, 0.5, None, True, "x", "a b", "1e", "null", "true", "{", [1, "a'b"], {"a": [None, "b c"]}]


@pytest.mark.parametrize("value", VALUES)
def test_values_for_hydra(value):
    assert OverridesParser.create().parse_override(f"x={value_text(value)}").value() == value


def test_arms_of_the_users_own_folder(tmp_path):
    (tmp_path / "my 'arms'" / "norm").mkdir(parents=True)
    folder = f"file://{tmp_path}/my 'arms'"
    file = tmp_path / "my 'arms'" / "norm" / "mine.yaml"
    file.write_text("_target_: my_norms.Mine\neps: 0.25\nsize: ${data.global_batch_size}\n")
    (file.parent / "pairs.yaml").write_text(
        "_target_: syncbn.lightning.NormConverter\nnorm: syncbn\nprocess_group: 2\nexclude: ['*.head']\n"
    )
    with pytest.raises(ValueError, match="unknown arm 'mine'"):
        grid("arms=[mine]")
    cells = grid(
        "arms=[mine,pairs]", "group_sizes=[null,4]", "seeds=[0]", "per_rank_batch_sizes=[2]", folders=[folder]
    )
    assert [cell.label for cell in cells] == ["mine", "pairs", "pairs, groups of 4"]
    mine, _, four = map(as_config, cells)
    assert (mine.norm._target_, mine.norm.eps, mine.norm["size"]) == ("my_norms.Mine", 0.25, 32)
    assert (four.norm.process_group, four.norm.exclude) == (4, ["*.head"])
    with pytest.raises(ValueError, match="pairs: groups of 2 do not divide 1 ranks"):
        grid("arms=[pairs]", "world_sizes=[1]", folders=[folder])


@pytest.mark.slow
def test_what_cells_have_in_common(monkeypatch):
    def common(*overrides):
        return base_config(*composed(*overrides))

    monkeypatch.setenv("SYNCBN_CACHE", "/somewhere")
    here = common()
    monkeypatch.setenv("SYNCBN_CACHE", "/else")
    same = ["arms=[gn]", "seeds=[7]", "world_sizes=[2]", "per_rank_batch_sizes=[1]", "jobs=1", "output_dir=x"]
    assert common(*same, "group_sizes=[2]", "logger.name=x") == here
    others = ("model.width=8", "task.lr=1", "isolate=none", "engine=torchrun", "evaluate=[batch]", "node_size=2")
    for other in (*others, "select_lr.seed=7", "select_lr=null", "planned=[[bn,syncbn]]"):
        assert common(other) != here
    names = {"data", "model", "task", "trainer", "engine", "isolate", "node_size", "evaluate"}
    assert set(here) == {*names, "select_lr", "planned", "margin"}


def test_the_configuration_is_that_of_a_run():
    """Where both files name a group, they name the same choice, in the same order; nothing is unknown to either."""
    configs = {name: OmegaConf.load(CONF / f"{name}.yaml") for name in ("compare", "train")}
    groups = {name: [d for d in config.defaults if d != "_self_"] for name, config in configs.items()}
    assert [d for d in groups["compare"] if d != {"grid": None}] == groups["train"]
    for name, config in configs.items():
        assert set(compose(name)) == COMMON[name] | BOTH, name
        assert config.hydra.output_subdir is None


@pytest.mark.parametrize(
    ("group", "choice"),
    sorted((p.parent.name, p.stem) for p in CONF.glob("*/*.yaml") if p.parent.name not in ("norm", "grid")),
)
def test_every_choice_composes_for_a_comparison(group, choice):
    [cell] = grid(f"{group}={choice}", "arms=[bn]", "seeds=[0]", "per_rank_batch_sizes=[1]")
    own = {"data.per_rank_batch_size": 1, "data.accumulate": 8, "trainer.max_epochs": 4}
    there = compose("train", overrides=[f"{group}={choice}", *(f"{k}={v}" for k, v in own.items())])
    assert as_config(cell)[group] == there[group]


@pytest.mark.slow
def test_every_arm_composes_for_a_comparison():
    arms = sorted(path.stem for path in CONF.glob("norm/*.yaml"))
    cells = grid(f"arms=[{','.join(arms)}]", "seeds=[0]", "per_rank_batch_sizes=[1]")
    assert [cell.arm for cell in cells] == arms


GRIDS = sorted(path.stem for path in CONF.glob("grid/*.yaml") if path.stem != "segmentation")


@pytest.mark.parametrize("name", ["segmentation", *(pytest.param(name, marks=pytest.mark.slow) for name in GRIDS)])
def test_every_grid_file_reaches_its_cells(name):
    """What the file sets within the groups of launch/train.py is an override of each run."""
    config, shared = composed(f"grid={name}")
    cells, selections = make_cells(config, shared), make_selections(config, shared)
    assert len({cell.seed for cell in cells}) >= 5
    assert {selection.like.arm for selection in selections} == {cell.arm for cell in cells}
    for cell in cells[:2]:
        for group in GROUPS:
            theirs = OmegaConf.to_container(as_config(cell)[group])
            for key, value in OmegaConf.to_container(config[group]).items():
                assert theirs[key] == value or key in ("per_rank_batch_size", "accumulate"), (group, key)
