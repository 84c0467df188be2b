"""q(y | x) of OAL's CLUB estimators: a Gaussian whose mean and log-variance are MLPs."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class TorchDense(nn.Module):
    """`nn.Dense` with PyTorch's initialisation U(-1/sqrt(fan_in), 1/sqrt(fan_in))."""

    features: int

    @nn.compact
    def __call__(self, x: Float[Array, "b i"]) -> Float[Array, "b o"]:
        """x @ kernel + bias."""
        bound = x.shape[-1] ** -0.5

        def uniform(key, shape):
            return jax.random.uniform(key, shape, minval=-bound, maxval=bound)

        kernel = self.param("kernel", uniform, (x.shape[-1], self.features))
        bias = self.param("bias", uniform, (self.features,))
        return x @ kernel + bias[None]


class GaussianPredictor(nn.Module):
    """q(y | x): one MLP gives the mean, another the log-variance, in [-1, 1] by a tanh.

    Source: arXiv 2406.16525, code of the k-NN term (`mean_hidden=(256,)`) and of the diffusion
    term (`mean_hidden=(32, 16, 256)`); `log_variance_hidden=(256,)` in both.
    """

    width: int
    mean_hidden: Sequence[int] = (256,)
    log_variance_hidden: Sequence[int] = (256,)

    @nn.compact
    def __call__(self, x: Float[Array, "b i"]) -> tuple[Float[Array, "b d"], Float[Array, "b d"]]:
        """(mean, log-variance) of q(. | x)."""
        mean, log_variance = x, x
        for i, hidden in enumerate(self.mean_hidden):
            mean = nn.relu(TorchDense(hidden, name=f"mean_{i}")(mean))
        for i, hidden in enumerate(self.log_variance_hidden):
            log_variance = nn.relu(TorchDense(hidden, name=f"log_variance_{i}")(log_variance))
        mean = TorchDense(self.width, name="mean_out")(mean)
        return mean, jnp.tanh(TorchDense(self.width, name="log_variance_out")(log_variance))
