"""These tests run on four virtual CPU devices: `pytest tests/distributed`."""

import os

import jax

os.environ["JAX_NUM_CPU_DEVICES"] = "4"  # for child processes
jax.config.update("jax_num_cpu_devices", 4)
