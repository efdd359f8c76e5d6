"""A small model of flax, whose weights go into one of ours; `witnesses.ask` runs this file."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from witnesses import answer

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_platforms", "cpu")


class Net(nn.Module):
    """BatchNorms of all kinds, of which one has flax' own arguments."""

    @nn.compact
    def __call__(self, x, train):
        exact = {"dtype": jnp.float64, "param_dtype": jnp.float64}
        norm = exact | {"use_running_average": not train}
        x = nn.Conv(6, (3, 3), padding="VALID", **exact)(x)
        x = nn.relu(nn.BatchNorm(**norm)(x))
        x = nn.Conv(12, (3, 3), padding="VALID", feature_group_count=3, use_bias=False, **exact)(x)
        x = nn.relu(nn.BatchNorm(use_scale=False, momentum=0.8, epsilon=0.01, **norm)(x))
        x = nn.Conv(4, (1, 1), use_bias=False, **exact)(x)
        x = nn.BatchNorm(use_bias=False, momentum=0.5, **norm)(x)
        x = nn.BatchNorm(use_scale=False, use_bias=False, **norm)(x)
        return nn.Dense(3, **exact)(x.reshape(len(x), -1))


def run(x, dy):
    """Train a model in float64 for three steps, evaluate it, and take one training step more.

    Returns:
        "params" and "batch_stats"; "y_eval"; of the further step "y", "dx", "gradients" and "after", its batch_stats.
    """
    net = Net()
    variables = jax.jit(net.init, static_argnums=2)(jax.random.key(0), x, True)
    variables = jax.tree.map(lambda v: np.asarray(v, x.dtype), variables)
    params, stats = variables["params"], variables["batch_stats"]

    @jax.jit
    def step(params, x, stats):
        def loss(params, x):
            y, new = net.apply({"params": params, "batch_stats": stats}, x, True, mutable=["batch_stats"])
            return (y * dy).sum(), (y, new["batch_stats"])

        return jax.grad(loss, (0, 1), has_aux=True)(params, x)

    for i in range(3):
        (gradients, _), (_, stats) = step(params, np.roll(x, i, 0) * (1 + i), stats)
        params = jax.tree.map(lambda p, gradient: p - 0.1 * gradient, params, gradients)
    y_eval = jax.jit(net.apply, static_argnums=2)({"params": params, "batch_stats": stats}, x, False)
    (gradients, dx), (y, after) = step(params, x, stats)
    found = {"params": params, "batch_stats": stats, "y_eval": y_eval, "y": y, "dx": dx, "gradients": gradients}
    return jax.tree.map(np.asarray, found | {"after": after})


if __name__ == "__main__":
    answer(run)
