"""Losses as pure functions, one value per example unless their docstring says otherwise."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def cross_entropy(logits: Float[Array, "b k"], labels: Int[Array, " b"]) -> Float[Array, " b"]:
    """-log softmax(logits)[label], in nats."""
    picked = jnp.take_along_axis(logits, labels[:, None], axis=-1)[:, 0]
    return jax.nn.logsumexp(logits, axis=-1) - picked


def kl_divergence(
    target_logits: Float[Array, "b k"], logits: Float[Array, "b k"]
) -> Float[Array, " b"]:
    """KL(softmax(target) || softmax(logits)) in nats, differentiable in both arguments.

    OAL's two distillation terms (arXiv 2406.16525): teacher logits against student logits, and
    DT(teacher features) against student features, each softmaxed at temperature 1.
    """
    log_p = jax.nn.log_softmax(target_logits, axis=-1)
    log_q = jax.nn.log_softmax(logits, axis=-1)
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def uniform_cross_entropy(logits: Float[Array, "b k"]) -> Float[Array, " b"]:
    """Cross-entropy to the uniform distribution: the outlier exposure loss (arXiv 1812.04606)."""
    return jax.nn.logsumexp(logits, axis=-1) - jnp.mean(logits, axis=-1)


def energy_logistic(
    id_neg_energy: Float[Array, " b"],
    outlier_neg_energy: Float[Array, " m"],
    scale: Float[Array, ""],
    offset: Float[Array, ""],
) -> tuple[Float[Array, " b"], Float[Array, " m"]]:
    """Logistic loss that separates ID from outliers by -E = logsumexp(logits).

    softplus(-(b - a E)) for ID and softplus(b - a E) for outliers, with a = softplus(scale) > 0,
    so the loss lowers E of ID and raises E of outliers. A form of VOS's loss (arXiv 2202.01197,
    eq. 4) with one slope and one offset.
    """
    a = jax.nn.softplus(scale)
    id_loss = jax.nn.softplus(-(a * id_neg_energy + offset))
    return id_loss, jax.nn.softplus(a * outlier_neg_energy + offset)


def energy_hinges(
    id_energy: Float[Array, " b"],
    outlier_energy: Float[Array, " m"],
    margin_in: float,
    margin_out: float,
) -> tuple[Float[Array, " b"], Float[Array, " m"]]:
    """relu(E_in - margin_in)^2 and relu(margin_out - E_out)^2 of E = -logsumexp(logits).

    Energy fine-tuning (arXiv 2010.03759) lowers E of ID below `margin_in` and raises E of outliers
    above `margin_out`.
    """
    return (
        jax.nn.relu(id_energy - margin_in) ** 2,
        jax.nn.relu(margin_out - outlier_energy) ** 2,
    )


def unit_rows(x: Float[Array, "b d"]) -> Float[Array, "b d"]:
    """Rows scaled to unit L2 norm, with a finite gradient where a row is zero.

    Adds 1e-14 to the squared norm, where LogitNorm's code (arXiv 2205.09310) adds 1e-7 to the norm.
    """
    return x / jnp.sqrt(jnp.sum(x**2, axis=-1, keepdims=True) + 1e-14)


def supervised_contrastive(
    embeddings: Float[Array, "b d"], labels: Int[Array, " b"], temperature: float
) -> Float[Array, " b"]:
    """Mean over positives p of -log[exp(z.z_p / t) / sum_{a != self} exp(z.z_a / t)].

    The positives of a row are the other rows of its label. A row without positives has the value 0.
    Embeddings have unit norm (arXiv 2004.11362, eq. 2).
    """
    others = ~jnp.eye(labels.shape[0], dtype=bool)
    similarity = jnp.where(others, embeddings @ embeddings.T / temperature, -jnp.inf)
    log_share = similarity - jax.nn.logsumexp(similarity, axis=-1, keepdims=True)
    positive = others & (labels[:, None] == labels[None])
    total = jnp.sum(jnp.where(positive, log_share, 0.0), axis=-1)
    return -total / jnp.maximum(jnp.sum(positive, axis=-1), 1)


def augmented_lagrangian(
    constraint: Float[Array, " n"], multiplier: Float[Array, " n"], penalty: Float[Array, " n"]
) -> Float[Array, " n"]:
    """The term of a minimisation that enforces `constraint` <= 0 (arXiv 2202.03299).

    m c + p c^2 / 2 where p c + m >= 0, else -m^2 / (2 p): continuous, and flat where the constraint
    holds with a margin.
    """
    active = penalty * constraint + multiplier >= 0
    pulling = multiplier * constraint + penalty * constraint**2 / 2
    return jnp.where(active, pulling, -(multiplier**2) / (2 * penalty))


def club(
    mean: Float[Array, "b d"], log_variance: Float[Array, "b d"], y: Float[Array, "b d"]
) -> Float[Array, " b"]:
    """CLUB's estimate of I(x; y) for a batch of pairs, one value per row (arXiv 2006.12013, eq. 8).

    Positive minus negative term, sum_d [-(m - y)^2 / 2v + mean_j (m - y_j)^2 / 2v], in the exact
    O(B d) form sum_d [m (y - mean y) / v - (y^2 - mean y^2) / 2v]: the negative term needs no
    (B, B, d) tensor. The mean over all pairings of the rows is zero. So with outliers paired at
    random the expected gradient is zero too.
    """
    precision = jnp.exp(-log_variance)
    centred = y - jnp.mean(y, axis=0, keepdims=True)
    squares = y**2 - jnp.mean(y**2, axis=0, keepdims=True)
    return jnp.sum(precision * (mean * centred - squares / 2), axis=-1)


def gaussian_log_likelihood(
    mean: Float[Array, "b d"], log_variance: Float[Array, "b d"], y: Float[Array, "b d"]
) -> Float[Array, " b"]:
    """sum_d [-(y - mean)^2 / variance - log variance]: unnormalised, without the factor 1/2.

    The objective of fitting CLUB's q (arXiv 2006.12013, eq. 13, up to constants).
    """
    return jnp.sum(-((mean - y) ** 2) * jnp.exp(-log_variance) - log_variance, axis=-1)


def ramp(step: Int[Array, ""], start: float, end: float) -> Float[Array, ""]:
    """0 up to step `start`, 1 from `end` on, linear between. Rises over at least one step."""
    return jnp.clip((step - start) / jnp.maximum(end - start, 1.0), 0.0, 1.0)
