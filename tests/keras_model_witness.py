"""A small model of Keras, whose weights go into one of ours; `witnesses.ask` runs this file."""

import numpy as np
import torch
from keras_witness import in_float64, keras  # which is on torch there
from witnesses import answer

layers = keras.layers


def run(x, dy):
    """Build and train a model in float64 for three steps, evaluate it, and take one training step more.

    Returns:
        By layer, "variables" and "arguments" (momentum and epsilon of a BatchNorm); "y_eval"; of the further step "y",
        "dx" and, by layer, "gradients" and the variables "after" it.
    """
    with in_float64():
        keras.utils.set_random_seed(0)
        model = build(x.shape[1:])
        optimizer = keras.optimizers.SGD(0.1)
        for step in range(3):
            backward(model, np.roll(x, step, 0) * (1 + step), dy)
            optimizer.apply([v.value.grad for v in model.trainable_variables], model.trainable_variables)
        found = {"variables": variables(model), "arguments": arguments(model)}
        found |= {"y_eval": model(x, training=False).detach().numpy()}
        found["y"], found["dx"] = backward(model, x, dy)
        found["gradients"] = variables(model, lambda v: v.value.grad)
        return found | {"after": variables(model)}


def build(shape):
    """Make BatchNorms of all kinds, of which one has Keras' own arguments."""
    return keras.Sequential(
        [
            keras.Input(shape, dtype="float64"),
            layers.Conv2D(6, 3, name="conv"),
            layers.BatchNormalization(name="norm"),
            layers.ReLU(),
            layers.DepthwiseConv2D(3, depth_multiplier=2, use_bias=False, name="depthwise"),
            layers.BatchNormalization(scale=False, momentum=0.8, epsilon=0.01, name="depthwise_norm"),
            layers.ReLU(),
            layers.Conv2D(4, 1, use_bias=False, name="last_conv"),
            layers.BatchNormalization(center=False, momentum=0.5, name="last_norm"),
            layers.Flatten(),
            layers.Dense(3, name="head"),
        ]
    )


def backward(model, x, dy):
    for variable in model.variables:
        variable.value.grad = None
    x = torch.tensor(x, requires_grad=True)
    y = model(x, training=True)
    (y * torch.tensor(dy)).sum().backward()
    return y.detach().numpy(), x.grad.numpy()


def variables(model, read=lambda v: v.value.detach().clone()):
    return {
        layer.name: {v.name: value.numpy() for v in layer.variables if (value := read(v)) is not None}
        for layer in model.layers
        if layer.variables
    }


def arguments(model):
    norms = [layer for layer in model.layers if isinstance(layer, layers.BatchNormalization)]
    return {layer.name: {"momentum": layer.momentum, "epsilon": layer.epsilon} for layer in norms}


if __name__ == "__main__":
    answer(run)
