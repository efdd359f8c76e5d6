"""flax' BatchNorm(axis_name) on four host devices as a witness: a SyncBatchNorm; `witnesses.ask` runs this file."""

import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"  # JAX reads them when it is imported
os.environ["JAX_PLATFORMS"] = "cpu"

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from witnesses import answer

jax.config.update("jax_enable_x64", True)
MESH = Mesh(np.asarray(jax.devices()), ("ranks",))
SHARDED, SAME = PartitionSpec("ranks"), PartitionSpec()


def run(xs, dys, weights, **options):
    """Run one layer on a list of batches, one per step, cut into four equal parts; the loss is ``(y * dy).sum()``.

    Args:
        xs: Inputs of the steps, all devices' one behind the other.
        dys: Gradients of the outputs.
        weights: "scale" and "bias", where the layer has them.
        options: Keywords of ``flax.linen.BatchNorm``.

    Returns:
        Lists over the steps: "y", "dx", and by variable name "gradients" and, after the step, "variables".
    """
    layer = nn.BatchNorm(use_running_average=False, axis_name="ranks", **options)
    variables = layer.init(jax.random.key(0), jnp.asarray(xs[0]))  # makes no use of the axis
    stats = jax.tree.map(lambda s: s.astype(xs[0].dtype), variables["batch_stats"])  # of float32, whatever param_dtype
    params = {name: jnp.asarray(value) for name, value in weights.items()}
    assert params.keys() == variables.get("params", {}).keys()

    def loss(params, x, stats, dy):
        y, new = layer.apply({"params": params, "batch_stats": stats}, x, mutable=["batch_stats"])
        return jax.lax.psum((y * dy).sum(), "ranks"), (y, new["batch_stats"])

    specs = {"in_specs": (SAME, SHARDED, SAME, SHARDED), "out_specs": (SAME, (SHARDED, SAME))}
    step = jax.jit(jax.value_and_grad(jax.shard_map(loss, mesh=MESH, **specs), argnums=(0, 1), has_aux=True))
    steps = {"y": [], "dx": [], "gradients": [], "variables": []}
    for x, dy in zip(xs, dys, strict=True):
        (_, (y, stats)), (gradients, dx) = step(params, jnp.asarray(x), stats, jnp.asarray(dy))
        answers = {"y": y, "dx": dx, "gradients": gradients, "variables": stats}
        for name, value in answers.items():
            steps[name].append(jax.tree.map(np.asarray, value))
    return steps


if __name__ == "__main__":
    answer(run)
