"""Every test runs on four virtual CPU devices, with rank promotion forbidden."""

import os

# Read when JAX starts its backend, so they are set before anything imports it.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUM_CPU_DEVICES"] = "4"

import jax

jax.config.update("jax_numpy_rank_promotion", "raise")
