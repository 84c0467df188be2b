"""Messages between devices in compiled programs."""

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from oal_jax import compile as command
from oal_jax.aot import costs, programs
from oal_jax.config import Config, Student
from oal_jax.config.smoke import shrink
from oal_jax.runtime import command as commands
from oal_jax.runtime import distributed

CONFIG = Path(__file__).parents[2] / "configs" / "fashion.py"


def test_messages_count_per_iteration_of_a_loop():
    mesh = distributed.make_mesh()
    rows = NamedSharding(mesh, PartitionSpec("data"))

    def function(x):
        def body(total, _):
            total = total + jnp.sum(x * total[0], axis=0)
            return jax.lax.with_sharding_constraint(total, distributed.replicated(mesh)), None

        return jax.lax.scan(body, jnp.ones(6), length=5)[0]

    lowered = jax.jit(function).lower(jax.ShapeDtypeStruct((8, 6), jnp.float32, sharding=rows))
    sent = costs.collectives(lowered.compile().as_text())
    assert sent == {"all-reduce": {"count": 5, "bytes": 5 * 6 * 4}}


def test_a_step_sends_sums_and_no_activations():
    config = Config(smoke=True)
    config.method.name = "oe"
    config.student = Student(architecture="wide_resnet", depth=10, width=1, dropout=0.1)
    config.train.batch_size = 32
    program = programs.make("train", shrink(config), distributed.make_mesh())
    sent = costs.collectives(program.function.lower(*program.arguments).compile().as_text())
    leaves = jax.tree.leaves(program.arguments[0].params)
    params = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    # Beside the gradients: batch statistics and metrics. The activations of one image after the
    # first convolution alone have five times as many bytes as these.
    assert list(sent) == ["all-reduce"]
    assert params <= sent["all-reduce"]["bytes"] < params + 10_000


@pytest.mark.parametrize("stage", ["features", pytest.param("latents", marks=pytest.mark.slow)])
def test_devices_share_the_rows_of_a_stage(stage):
    config = shrink(Config(smoke=True))
    per_row = []
    for devices in (1, 4):
        mesh = distributed.make_mesh(devices=jax.devices()[:devices])
        program = programs.make(stage, config, mesh)
        compiled = program.function.lower(*program.arguments).compile()
        assert not costs.collectives(compiled.as_text())
        assert not costs.host_calls(program.function.trace(*program.arguments).jaxpr)
        per_row.append(compiled.cost_analysis()["flops"] / program.batch)
    assert per_row[1] == pytest.approx(per_row[0] / 4, rel=0.1)


def test_a_batch_that_devices_cannot_share_is_one_line(capsys, monkeypatch):
    for name in ("JAX_PLATFORMS", "JAX_NUM_CPU_DEVICES"):
        monkeypatch.setenv(name, "")
    argv = ["compile", "--topology", "cpu:3", "--config", str(CONFIG)]
    assert commands.guard(command.run, argv) == 2
    err = capsys.readouterr().err
    assert "train.batch_size" in err and err.count("\n") == 1
