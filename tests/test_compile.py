"""Compiling ahead of time: the same program as training's, what it costs, the command."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from PIL import Image

from oal_jax import compile as command
from oal_jax import main
from oal_jax.aot import costs, programs, topologies
from oal_jax.config import Config, Data, Student
from oal_jax.config.smoke import shrink
from oal_jax.data.sources import load
from oal_jax.errors import UserError
from oal_jax.methods import registry
from oal_jax.runtime import distributed
from oal_jax.stages import run as pipeline
from oal_jax.training import arrays as streams
from oal_jax.training import loop

ROOT = Path(__file__).parent.parent


def config_of(**method) -> Config:
    config = Config(smoke=True)
    for name, value in method.items():
        setattr(config.method, name, value)
    return config


class _Lowered(Exception):
    """Ends a training at its first step: the step's program is known then."""


def lowered_by_training(config: Config, workdir: Path, monkeypatch) -> str:
    """The program of the first step that a run of `config` calls."""
    make = loop.compile_step

    def recorder(*args, **kwargs):
        def call(*arguments):
            raise _Lowered(make(*args, **kwargs).lower(*arguments).as_text())

        return call

    with monkeypatch.context() as patch, pytest.raises(_Lowered) as caught:
        patch.setattr(loop, "compile_step", recorder)
        pipeline.run(config, workdir, only="train")
    return str(caught.value)


def lowered_from_shapes(config: Config) -> str:
    program = programs.make("train", shrink(config), distributed.make_mesh(), "cpu")
    return program.function.lower(*program.arguments).as_text()


def same_program(config: Config, tmp_path, monkeypatch) -> None:
    trained = lowered_by_training(config, tmp_path, monkeypatch)
    assert lowered_from_shapes(config) == trained
    # The state is given up, the batch is split over the four devices, the rest is on all of them.
    assert "tf.aliasing_output" in trained or "jax.buffer_donor" in trained
    assert '"data"' in trained


