"""Projects of `lightning` and of `pytorch_lightning`: with one of them installed, both in any order, or none."""

import subprocess
import sys

import pytest

PROGRAM = """
import importlib
import sys
import warnings

warnings.simplefilter("ignore")  # Lightning's hints: workers, log intervals
missing, first, used = sys.argv[1:]
for package in filter(None, missing.split(",")):
    sys.modules[package] = None  # as if it was not installed
if first:
    importlib.import_module(first)

import torch
from torch import nn

import syncbn.lightning
from syncbn.lightning import NormConverter, PreciseStatistics, SyncBatchNormLayerSync

pl = importlib.import_module(used)
assert importlib.import_module(used + ".callbacks")


class Project(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return self(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


callbacks = [NormConverter(), PreciseStatistics()]
options = dict(accelerator="cpu", devices=1, max_epochs=1, logger=False, enable_checkpointing=False)
options |= dict(enable_progress_bar=False, enable_model_summary=False)
module, x = Project(), torch.arange(16.0).view(8, 2)
pl.Trainer(callbacks=callbacks, **options).fit(module, torch.utils.data.DataLoader(x, batch_size=4))
assert isinstance(module.net[1], syncbn.SyncBatchNorm)
torch.testing.assert_close(module.net[1].running_mean, module.net[0](x).mean(0))
pl.Trainer(plugins=[SyncBatchNormLayerSync()], **options)
try:
    pl.Trainer(callbacks=callbacks, sync_batchnorm=True, **options).fit(Project(), torch.utils.data.DataLoader(x))
except ValueError as error:
    print(error)
for package in filter(None, missing.split(",")):
    assert sys.modules.pop(package) is None  # nothing has come in by another way
"""


def program(missing, first, used):
    command = [sys.executable, "-c", PROGRAM, missing, first, used]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("missing", "first", "used"),
    [
        pytest.param("lightning", "", "pytorch_lightning", marks=pytest.mark.slow),
        pytest.param("pytorch_lightning,lightning_fabric", "", "lightning.pytorch", marks=pytest.mark.slow),
        pytest.param("", "pytorch_lightning", "lightning.pytorch", marks=pytest.mark.slow),
        pytest.param("", "lightning.pytorch", "pytorch_lightning", marks=pytest.mark.slow),
    ],
)
def test_a_project_of_one_namespace(missing, first, used):
    result = program(missing, first, used)
    assert result.returncode == 0, result.stderr
    assert "drop sync_batchnorm=True" in result.stdout


def test_without_lightning_the_error_says_what_to_install():
    result = program("lightning,pytorch_lightning", "", "lightning.pytorch")
    assert result.returncode == 1
    last = result.stderr.splitlines()[-1]
    assert last.startswith("ModuleNotFoundError: syncbn.lightning: expected Lightning 2.4 or later")
    assert "pip install 'syncbn[lightning]'" in last


@pytest.mark.slow
def test_one_that_cannot_be_imported_does_not_keep_the_other_out(tmp_path):
    broken = tmp_path / "pytorch_lightning"
    broken.mkdir()
    (broken / "__init__.py").write_text("raise RuntimeError('made for another torch')")
    code = "import sys; sys.path.insert(0, {!r}); {}; import syncbn.lightning".format
    both = code(str(tmp_path), "pass")
    assert subprocess.run([sys.executable, "-c", both], check=False).returncode == 0
    alone = [sys.executable, "-c", code(str(tmp_path), "sys.modules['lightning'] = None")]
    result = subprocess.run(alone, capture_output=True, text=True, check=False)
    assert "RuntimeError: made for another torch" in result.stderr
    assert "ImportError: syncbn.lightning: expected Lightning 2.4 or later" in result.stderr.splitlines()[-1]
