"""Speech: a conformer's convolution block over sequences of several lengths, padded, on two uneven ranks."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import syncbn

CHANNELS, KERNEL = 4, 3
LENGTHS = [[7, 2, 5], [3, 6]]  # frames of the utterances of each rank


class ConvolutionBlock(nn.Module):
    """Gulati et al. 2020, figure 2; frames beyond an utterance's length are left out of everything."""

    def __init__(self, norm):
        super().__init__()
        self.layer_norm, self.norm = nn.LayerNorm(CHANNELS), norm
        self.pointwise1 = nn.Conv1d(CHANNELS, 2 * CHANNELS, 1)
        self.depthwise = nn.Conv1d(CHANNELS, CHANNELS, KERNEL, padding=KERNEL // 2, groups=CHANNELS)
        self.pointwise2 = nn.Conv1d(CHANNELS, CHANNELS, 1)

    def before(self, x):
        return F.glu(self.pointwise1(self.layer_norm(x).transpose(1, 2)), dim=1)

    def after(self, x, y):
        return x + self.pointwise2(F.silu(y)).transpose(1, 2)

    def forward(self, x, lengths):
        valid = torch.arange(x.shape[1]) < lengths.view(-1, 1, 1)  # (N, 1, T)
        y = self.depthwise(self.before(x).masked_fill(~valid, 0))
        return self.after(x, self.norm(y, valid)).masked_fill(~valid.transpose(1, 2), 0)


class OneByOne(ConvolutionBlock):
    """The same without padding: each utterance by itself, but for BatchNorm, which sees the frames of all."""

    def forward(self, xs):
        ys = [self.depthwise(self.before(x[None])) for x in xs]
        frames = self.norm(torch.cat(ys, dim=2))
        return [self.after(x[None], y)[0] for x, y in zip(xs, frames.split([len(x) for x in xs], 2), strict=True)]


def block(cls, norm):
    torch.manual_seed(0)
    return cls(norm).double()


def utterances():
    generator = torch.Generator().manual_seed(1)
    return [[torch.randn(n, CHANNELS, generator=generator).double() for n in lengths] for lengths in LENGTHS]


def train(model, loss_of, steps=3):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
    return getattr(model, "module", model).state_dict()


def speech_rank(rank, world_size, length):
    xs = utterances()[rank]
    padded = torch.full((len(xs), length, CHANNELS), 9.0, dtype=torch.float64)
    for row, x in zip(padded, xs, strict=True):
        row[: len(x)] = x
    lengths = torch.tensor([len(x) for x in xs])
    model = DistributedDataParallel(block(ConvolutionBlock, syncbn.SyncBatchNorm(CHANNELS)))
    return train(model, lambda m: m(padded, lengths).pow(3).sum() * world_size / 5)


@pytest.mark.parametrize("length", [7, 12], ids=["as long as the longest", "longer"])
def test_padding_changes_nothing(run, length):
    xs = [x for part in utterances() for x in part]
    model = block(OneByOne, nn.BatchNorm1d(CHANNELS))
    expected = train(model, lambda m: sum(y.pow(3).sum() for y in m(xs)) / 5)
    for state in run(speech_rank, 2, length):
        torch.testing.assert_close(state, expected, rtol=1e-8, atol=1e-9)