@pytest.mark.parametrize("method", ["ce", "oe"])
def test_the_program_from_shapes_is_the_one_that_training_calls(method, tmp_path, monkeypatch):
    same_program(config_of(name=method), tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("views", [0, 1])
@pytest.mark.parametrize("source", ["random", "diffusion"])
def test_so_it_is_with_a_teacher_and_latents(source, views, tmp_path, monkeypatch):
    config = config_of(name="oal")
    config.outliers.source, config.teacher.views = source, views
    same_program(config, tmp_path, monkeypatch)


@pytest.mark.slow
def test_so_it_is_with_reduced_latents(tmp_path, monkeypatch):
    same_program(config_of(name="oal", micl="reference"), tmp_path, monkeypatch)


@pytest.mark.slow
def test_so_it_is_with_images_in_lines(tmp_path, monkeypatch):
    config = config_of(name="ce")
    config.data = Data(source="imglist", id_set="cifar10")  # of which smoke generates images
    assert f"tensor<512x{32 * 32 * 3 // 128}x128xui8>" in lowered_from_shapes(config)
    same_program(config, tmp_path, monkeypatch)


def test_rows_of_lines_are_those_of_the_array():
    for shape in ((7, 8, 16, 3), (7, 4, 8, 8)):
        array = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
        lines = streams.in_lines(array)
        assert lines.lines.shape == (7, 3 if shape[3] == 3 else 2, 128)
        assert lines.shape == np.shape(lines) == shape and np.shares_memory(lines.lines, array)
        rows = np.array([4, 0, 4])
        drawn = jax.jit(lambda lines, rows: lines[rows])(lines, rows)
        np.testing.assert_array_equal(drawn, array[rows])
        assert jax.eval_shape(streams.in_lines, array).shape == shape
    every_second = streams.in_lines(array[::2])
    np.testing.assert_array_equal(every_second[np.arange(4)], array[::2])
    for other in (np.zeros((3, 28, 28, 1)), np.zeros((3, 128)), np.zeros((2, 3, 128))):
        assert streams.in_lines(other) is other


@pytest.fixture
def on_disk(tmp_path) -> Data:
    """An ID set of ten classes and one of outliers, each of one image over and over; streamed."""
    sizes = {"train": 52, "validation": 2}
    sets = {f"cifar10/{split}/{name}": n for split, n in sizes.items() for name in "abcdefghij"}
    for name, count in (sets | {"more/train": 200}).items():
        (tmp_path / name).mkdir(parents=True)
        level, first = 255 * name.startswith("more"), tmp_path / name / "0.png"
        Image.fromarray(np.full((32, 32, 3), level, np.uint8)).save(first)
        for i in range(1, count):
            os.link(first, tmp_path / name / f"{i}.png")
    return Data(source="folder", root=str(tmp_path), id_set="cifar10", image_size=32, stream=True)


@pytest.mark.parametrize("method", ["ce", pytest.param("oe", marks=pytest.mark.slow)])
def test_so_it_is_with_streamed_images(method, on_disk, tmp_path, monkeypatch):
    config = config_of(name=method)
    config.data, config.outliers.images = on_disk, "more"
    assert "512x" not in lowered_from_shapes(config)  # the images of a batch are all there are
    same_program(config, tmp_path / "run", monkeypatch)


def test_another_config_is_another_program():
    assert lowered_from_shapes(config_of(name="ce")) != lowered_from_shapes(
        config_of(name="logitnorm")
    )


def test_the_sizes_known_without_files_are_those_of_the_embedded_files():
    data = load("bundled", "fashion", "train")
    assert programs.images_of(Config()) == (
        tuple(data.class_names),
        data.images.shape[1:],
        len(data.images),
    )


def test_sets_of_unknown_sizes_are_told():
    config = Config()
    config.data.id_set = "mine"
    with pytest.raises(UserError, match="data.id_set='mine': the sizes"):
        programs.images_of(config)


def counted(function, *arguments) -> dict[str, int]:
    return costs.flops(jax.jit(function).trace(*arguments).jaxpr)


def test_products_count_a_multiplication_and_an_addition():
    a, b = jnp.zeros((2, 3, 5)), jnp.zeros((2, 5, 7), jnp.float32)
    assert counted(jnp.matmul, a, b) == {"float32": 2 * 2 * 3 * 5 * 7}
    assert counted(jnp.matmul, a.astype(jnp.bfloat16), b.astype(jnp.bfloat16)) == {"bfloat16": 420}


def brute_force(size: int, kernel: int, stride: int, padding: int) -> int:
    """Multiplications of a convolution along one axis, tap by tap."""
    outputs = (size + 2 * padding - kernel) // stride + 1
    return sum(0 <= o * stride + k - padding < size for o in range(outputs) for k in range(kernel))


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "padding"), [(8, 3, 1, 1), (9, 3, 2, 1), (12, 7, 2, 3)]
)
def test_a_convolution_costs_its_two_gradients_what_it_costs_forward(size, kernel, stride, padding):
    images, weights = jnp.zeros((4, size, size, 6)), jnp.zeros((kernel, kernel, 3, 10))

    def forward(images, weights):
        return jax.lax.conv_general_dilated(
            images,
            weights,
            (stride, stride),
            [(padding, padding)] * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=2,
        )

    once = 2 * 4 * 3 * 10 * brute_force(size, kernel, stride, padding) ** 2
    assert counted(forward, images, weights) == {"float32": once}
    both = jax.grad(lambda *arguments: jnp.sum(forward(*arguments) ** 2), (0, 1))
    assert counted(both, images, weights) == {"float32": 3 * once}


def test_loops_count_as_often_as_they_run_and_branches_once():
    x = jnp.zeros((4, 4))

    def function(x):
        x, _ = jax.lax.scan(lambda carry, _: (carry @ x, None), x, length=7)
        return jax.lax.cond(x[0, 0] > 0, lambda x: x @ x @ x, lambda x: x @ x, x)

    assert counted(function, x) == {"float32": (7 + 2) * 2 * 4**3}


def test_flops_agree_with_the_compilers_count():
    program = programs.make("train", shrink(config_of(name="ce")), mesh_of(1), "cpu")
    traced = program.function.trace(*program.arguments)
    ours = sum(costs.flops(traced.jaxpr).values())
    # Before optimization; its count has the element-wise arithmetic too.
    theirs = traced.lower().cost_analysis()["flops"]
    assert 0.8 < ours / theirs < 1


def mesh_of(devices: int) -> jax.sharding.Mesh:
    return distributed.make_mesh(devices=jax.devices()[:devices])


def test_calls_of_the_host_are_found_inside_loops():
    def function(x):
        def body(carry, _):
            jax.debug.callback(print, carry)
            return carry + 1, None

        return jax.lax.scan(body, x, length=2)[0]

    assert costs.host_calls(jax.jit(function).trace(1.0).jaxpr) == ["debug_callback"]
    assert costs.host_calls(jax.jit(jnp.sin).trace(1.0).jaxpr) == []


