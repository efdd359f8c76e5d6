"""Models for the tests of save_memory, and their comparison with a copy that keeps all."""

import copy

import torch
import torch.nn.functional as F
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

import syncbn
from syncbn.memory import save


class Steps(nn.Module):
    """conv, norm, and what a function of the model and the normalized map does before the next conv."""

    def __init__(self, between, norm=None):
        super().__init__()
        self.conv, self.norm, self.next = nn.Conv2d(3, 8, 3), norm or nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3)
        self.act, self.between = nn.ReLU(), between

    def forward(self, x):
        return self.next(self.between(self, self.norm(self.conv(x))))


def activate(model, y):
    return model.act(y)


def relu(model, y):
    return F.relu(y)


class Residual(nn.Module):
    """A chain of residual sums, as in ResNet; ``how`` is how the sum is written."""

    def __init__(self, how, length=7, activation=nn.ReLU):
        super().__init__()
        self.how, self.first = how, nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), activation())
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)) for _ in range(length)
        )
        self.activation, self.last = activation(), nn.Conv2d(4, 2, 1)

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            y = block(x)
            if self.how == "in place":
                y += x
            elif self.how == "twice":
                y = y + x + x
            else:
                y = x + y if self.how == "left" else torch.add(y, x)
            x = self.activation(y)
        return self.last(x)


def vary(model, seed=1):
    """Weights, biases and running statistics other than 1 and 0, with which a rounding may not show."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                for name, value in [*layer.named_parameters(), *layer.named_buffers()]:
                    if value.is_floating_point():
                        shift = 1.0 if "bias" in name else 0.1
                        value.copy_(torch.rand(value.shape, generator=generator) + shift)
    return model


def images(*shape, seed=2, dtype=None):
    return torch.randn(*(shape or (4, 3, 12, 12)), generator=torch.Generator().manual_seed(seed)).to(dtype)


def kept_bytes(model, x):
    """Bytes of new storages that the graph holds after a forward pass, parameters left out: not by hooks."""
    refs = {}

    class Mode(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else [out]:
                if isinstance(tensor, torch.Tensor):
                    storage = tensor.untyped_storage()
                    refs[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
            return out

    known = {t.untyped_storage()._cdata for t in [x, *model.parameters(), *model.buffers()]}
    with Mode():
        y = model(x)
    alive = sum(size for cdata, (ref, size) in refs.items() if cdata not in known and not ref.expired())
    del y
    return alive


def backward(model, x, run=None):
    """Output and gradients of a step whose loss depends on every output differently."""
    model.zero_grad(set_to_none=True)
    x = x.clone().requires_grad_(x.is_floating_point())
    y = (model if run is None else run)(x)
    (y * torch.linspace(-1, 2, y.numel()).view_as(y).to(y.dtype)).sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in model.parameters()), *(b.clone() for b in model.buffers())]


def assert_equal(ours, theirs):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        assert a is None or (a.dtype == b.dtype and torch.equal(a, b))


def check(model, x, smaller=True, run=None, steps=2):
    """Compare some steps with those of a copy that keeps all; return both numbers of bytes."""
    theirs, ours = copy.deepcopy(model), syncbn.save_memory(model)
    save.stop_saving(theirs)
    for _ in range(steps):  # the first one finds out which formulas hold
        assert_equal(backward(ours, x, run and run(ours)), backward(theirs, x, run and run(theirs)))
    sizes = kept_bytes(ours, x), kept_bytes(theirs, x)
    assert (sizes[0] < sizes[1]) == smaller
    return sizes


def reseeded(model):
    """For dropout."""

    def run(x):
        torch.manual_seed(0)
        return model(x)

    return run
