"""Compiling ahead of time: the program is that of training, its costs, the command."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from oal_jax import compile as command
from oal_jax import main
from oal_jax.aot import costs, programs
from oal_jax.config import Config, Data
from oal_jax.config.smoke import shrink
from oal_jax.runtime import distributed
from oal_jax.stages import run as pipeline
from oal_jax.training import loop

FASHION = ("--config", str(Path(__file__).parent.parent / "configs" / "fashion.py"))


class _Lowered(Exception):
    """Ends a training at its first step, with the step's program."""


def lowered_by_training(config: Config, workdir: Path, monkeypatch) -> str:
    """The program of the first step that a run of `config` calls."""
    compile_step = loop.compile_step

    def recorder(*args, **kwargs):
        def call(*arguments):
            raise _Lowered(compile_step(*args, **kwargs).lower(*arguments).as_text())

        return call

    with monkeypatch.context() as patch, pytest.raises(_Lowered) as caught:
        patch.setattr(loop, "compile_step", recorder)
        pipeline.run(config, workdir, only="train")
    return str(caught.value)


def lowered_from_shapes(config: Config) -> str:
    program = programs.make("train", shrink(config), distributed.make_mesh())
    return program.function.lower(*program.arguments).as_text()


def config_of(method: str) -> Config:
    config = Config(smoke=True)
    config.method.name = method
    return config


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ce", "oal"])
def test_program_from_shapes_is_that_of_training(method, tmp_path, monkeypatch):
    config = config_of(method)
    config.outliers.source = "diffusion"
    trained = lowered_by_training(config, tmp_path, monkeypatch)
    assert lowered_from_shapes(config) == trained
    assert "tf.aliasing_output" in trained or "jax.buffer_donor" in trained  # the state is donated


@pytest.mark.slow
def test_program_from_shapes_is_that_of_training_on_streamed_images(tmp_path, monkeypatch):
    for split, count in {"train": 52, "validation": 2, "test": 1}.items():
        for name in "abcdefghij":
            folder = tmp_path / "cifar10" / split / name
            folder.mkdir(parents=True)
            Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(folder / "0.png")
            for i in range(1, count):
                os.link(folder / "0.png", folder / f"{i}.png")
    config = config_of("ce")
    config.data = Data(
        source="folder", root=str(tmp_path), id_set="cifar10", image_size=32, stream=True
    )
    none = ("none",)
    config.data.near, config.data.far, config.data.validation, config.data.csid = (none,) * 4
    trained = lowered_by_training(config, tmp_path / "run", monkeypatch)
    assert lowered_from_shapes(config) == trained