def test_messages_of_a_compiled_program_are_counted_by_loop_and_size():
    mesh = mesh_of(4)
    rows = NamedSharding(mesh, PartitionSpec("data"))

    def function(x):
        def body(total, _):
            total = total + jnp.sum(x * total[0], axis=0)
            return jax.lax.with_sharding_constraint(total, distributed.replicated(mesh)), None

        return jax.lax.scan(body, jnp.ones(6), length=5)[0]

    text = jax.jit(function).lower(jax.ShapeDtypeStruct((8, 6), jnp.float32, sharding=rows))
    found = costs.collectives(text.compile().as_text())
    assert [(c.kind, c.bytes, c.times) for c in found] == [("all-reduce", 6 * 4, 5)]
    assert "while/body" in found[0].op


ROWS, WIDTH = 32, 64  # of a batch; of the features of the smallest student
FLOAT = 4  # bytes
# A gradient for each pass, and beside it the batch statistics and the metrics.
PASSES, SMALL_SUMS = {"doe": 3}, 10_000
# What a step sends beside sums, and the bytes that are enough for it.
_QUEUED = ROWS * (WIDTH + 8 + 2) * FLOAT  # features, their classes one-hot, their places
GATHERED = {
    "vos": _QUEUED,  # queues on every device take the features of all of them
    "npos": _QUEUED,
    # The outliers that are trained on are the best of the whole batch, so their distances are
    # compared, and the features of the chosen ones are queued with those of the ID images.
    "poem": 2 * ROWS * (WIDTH + 4) * FLOAT + 7 * ROWS * FLOAT,
}
# The chosen ones, images and features, from the devices that have them.
SUMMED = {"poem": ROWS * (28 * 28 + WIDTH) * FLOAT}
REPRESENTATIVE = ("oe", "pixel", "vos")


def sends(config: Config) -> tuple[Counter, int]:
    """Bytes by kind that a training step of the smallest student sends; those of its parameters."""
    config.student = Student(architecture="wide_resnet", depth=10, width=1, dropout=0.1)
    config.teacher.views, config.train.batch_size = 1, ROWS
    program = programs.make("train", shrink(config), mesh_of(4), "cpu")
    # The messages are the same however well a device's own work is compiled.
    quick = {"xla_backend_optimization_level": 0}
    text = program.function.lower(*program.arguments).compile(quick).as_text()
    sent: Counter = Counter()
    for one in costs.collectives(text):
        sent[one.kind] += one.times * one.bytes
    trained = jax.tree.leaves(program.arguments[0].params)
    return sent, sum(leaf.size * leaf.dtype.itemsize for leaf in trained)


def all_but(names: tuple[str, ...]) -> list:
    marks = {True: (), False: pytest.mark.slow}
    return [pytest.param(name, marks=marks[name in names]) for name in registry.METHODS]


@pytest.mark.parametrize("method", all_but(REPRESENTATIVE))
def test_a_step_sends_sums_and_no_activations(method):
    sent, parameters = sends(config_of(name=method))
    sums = sent.pop("all-reduce")
    passes = PASSES.get(method, 1)
    # The first activations of one image alone are five times SMALL_SUMS.
    assert sums < passes * (parameters + SMALL_SUMS) + SUMMED.get(method, 0)
    if method not in ("um", "umap"):
        assert sums >= parameters
    assert set(sent) <= {"all-gather"} and sent["all-gather"] <= GATHERED.get(method, 0)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["oe", "oal"])
def test_so_do_microbatches(method):
    config = config_of(name=method)
    config.train.accumulate = 2
    sent, parameters = sends(config)
    assert set(sent) == {"all-reduce"} and sent["all-reduce"] < 2 * (parameters + SMALL_SUMS)


