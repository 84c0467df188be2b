"""q(y | x) of the two CLUB estimators of OAL: a Gaussian whose mean and log-variance are MLPs."""

from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

# PyTorch's default for Linear: weights and biases both U(-1/sqrt(fan_in), 1/sqrt(fan_in)).
_UNIFORM = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


class TorchDense(nn.Module):
    """`nn.Dense` with PyTorch's default initialisation of weights and bias."""

    features: int

    @nn.compact
    def __call__(self, x: Float[Array, "... i"]) -> Float[Array, "... o"]:
        fan_in = x.shape[-1]
        kernel = self.param("kernel", _UNIFORM, (fan_in, self.features))

        def uniform(key, shape):
            return _UNIFORM(key, (fan_in, *shape))[0]

        bias = self.param("bias", uniform, (self.features,))
        return x @ kernel + jnp.broadcast_to(bias, (*x.shape[:-1], self.features))


class GaussianPredictor(nn.Module):
    """q(y | x): mean by one MLP, log-variance by another that ends in tanh (so within [-1, 1]).

    Source: arXiv 2406.16525, code of the k-NN term (`mean_hidden=(256,)`) and of the diffusion
    term (`mean_hidden=(32, 16, 256)`); `log_variance_hidden=(256,)` in both.
    """

    width: int
    mean_hidden: Sequence[int] = (256,)
    log_variance_hidden: Sequence[int] = (256,)

    @nn.compact
    def __call__(
        self, x: Float[Array, "b i"]
    ) -> tuple[Float[Array, "b d"], Float[Array, "b d"]]:
        layer = TorchDense
        mean, log_variance = x, x
        for i, hidden in enumerate(self.mean_hidden):
            mean = nn.relu(layer(hidden, name=f"mean_{i}")(mean))
        for i, hidden in enumerate(self.log_variance_hidden):
            log_variance = nn.relu(layer(hidden, name=f"log_variance_{i}")(log_variance))
        mean = layer(self.width, name="mean_out")(mean)
        return mean, jnp.tanh(layer(self.width, name="log_variance_out")(log_variance))
