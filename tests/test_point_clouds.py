"""Point clouds: a PointNet over sets of several sizes, padded to one, on ranks of which one has no cloud at all."""

import torch
from torch import nn

import syncbn

SIZES = [[5, 3, 1], [4], []]  # points of the clouds of each rank
LONGEST = 6


class PointNet(nn.Module):
    """Qi et al. 2017, section 4.2: one network for all points, then the maximum over those of a cloud."""

    def __init__(self, make_norm):
        super().__init__()
        self.first, self.second = nn.Conv1d(3, 6, 1), nn.Conv1d(6, 8, 1)
        self.norm1, self.norm2 = make_norm(6), make_norm(8)
        self.head = nn.Linear(8, 2)

    def forward(self, x, valid):
        y = torch.relu(self.norm1(self.first(x), valid))
        y = self.norm2(self.second(y), valid)
        return self.head(y.masked_fill(~valid, -torch.inf).amax(2))

    def one_by_one(self, clouds):
        """The points of all clouds as one batch without padding."""
        y = torch.relu(self.norm1(self.first(torch.cat(clouds, 1)[None])[0].t()))
        y = self.norm2(self.second(y.t()[None])[0].t())
        return self.head(torch.stack([part.amax(0) for part in y.split([c.shape[1] for c in clouds])]))


def net(make_norm):
    torch.manual_seed(0)
    return PointNet(make_norm).double()


def clouds():
    generator = torch.Generator().manual_seed(2)
    return [[torch.randn(3, n, generator=generator).double() for n in sizes] for sizes in SIZES]


def cloud_rank(rank, world_size):
    mine = clouds()[rank]
    x, valid = torch.full((len(mine), 3, LONGEST), torch.nan).double(), torch.zeros(len(mine), 1, LONGEST).bool()
    for i, cloud in enumerate(mine):
        x[i, :, : cloud.shape[1]], valid[i, :, : cloud.shape[1]] = cloud, True
    model = net(syncbn.SyncBatchNorm)
    x = x.nan_to_num(7.0)  # the convolution before the first norm would carry NaN into its gradient
    model(x, valid).square().sum().backward()
    return {k: p.grad for k, p in model.named_parameters()}, dict(model.named_buffers())


def test_ragged_sets(run):
    model = net(nn.BatchNorm1d)
    model.one_by_one([cloud for part in clouds() for cloud in part]).square().sum().backward()
    results = run(cloud_rank, len(SIZES))
    for name, parameter in model.named_parameters():
        total = sum(gradients[name] for gradients, _ in results)
        torch.testing.assert_close(total, parameter.grad, rtol=1e-8, atol=1e-9)
    for _, buffers in results:
        torch.testing.assert_close(buffers, dict(model.named_buffers()), rtol=1e-9, atol=1e-10)