HLO = """\
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
  %r = (f32[16]{0:T(128)S(1)}, bf16[2,3]{1,0}) all-reduce(%a, %b), to_apply=%add, \
metadata={op_name="jit(call)/while/body/sum"}
  %g = f32[16]{0} get-tuple-element(%r), index=0
  %s = (f32[2]{0}, f32[8]{0}) all-gather-start(%c), dimensions={0}, \
metadata={op_name="jit(call)/gather"}
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


def test_the_text_of_a_tpu_program_is_read():
    assert costs.collectives(HLO) == [
        ("all-reduce", 16 * 4 + 6 * 2, 20, "jit(call)/while/body/sum"),
        ("all-gather", 8 * 4, 20, "jit(call)/gather"),
        ("collective-permute", 8, 1, "unknown"),
    ]


def test_the_roofline_is_the_longest_of_three_times():
    chip = topologies.Chip({"float32": 1e12, "bfloat16": 2e12}, 1e9, 1.0, 1e10, 1e8)
    topology = topologies.Topology("v0:2x2", [None] * 4, "tpu", chip)
    result = {
        "flops_per_device": 3e9,
        "compiler_flops_per_device": 1e9,
        "collectives": {"all-reduce": {"count": 1, "bytes": 1e5}},
    }
    flops = {"float32": 4e9, "bfloat16": 8e9}
    found = command._roofline(result, flops, 1e7, topology)
    assert found["compute_s"] == pytest.approx(1e-3 + 1e-3)
    assert found["memory_s"] == pytest.approx(3 * 1e-3)  # the compiler saw a third of the loop
    assert found["network_s"] == pytest.approx(1.5e-3)
    assert (found["bound_by"], found["mfu"]) == ("memory", 0.667)
    assert command._roofline(result, flops, None, topology)["bound_by"] == "compute"


def run(*arguments: str) -> dict:
    argv = [sys.executable, "-m", "oal_jax.compile", *arguments]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return json.loads(done.stdout)


SMOKE = ("--config", "configs/fashion.py", "--config.smoke=True")


def test_the_command_compiles_for_eight_virtual_devices():
    found = run(*SMOKE, "--topology", "cpu:8", "--config.method.name=ce")
    assert (found["topology"], found["devices"], found["stage"]) == ("cpu:8", 8, "train")
    assert found["fits"] is None and found["estimate"] is None and found["memory_bytes"] is None
    assert found["peak_bytes"] >= found["argument_bytes"] > 512 * 28 * 28
    assert found["temp_bytes"] > 0 and found["flops_per_device"] > 0
    assert found["host_calls"] == [] and found["origins"] == []
    assert list(found["collectives"]) == ["all-reduce"]
    # At least the gradient and the batch statistics of every parameter of the small ResNet.
    assert found["collectives"]["all-reduce"]["bytes"] > 4 * 100_000


@pytest.mark.slow
def test_drawn_outliers_are_not_sent_between_devices():
    options = ("--config.method.micl=reference", "--config.outliers.source=diffusion")
    found = run(*SMOKE, "--topology", "cpu:8", *options)
    assert list(found["collectives"]) == ["all-reduce"] and found["host_calls"] == []


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["latents", "features"])
def test_samples_and_features_need_no_messages(stage):
    found = run(*SMOKE, "--topology", "cpu:8", "--stage", stage)
    assert found["collectives"] == {} and found["host_calls"] == []
    assert found["flops_per_device"] > 0


FASHION = ("--config", str(ROOT / "configs" / "fashion.py"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--topology", "v9:2x2", *FASHION), "'v9:2x2' is unknown; nearest: 'v6e:2x2'; known: v4:"),
        (("--topology", "v5e", *FASHION), "'v5e' has no size of that form; one is 'v5e:2x2'"),
        (("--topology", "h100:2x4", *FASHION), "'h100:2x4' has no size of that form; one is 'h1"),
        (("--topology", "cpu:4", "--stage", "trian", *FASHION), "--stage trian is not compiled"),
        (("--topology", "cpu:3", *FASHION), "train.batch_size=128 is not divisible by the 3 dev"),
        (("--topology", "cpu:64", *FASHION), "JAX has started with 4 devices"),
        (("--topology", "cpu:4"), "--config FILE is missing"),
        (("--topology", "cpu:4", *FASHION, "--config.train.epoch=3"), "nearest: 'train.epochs'"),
        (("--topology", "cpu:4", *FASHION, "--workdir=x"), "unknown flag --workdir=x"),
        (FASHION, "required: --topology"),
    ],
)
def test_a_mistake_is_one_line(arguments, words, capsys, monkeypatch):
    for name in ("JAX_PLATFORMS", "JAX_NUM_CPU_DEVICES"):
        monkeypatch.setenv(name, "")  # what the command sets is taken back
    assert main.guard(command.run, ["compile", *arguments]) == 2
    err = capsys.readouterr().err
    assert words in err
    assert err.count("\n") == 1


class _Absent:
    """A finder that finds no module of these names, installed or not."""

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
    assert package in err and f"pip install 'oal-jax[{extra}]'" in err
    assert err.count("\n") == 1


def test_chips_are_ordered_as_published():
    chips = topologies.CHIPS
    assert all(c.flops["float32"] <= c.flops["bfloat16"] for c in chips.values())
    # arXiv 2304.01433 and the data sheets: v5p over v4, H100 over v6e.
    names = ("v5e", "v4", "v5p", "v6e", "h100")
    peaks = [chips[name].flops["bfloat16"] for name in names]
    np.testing.assert_array_equal(np.sort(peaks), peaks)
