"""The memory format of a net: channels last, but where the CPU's convolutions are wrong in it."""

import pytest
import torch
from test_launch import composed, launch, load_train, only_run
from torch import nn

from experiment.training import memory_format
from experiment.training.models.classifiers import ResNet8
from experiment.training.world import World

SIZES = ["data.num_train=64", "data.num_val=0", "data.num_test=20", "trainer.max_epochs=1"]


@pytest.fixture(params=["avx2", "AVX512_CORE"])
def limit(request, monkeypatch):
    """What oneDNN may use: with AVX2 alone it is as on a processor that has no more."""
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", request.param)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    return request.param


@pytest.mark.parametrize(
    ("net", "is_affected"),
    [
        (ResNet8(width=4), True),
        (ResNet8(width=8), False),
        (nn.Conv2d(7, 32, 1, stride=(1, 2)), True),
        (nn.Conv2d(16, 32, 1, stride=2, groups=4), True),
        (nn.Conv2d(3, 32, 3, stride=2), False),
        (nn.Conv2d(3, 32, 1), False),
    ],
    ids=str,
)
def test_only_affected_nets_on_affected_cpus_stay_contiguous(net, is_affected, limit):
    chosen, note = memory_format.choose(net, "cpu")
    expected = torch.contiguous_format if is_affected and limit == "avx2" else torch.channels_last
    assert chosen == expected
    assert ("without AVX-512" in note) == (chosen == torch.contiguous_format)
    assert "\n" not in note
    assert memory_format.choose(net, "gpu") == (torch.channels_last, "")


def test_a_processor_without_avx512(monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    assert memory_format.choose(ResNet8(width=4), "cpu")[0] == torch.contiguous_format
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert memory_format.choose(ResNet8(width=4), "cpu")[0] == torch.channels_last


def test_net_and_images_have_one_format(tmp_path, monkeypatch, limit, capsys):
    monkeypatch.setenv("SYNCBN_CACHE", str(tmp_path))
    for rank in range(2):
        data, task = load_train().build(composed(*SIZES, "model.width=4"), World(rank, 2))
        images = data.example()
        for tensor in (images, task.net[0].weight, task(images[:1]).detach()[..., None, None], task.net[0](images)):
            assert tensor.is_contiguous(memory_format=data.memory_format)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == (limit == "avx2")  # rank 0 alone says so


@pytest.mark.slow
def test_a_narrow_net_trains_alike_with_and_without_avx512(tmp_path, monkeypatch):
    losses = []
    for name, isa in (("plain", "DEFAULT"), ("limited", "AVX2")):
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", isa)
        (tmp_path / name).mkdir()
        done = launch(tmp_path / name, *SIZES, "+norm=bn", "model.width=4", num_ranks=1)
        assert done.returncode == 0, done.stderr
        losses.append(only_run(tmp_path / name)[1]["test_loss"])
    assert "contiguous instead of channels last" in done.stdout
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)  # float32: other kernels add in another order