def counted(function, *arguments) -> int:
    return costs.flops(jax.jit(function).trace(*arguments).jaxpr)


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "padding", "groups"),
    [(8, 3, 1, 1, 1), (9, 3, 2, 1, 1), (12, 7, 2, 3, 2)],
)
def test_convolutions_and_their_gradients_count_as_in_xla(size, kernel, stride, padding, groups):
    images, weights = jnp.zeros((4, size, size, 6)), jnp.zeros((kernel, kernel, 6 // groups, 10))

    def forward(images, weights):
        return jax.lax.conv_general_dilated(
            images,
            weights,
            (stride, stride),
            [(padding, padding)] * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )

    def with_gradients(images, weights, gradient):
        return jax.vjp(forward, images, weights)[1](gradient)

    once = jax.jit(forward).lower(images, weights).cost_analysis()["flops"]
    assert counted(forward, images, weights) == once
    gradient = jax.eval_shape(forward, images, weights)
    assert counted(with_gradients, images, weights, gradient) == 3 * once


def test_loops_count_per_iteration_and_branches_once():
    x = jnp.zeros((4, 4))

    def function(x):
        x, _ = jax.lax.scan(lambda carry, _: (carry @ x, None), x, length=7)
        return jax.lax.cond(x[0, 0] > 0, lambda x: x @ x @ x, lambda x: x @ x, x)

    assert counted(function, x) == (7 + 2) * 2 * 4**3


def test_host_calls_are_found_inside_loops():
    def function(x):
        def body(carry, _):
            jax.debug.callback(print, carry)
            return carry + 1, None

        return jax.lax.scan(body, x, length=2)[0]

    assert costs.host_calls(jax.jit(function).trace(1.0).jaxpr) == ["debug_callback"]
    assert costs.host_calls(jax.jit(jnp.sin).trace(1.0).jaxpr) == []


TPU_PROGRAM = """\
HloModule jit_call, entry_computation_layout={(f32[8]{0})->f32[8]{0}}

%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%x, %y)
}

%wide.condition (p: (s32[], f32[8])) -> pred[] {
  %constant.1 = s32[]{:T(128)} constant(20)
  %counter = s32[] get-tuple-element(%p), index=0
  ROOT %lt = pred[] compare(%counter, %constant.1), direction=LT
}

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %r = (f32[16]{0:T(128)S(1)}, bf16[2,3]{1,0}) all-reduce(%a, %b), to_apply=%add
  %g = f32[16]{0} get-tuple-element(%r), index=0
  %s = (f32[2]{0}, f32[8]{0}) all-gather-start(%c), dimensions={0}
  %d = f32[8]{0} all-gather-done(%s)
}

%unused (p: f32[8]) -> f32[8] {
  ROOT %q = f32[8]{0} all-reduce(%p), to_apply=%add
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  %w = (s32[], f32[8]) while(%t), condition=%wide.condition, body=%body
  ROOT %o = u8[4,2]{1,0} collective-permute(%p), source_target_pairs={{0,1}}
}
"""


def test_messages_in_the_text_of_a_tpu_program():
    assert costs.collectives(TPU_PROGRAM) == {
        "all-gather": {"count": 20, "bytes": 20 * 8 * 4},
        "all-reduce": {"count": 20, "bytes": 20 * (16 * 4 + 6 * 2)},
        "collective-permute": {"count": 1, "bytes": 8},
    }


@pytest.mark.parametrize(("available", "fits"), [(60, True), (59, False), (None, None)])
def test_peak_memory_fits_or_not(available, fits):
    stats = SimpleNamespace(
        argument_size_in_bytes=40,
        output_size_in_bytes=25,
        alias_size_in_bytes=20,
        temp_size_in_bytes=12,
        generated_code_size_in_bytes=3,
    )
    sizes = {"argument_bytes": 40, "temp_bytes": 12, "peak_bytes": 60}
    assert costs.memory(stats, available) == sizes | {"fits": fits}


def test_a_program_that_the_compiler_finds_too_large_does_not_fit():
    def refuse():
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory in memory space")

    class TooLarge(SimpleNamespace):
        def trace(self, *arguments):
            traced = jax.jit(lambda x: x @ x).trace(*arguments)
            lowered = SimpleNamespace(compile=refuse)
            return SimpleNamespace(jaxpr=traced.jaxpr, lower=lambda: lowered)

    program = programs.Program(TooLarge(), (jnp.zeros((4, 4)),), batch=1)
    measured = costs.measure(program, devices=4, memory_bytes=2**34)
    assert measured["fits"] is False and measured["peak_bytes"] is None
    assert measured["flops_per_device"] == 2 * 4**3 / 4
    assert "Ran out of memory" in measured["compiler"]


def run(*arguments: str) -> dict:
    argv = [sys.executable, "-m", "oal_jax.compile", *FASHION, "--config.smoke=True"]
    done = subprocess.run([*argv, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return json.loads(done.stdout)


def test_command_for_eight_virtual_devices():
    printed = run("--topology", "cpu:8", "--config.method.name=ce")
    assert (printed["topology"], printed["devices"], printed["stage"]) == ("cpu:8", 8, "train")
    assert printed["fits"] is None and printed["memory_bytes"] is None
    assert printed["peak_bytes"] >= printed["argument_bytes"] > 512 * 28 * 28
    assert printed["temp_bytes"] > 0 and printed["flops_per_device"] > 0
    assert printed["host_calls"] == []
    assert list(printed["collectives"]) == ["all-reduce"]
    # At least the gradients of the small ResNet.
    assert printed["collectives"]["all-reduce"]["bytes"] > 4 * 100_000


@pytest.mark.slow
def test_drawn_outliers_are_not_sent_between_devices():
    options = ("--config.method.oal.objective=club", "--config.outliers.source=diffusion")
    printed = run("--topology", "cpu:8", *options)
    assert list(printed["collectives"]) == ["all-reduce"] and printed["host_calls"] == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--topology", "v9:2x2", *FASHION), ("'v9:2x2'", "v6e:2x2", "h100:8")),
        (("--topology", "v5e", *FASHION), ("'v5e'", "'v5e:2x2'")),
        (("--topology", "h100:2x4", *FASHION), ("'h100:2x4'", "'h100:8'")),
        (("--topology", "cpu:4", "--stage", "trian", *FASHION), ("trian", "latents")),
        (("--topology", "cpu:64", *FASHION), ("cpu:64", "1 devices")),
        (("--topology", "cpu:4"), ("--config",)),
        (("--topology", "cpu:4", *FASHION, "--config.train.epoch=3"), ("'train.epochs'",)),
        (("--topology", "cpu:1", *FASHION, "--config.data.leave_out=('bag',)"), ("leave_out",)),
        (("--topology", "cpu:4", *FASHION, "--workdir=x"), ("--workdir=x",)),
        (FASHION, ("--topology",)),
    ],
)
def test_a_mistake_is_one_line(arguments, words, capsys, monkeypatch):
    for name in ("JAX_PLATFORMS", "JAX_NUM_CPU_DEVICES"):
        monkeypatch.setenv(name, "")  # what the command sets is taken back
    assert main.guard(command.run, ["compile", *arguments]) == 2
    err = capsys.readouterr().err
    assert all(word in err for word in words), err
    assert err.count("\n") == 1


class _Absent:
    """A finder for which no compiler of accelerators is installed."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in ("libtpu", "jax_plugins"):
            raise ModuleNotFoundError(name)


@pytest.mark.parametrize(
    ("topology", "package", "extra"),
    [("v5e:2x2", "libtpu", "tpu"), ("h100:8", "xla_cuda12", "cuda12")],
)
def test_an_absent_compiler_names_its_extra(topology, package, extra, capsys, monkeypatch):
    monkeypatch.setattr(sys, "meta_path", [_Absent, *sys.meta_path])
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert main.guard(command.run, ["compile", *FASHION, "--topology", topology]) == 2
    err = capsys.readouterr().err
    assert package in err and f"oal-jax[{extra}]" in err
    assert err.count("\n") == 1
