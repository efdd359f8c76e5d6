"""Run a `programs.Program`: `OnRank` with syncbn, `Alone` with torch's own layer, both for one rank."""

import contextlib
import copy
import io
import itertools
import pickle

import torch
import torch.distributed as dist
from programs import Forward, draw, lay_out
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from versions import torch_norm

import syncbn

MODES = {"grad": contextlib.nullcontext, "no_grad": torch.no_grad, "inference": torch.inference_mode}


class Machine:
    """Execute a program for ``members``, some of the ranks."""

    def __init__(self, program, members):
        self.program, self.members = program, members
        self.calls = {}  # (step, layer, rank): input and output, or an error's name
        self.pending, self.faults = [], []  # outputs that wait for backward
        self.layers = [self.initialized(norm) for norm in program.norms]
        self.past = list(self.layers)  # whose gradients and statistics are compared in the end

    def initialized(self, norm):
        layer = self.make(norm)
        with torch.no_grad():
            for name, parameter in layer.named_parameters():
                values = torch.rand(norm.num_features, generator=draw(self.program, name), dtype=torch.float64)
                parameter.copy_((values + 0.5).to(self.program.param_dtype))
        return layer

    def run(self):
        for step, what in enumerate(self.program.steps):
            if isinstance(what, Forward):
                self.forward(step, what)
            else:
                getattr(self, what.what)()
        self.backward()
        return self

    def forward(self, step, call):
        places = [[(step, i, rank) for rank in self.members] for i in range(len(self.layers))]
        xs = [[self.input(call, place).requires_grad_(call.requires_grad) for place in row] for row in places]
        with MODES[call.mode]():
            ys = self.normalize(xs)
        for place, x, y in zip(*map(itertools.chain.from_iterable, (places, xs, ys)), strict=True):
            self.calls[place] = x, y
            if isinstance(y, torch.Tensor):
                self.check(call, x, y)
                if y.requires_grad:
                    self.pending.append((y, self.output_gradient(call, place)))
        if not self.layers[0].training:
            self.backward()  # before running statistics move, as autograd demands

    def input(self, call, place):
        _, i, _ = place
        shape = self.program.shape(*place)
        values = torch.randn(shape, generator=draw(self.program, "x", *place), dtype=torch.float64)
        offset = torch.randn(shape[1], generator=draw(self.program, "offset", i), dtype=torch.float64)
        offset = (offset * self.program.std + self.program.mean).view(1, -1, *[1] * (len(shape) - 2))
        return lay_out((values * self.program.std + offset).to(self.program.dtype), call.layout)

    def output_gradient(self, call, place):
        shape = self.program.shape(*place)
        values = torch.randn(shape, generator=draw(self.program, "dy", *place), dtype=torch.float64)
        return lay_out(values.to(self.program.dtype), call.dy_layout)

    def check(self, call, x, y):
        pass

    def replace(self, new):
        self.layers = [
            new(layer, norm).train(layer.training) for layer, norm in zip(self.layers, self.program.norms, strict=True)
        ]
        self.past += self.layers

    def backward(self):
        pending, self.pending = self.pending, []
        if pending:
            torch.autograd.backward(*zip(*pending, strict=True))

    def train(self):
        self.layers = [layer.train() for layer in self.layers]

    def eval(self):
        self.layers = [layer.eval() for layer in self.layers]

    def freeze_parameters(self):
        self.layers = [layer.requires_grad_(False) for layer in self.layers]

    def thaw_parameters(self):
        self.layers = [layer.requires_grad_(True) for layer in self.layers]

    def deepcopy(self):
        self.replace(lambda layer, norm: copy.deepcopy(layer))

    def pickle(self):
        self.replace(lambda layer, norm: pickle.loads(pickle.dumps(layer)))

    def state_dict(self):
        def load(layer, norm):
            file = io.BytesIO()
            torch.save(layer.state_dict(), file)
            new = self.make(norm)
            new.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
            return new

        self.replace(load)

    def round_trip(self):
        pass

    def result(self):
        """Return what each call gave, and gradients and buffers of every layer there was."""
        found = {f"step {step}, layer {i}, rank {r}: y": y for (step, i, r), (_, y) in self.calls.items()}
        found.update({f"step {step}, layer {i}, rank {r}: dx": x.grad for (step, i, r), (x, _) in self.calls.items()})
        for number, layer in enumerate(self.past):
            gradients = {f"{name} gradient": parameter.grad for name, parameter in layer.named_parameters()}
            tensors = {**gradients, **dict(layer.named_buffers())}
            found.update({f"layer {number}: {name}": value for name, value in tensors.items()})
        return {k: v.detach().clone() if isinstance(v, torch.Tensor) else v for k, v in found.items()}


