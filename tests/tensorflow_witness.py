"""Keras' BatchNormalization(synchronized=True) on TensorFlow's replicas, one logical CPU each; for `witnesses.ask`."""

import os

os.environ |= {"KERAS_BACKEND": "tensorflow", "TF_CPP_MIN_LOG_LEVEL": "2"}  # read when they are imported

import keras
import tensorflow as tf
from witnesses import answer

NUM_REPLICAS = 3
cpus = [tf.config.LogicalDeviceConfiguration()] * NUM_REPLICAS
tf.config.set_logical_device_configuration(tf.config.list_physical_devices("CPU")[0], cpus)
STRATEGY = tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(NUM_REPLICAS)])


def run(xs, dys, weights, **options):
    """Run one layer, in the dtype of its keywords; ``xs`` and ``dys`` list over the steps what each replica gets.

    Returns:
        Lists over the steps: "y" and "dx" joined, and by variable name "gradients" and, after the step, "variables".
    """
    with STRATEGY.scope():
        layer = keras.layers.BatchNormalization(synchronized=True, **options)
        layer.build(xs[0][0].shape)
        for variable in layer.trainable_variables:
            variable.assign(weights[variable.name])

    @tf.function
    def replica_step(x, dy):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=True)
            loss = tf.reduce_sum(y * dy)
        dx, *gradients = tape.gradient(loss, [x, *(v.value for v in layer.trainable_variables)])
        return y, dx, gradients

    steps = {"y": [], "dx": [], "gradients": [], "variables": []}
    for parts in zip(xs, dys, strict=True):
        y, dx, gradients = STRATEGY.run(replica_step, [*map(distributed, parts)])
        sums = [STRATEGY.reduce("SUM", gradient, axis=None).numpy() for gradient in gradients]
        steps["y"].append(joined(y))
        steps["dx"].append(joined(dx))
        steps["gradients"].append(dict(zip([v.name for v in layer.trainable_variables], sums, strict=True)))
        steps["variables"].append({v.name: v.numpy() for v in layer.variables})
    return steps


def distributed(parts):
    return STRATEGY.experimental_distribute_values_from_function(
        lambda c: tf.constant(parts[c.replica_id_in_sync_group])
    )


def joined(value):
    return tf.concat(STRATEGY.experimental_local_results(value), 0).numpy()


if __name__ == "__main__":
    answer(run)
