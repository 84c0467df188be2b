"""A linear classifier of features, and its form for features before standardisation."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import numpy as np
from jaxtyping import Array, Float


class LinearHead(nn.Module):
    """Features to (logits, features)."""

    num_classes: int

    @nn.compact
    def __call__(
        self, features: Float[Array, "b d"], train: bool = False, statistics: Any = None
    ) -> tuple[Float[Array, "b k"], Float[Array, "b d"]]:
        """`train` and `statistics` have no effect."""
        del train, statistics
        return nn.Dense(self.num_classes, name="fc")(features), features


def standardise(features: Float[np.ndarray, "n d"]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The features with mean 0 and standard deviation 1 per coordinate; mean; deviation.

    A coordinate that hardly varies is divided by a tenth of the average deviation at least.
    """
    mean, deviation = features.mean(0), features.std(0)
    deviation = np.maximum(deviation, max(1e-6, 0.1 * float(deviation.mean())))
    return (features - mean) / deviation, mean, deviation


def unstandardised(
    head: Mapping[str, np.ndarray], mean: np.ndarray, deviation: np.ndarray
) -> dict[str, np.ndarray]:
    """The head that gives the same logits of the features before `standardise`."""
    kernel = np.asarray(head["kernel"]) / deviation[:, None]
    return {"kernel": kernel, "bias": np.asarray(head["bias"]) - mean @ kernel}
