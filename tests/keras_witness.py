"""Keras' BatchNormalization on torch as a witness, with any of its keywords; `witnesses.ask` runs this file."""

import contextlib
import os
from unittest import mock

os.environ["KERAS_BACKEND"] = "torch"  # Keras reads it when it is imported

import keras
import torch
from keras.src.backend.common import dtypes
from witnesses import answer


def run(xs, dys, float64=False, trainable=True, training=True, weights=None, **options):
    """Run one layer on a list of joined batches, one per step; the loss of a step is ``(y * dy).sum()``.

    Args:
        xs: Inputs of the steps.
        dys: Gradients of the outputs.
        float64: Whether to compute in float64; Keras itself never does, whatever the dtype of the input.
        trainable: What to set ``layer.trainable`` to.
        training: The argument of the call.
        weights: Values by variable name ("gamma", "moving_mean", ...) to start from, where not Keras' own.
        options: Keywords of ``keras.layers.BatchNormalization``.

    Returns:
        Lists over the steps: "y", "dx", and by variable name "gradients" and, after the step, "variables".
    """
    steps = {"y": [], "dx": [], "gradients": [], "variables": []}
    with in_float64() if float64 else contextlib.nullcontext():
        layer = keras.layers.BatchNormalization(**{"dtype": "float64" if float64 else "float32"} | options)
        layer.build(xs[0].shape)
        for variable in layer.variables:
            if variable.name in (weights or {}):
                variable.assign(weights[variable.name])
        layer.trainable = trainable
        for x, dy in zip(xs, dys, strict=True):
            step = one_step(layer, torch.tensor(x, requires_grad=True), torch.tensor(dy), training)
            for name, value in step.items():
                steps[name].append(value)
    return steps


def one_step(layer, x, dy, training):
    for variable in layer.variables:
        variable.value.grad = None
    y = layer(x, training=training)
    (y * dy).sum().backward()
    gradients = {v.name: v.value.grad for v in layer.variables if v.value.grad is not None}
    variables = {v.name: v.value.detach().clone().numpy() for v in layer.variables}
    gradients = {name: gradient.numpy() for name, gradient in gradients.items()}
    return {"y": y.detach().numpy(), "dx": x.grad.numpy(), "gradients": gradients, "variables": variables}


@contextlib.contextmanager
def in_float64():
    """Let Keras compute in float64, which its rules of promotion turn into float32 on the torch back end."""
    floatx = keras.config.floatx()
    keras.config.set_floatx("float64")
    with mock.patch.dict(dtypes.BIT64_TO_BIT32_DTYPE, float64="float64"):
        yield
    keras.config.set_floatx(floatx)


if __name__ == "__main__":
    answer(run)