class Alone(Machine):
    """What a rank in a group of one computes: with torch's own layer, in the same dtype."""

    def make(self, norm):
        cls = [nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d][len(self.program.tail)]
        return torch_norm(cls, norm.num_features, **norm.options, dtype=self.program.param_dtype)

    def normalize(self, xs):
        return [[attempt(layer, x)] for layer, (x,) in zip(self.layers, xs, strict=True)]


class OnRank(Alone):
    """The part of one rank, with what is tested."""

    def __init__(self, program, rank, world_size):
        self.group = _group(program, rank, world_size)
        super().__init__(program, [rank])

    def run(self):
        self.kernels = dict(zip(("forward", "backward"), self.program.kernels[self.members[0]], strict=True))
        return super().run()

    def make(self, norm):
        if not norm.converted:
            options = {"process_group": self.group, "dtype": self.program.param_dtype}
            return syncbn.SyncBatchNorm(norm.num_features, **norm.options, **options)
        return syncbn.convert(super().make(norm), process_group=self.group)

    def normalize(self, xs):
        with syncbn.use_kernels(self.kernels["forward"]):
            return super().normalize(xs)

    def backward(self):
        kept = [(dy, dy.clone()) for _, dy in self.pending]
        with syncbn.use_kernels(self.kernels["backward"]):
            super().backward()
        if not all(torch.equal(*both) for both in kept):
            self.faults.append("backward wrote into the gradient it got")

    def check(self, call, x, y):
        formats = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
        kept = formats.get(call.layout) if call.layout == "contiguous" or x.dim() == 4 else None
        if (y.dtype, y.shape) != (x.dtype, x.shape):
            self.faults.append(f"{call}: the output is {tuple(y.shape)} of {y.dtype}")
        if kept and not y.is_contiguous(memory_format=kept):
            self.faults.append(f"{call}: the output has strides {y.stride()}, the input {x.stride()}")

    def round_trip(self):
        """Revert and convert again; in between the layer computes the very same in eval mode."""
        for layer, norm in zip(self.layers, self.program.norms, strict=True):
            if not norm.converted:
                continue
            training = layer.training
            x = torch.ones(2, norm.num_features, *self.program.tail, dtype=self.program.dtype)
            before = layer.eval()(x)
            if not torch.equal(syncbn.revert(layer)(x), before):
                self.faults.append("a reverted layer computes something else in eval mode")
            syncbn.convert(layer.train(training), process_group=self.group)

    def result(self):
        """Add what is wrong with this rank by itself."""
        for (step, i, rank), (x, _) in self.calls.items():
            if not torch.equal(x, self.input(self.program.steps[step], (step, i, rank))):
                self.faults.append(f"step {step} wrote into its input")
        return super().result(), self.faults


def attempt(function, *args):
    try:
        return function(*args)
    except ValueError as error:
        return f"ValueError: {str(error)[:36]}"  # Expected more than 1 value per channel


def _group(program, rank, world_size):
    """Make what ``process_group`` gets: the same calls in the same order on every rank."""
    group = program.group
    if isinstance(group, tuple) and group[0] == "mesh":
        mesh = init_device_mesh("cpu", (world_size // group[1], group[1]), mesh_dim_names=("replica", "data"))
        return mesh["data"]
    if isinstance(group, tuple):
        groups = [dist.new_group(part) for part in program.parts(world_size)]
        return groups[sorted(set(group)).index(group[rank])]
    return group


def run_programs(rank, world_size, programs):
    """Execute every program with this rank's part: to be called on W ranks."""
    results = [OnRank(program, rank, world_size).run().result() for program in programs]
    dist.barrier()  # programs may exchange nothing: no rank leaves while another still connects to it
    return results
