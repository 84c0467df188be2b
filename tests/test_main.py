"""The command: what it refuses and in what words, exit codes, signals, what it imports."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy
from oal_jax.config.ranges import CHOICES

from oal_jax import config, main
from oal_jax.config import Config, flatten
from oal_jax.config.rules import validate
from oal_jax.errors import UserError
from oal_jax.scores import SCORES
from oal_jax.stages import generator, teacher

FASHION = str(Path(__file__).parents[1] / "configs" / "fashion.py")


def run(capsys, *arguments, config=FASHION):
    """(exit code, lines on stderr) of the command."""
    code = main.guard(main.run, ["main", *(["--config", config] if config else []), *arguments])
    return code, capsys.readouterr().err.splitlines()


def refusal(capsys, *arguments, config=FASHION):
    """The one line with which the command refuses."""
    code, lines = run(capsys, *arguments, config=config)
    assert code == 2
    assert len(lines) == 1
    return lines[0].removeprefix("oal_jax: ")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["--config.train.epoch=3"],
            "config key 'train.epoch' is unknown; nearest: 'train.epochs'",
        ),
        (["--config.trian.epochs", "3"], "'trian.epochs' is unknown; nearest: 'train.epochs'"),
        (["--noconfig.smke"], "config key 'smke' is unknown; nearest: 'smoke'"),
        (["--config.method=kd"], "config key 'method' is unknown; nearest: 'method.name'"),
        (["--config.train.epochs=many"], "'train.epochs' wants a value of type int, got 'many'"),
        (["--config.train.epochs", "many"], "'train.epochs' wants a value of type int, got 'many'"),
        (["--config.train.epochs=1.5"], "'train.epochs' wants a value of type int, got '1.5'"),
        (["--config.train.clip=tight"], "'train.clip' wants a value of type float, got 'tight'"),
        (["--config.train.clip=nan"], "'train.clip' wants a value of type float, got nan"),
        (["--config.smoke=maybe"], "'smoke' wants a value of type bool, got 'maybe'"),
        (["--config.evaluation.scores=(1,)"], "'evaluation.scores' wants a value of type tuple"),
        (["--config.evaluation.scores=enrgy"], "scores='enrgy' is not known; nearest: 'energy'"),
        (["--config.evaluation.scores=()"], "evaluation.scores is empty"),
        (
            ["--config.method.name=oak"],
            "method.name='oak' is not one of ce, um, umap, logitnorm, vos, npos, oe, energy, poem,"
            " doe, woods, kd, oal, pixel; nearest: 'oal'",
        ),
        (["--config.evaluation.scores=energy,knm"], "scores='knm' is not known; nearest: 'knn'"),
        (
            ["--config.method.virtual.neighbour=1001"],
            "method.virtual.neighbour=1001 must be at most method.virtual.queue=1000",
        ),
        (
            ["--config.method.name=oe", "--config.outliers.images=letters"],
            "outliers.images='letters' is the far set of the benchmark; train on other images",
        ),
        (["--config.student.depth=19"], "student.depth=19 is not one of 18, 34, 50"),
        (["--config.train.epochs=0"], "train.epochs=0 must be greater than 0"),
        (["--config.data.shift=-1"], "data.shift=-1 must be 0 or greater"),
        (["--config.train.warmup=1.5"], "train.warmup=1.5 must lie in 0..1"),
        (["--config.teacher.heads=3"], "teacher.width=128 is not divisible by teacher.heads=3"),
        (["--config.teacher.heads=0"], "teacher.heads=0 must be greater than 0"),
        (["--config.outliers.knn.neighbour=501"], "neighbour=501 must lie in 1.."),
        (
            ["--config.outliers.knn.keep=40", "--config.smoke"],
            "keep=40 must lie in 1..noise_rows=32",
        ),
        (["--bogus"], "unknown flag --bogus; nearest: --"),
        (["--wrokdir=x"], "unknown flag --wrokdir; nearest: --workdir"),
        (["stray"], "argument 'stray' is not a flag; flags start with --"),
        (["--stage", "trian"], "--stage trian is not one of this config's: teacher, "),
        (["--workdir"], "Missing value for flag --workdir"),
        (["--coordinator", "localhost:1"], "--coordinator, --num-processes and --process-id go"),
        (["--num-processes=2", "--process-id=0"], "--coordinator, --num-processes and"),
        (["--num-processes=two"], "--num_processes=two: invalid literal"),
        (
            ["--coordinator=localhost:1", "--num-processes=2", "--process-id=2"],
            "--process-id 2 must lie in 0..1",
        ),
        (
            ["--coordinator=localhost", "--num-processes=2", "--process-id=0"],
            "--coordinator 'localhost' must be HOST:PORT",
        ),
    ],
)
def test_bad_arguments_are_refused_in_one_line(capsys, tmp_path, arguments, said):
    if "--workdir" not in arguments:
        arguments = ["--workdir", str(tmp_path / "run"), *arguments]
    assert said in refusal(capsys, *arguments)
    assert not list((tmp_path / "run").glob("*/*"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("def get_config(:", "can't be read: invalid syntax (c.py, line 1)"),
        ("import nothing_of_this_name", "No module named 'nothing_of_this_name' (c.py, line 1)"),
        ("x = 1", "has no function get_config()"),
        ("def get_config():\n  return 1 / 0", "ZeroDivisionError: division by zero (c.py, line 2)"),
        ("def get_config():\n  return 3", "must return an oal_jax.config.Config, returned a int"),
        ("def get_config():\n  return {'a': 1}", "oal_jax.config.Config, returned a dict"),
        ("c.train.epoch = 3", "config key 'train.epoch' is unknown; nearest: 'train.epochs'"),
        ("c.trian = 3", "config key 'trian' is unknown; nearest: 'train.ema'"),
        ("c.train.epochs = '3'", "'train.epochs' wants a value of type int, got '3'"),
        ("c.train.epochs = True", "'train.epochs' wants a value of type int, got True"),
        ("c.train = None", "config train must be a Train, is a NoneType"),
        ("c.method.name = None", "'method.name' wants a value of type str, got None"),
    ],
)
def test_bad_config_files_are_refused_in_one_line(capsys, tmp_path, monkeypatch, text, said):
    if text.startswith("c."):
        text = "from oal_jax.config import Config\ndef get_config():\n  c = Config()\n  " + text
        text += "\n  return c\n"
    (tmp_path / "c.py").write_text(text)
    # The name under which the flags import any config file, once a process.
    monkeypatch.delitem(sys.modules, "config_config", raising=False)
    monkeypatch.chdir(tmp_path)
    assert said in refusal(capsys, config=str(tmp_path / "c.py"))


def test_a_missing_config_file_is_told(capsys):
    assert refusal(capsys, config="no/such.py") == "config file 'no/such.py' does not exist"
    assert refusal(capsys, "--config", config=None) == "config file '' does not exist"
    assert refusal(capsys, config=None).startswith("--config FILE is missing; for example")


def test_workdirs_that_do_not_do_are_refused(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    workdir = str(tmp_path / "file" / "run")
    assert "is not a writable directory" in refusal(capsys, "--workdir", workdir)
    flat = flatten(Config()) | {"seed": 7}
    (tmp_path / "config.json").write_text(json.dumps(flat))
    said = refusal(capsys, "--workdir", str(tmp_path), "--config.method.name=ce")
    assert "seed was 7, now 0" in said and "--force" in said


def test_a_batch_that_does_not_fit_the_devices_is_refused(capsys, tmp_path):
    if jax.device_count() == 1:
        pytest.skip("one device")
    wanted = ["--config.method.name=ce", "--config.train.batch_size=129"]
    said = refusal(capsys, "--workdir", str(tmp_path), "--config.smoke", *wanted)
    assert f"train.batch_size=129 is not divisible by the {jax.device_count()} devices" in said
    assert not (tmp_path / "train" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("arguments", "smoke", "epochs"),
    [
        ([], False, None),
        (["--config.smoke"], True, None),
        (["--config.smoke=True"], True, None),
        (["--config.smoke=false"], False, None),
        (["--noconfig.smoke"], False, None),
        (["-config.smoke", "-config.train.epochs", "5"], True, 5),
        (["--config.train.epochs=3", "--config.train.epochs=4"], False, 4),
    ],
)
def test_config_flags(arguments, smoke, epochs):
    values = main.parse(["main", "--config", FASHION, *arguments])
    usual = Config().train.epochs  # where None is expected
    assert (values.config.smoke, values.config.train.epochs) == (smoke, epochs or usual)


def test_other_forms_of_flags():
    values = main.parse(
        [
            *("main", f"--config={FASHION}", "--num-processes", "2", "--process_id=1", "--force"),
            *("--config.evaluation.scores=('energy','knn')", "--config.train.clip=2"),
            *("--config.data.root=", "--config.seed=-1", "--workdir", "a-b/c-d"),
        ]
    )
    assert (values.num_processes, values.process_id, values.force) == (2, 1, True)
    assert values.config.evaluation.scores == ("energy", "knn")
    assert (values.config.train.clip, values.config.seed) == (2.0, -1)
    assert values.workdir == "a-b/c-d"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (("energy", "knn"), ("energy", "knn")),
        (("energy,knn",), ("energy", "knn")),
        ([" energy , knn", "msp"], ("energy", "knn", "msp")),
        (("knn,energy,knn", "energy"), ("knn", "energy")),  # the first of each, in order
        (("all",), config.SCORES),
        (("vim,all",), ("vim", *(name for name in config.SCORES if name != "vim"))),
        (("energy,",), ("energy", "")),  # for `validate` to complain of
        ((), ()),
    ],
)
def test_scores_may_come_in_one_word(given, expected):
    settings = Config(evaluation=config.Evaluation(scores=given))
    expanded = config.expand(settings)
    assert expanded.evaluation.scores == tuple(expected)
    assert config.expand(expanded) == expanded
    assert settings.evaluation.scores == given  # what was given stays


@pytest.mark.parametrize("scores", ["energy", None, (1,), 3])
def test_scores_of_another_type_are_left_to_the_checks(scores):
    settings = Config(evaluation=config.Evaluation(scores=scores))
    assert config.expand(settings) is settings
    with pytest.raises(UserError, match="'evaluation.scores' wants a value of type tuple"):
        validate(config.expand(settings))


def test_scores_by_flags_reach_the_run():
    for text, expected in [
        ("energy,knn", ("energy", "knn")),
        ("all", config.SCORES),
        ("('vim',)", ("vim",)),
    ]:
        values = main.parse(["main", f"--config={FASHION}", f"--config.evaluation.scores={text}"])
        assert config.expand(values.config).evaluation.scores == expected


TAUGHT = ("teacher", "features")
SAMPLED = (*TAUGHT, "generator", "outliers", "latents")
# Method: the stages before its training; with outliers.images=decoded, where that matters.
BEFORE = {
    **{name: ((), ()) for name in ("ce", "logitnorm", "vos", "npos")},
    **{name: ((), SAMPLED) for name in ("oe", "energy", "poem", "doe")},
    "woods": (("estimate_loss",), (*SAMPLED, "estimate_loss")),
    "um": (("estimate_loss",), ("estimate_loss",)),
    "umap": (("estimate_loss",), ("estimate_loss",)),
    "kd": (TAUGHT, TAUGHT),
    "oal": (SAMPLED, SAMPLED),
    "pixel": (SAMPLED, SAMPLED),
}


@pytest.mark.parametrize("name", CHOICES["method.name"])
@pytest.mark.parametrize("um", [False, True])
@pytest.mark.parametrize("constraint", [-1.0, 0.3])
@pytest.mark.parametrize("decoded", [False, True])
def test_the_stages_before_the_training(name, um, constraint, decoded):
    settings = Config(method=config.Method(name=name, um=um, constraint=constraint))
    settings.outliers.images = "decoded" if decoded else "procedural"
    expected = [stage for stage in BEFORE[name][decoded] if stage != "estimate_loss"]
    # woods reads the loss of its start whatever the constraint.
    if name == "woods" or ((um or name in ("um", "umap")) and constraint < 0):
        expected.append("estimate_loss")
    assert list(config.stages_before(settings)) == expected
    if constraint < 0 and not um:
        assert tuple(expected) == BEFORE[name][decoded]


@pytest.mark.parametrize(
    ("small", "large"),
    [
        ("neighbour", "queue"),
        ("boundary", "queue"),
        ("anchors", "boundary"),
        ("npos_keep", "candidates"),
        ("keep", "samples"),
    ],
)
def test_sizes_of_virtual_outliers_fit_one_another(small, large):
    roomy = {"queue": 90, "boundary": 90, "candidates": 90, "samples": 90}
    tight = {"neighbour": 5, "anchors": 5, "npos_keep": 5, "keep": 5}
    sizes = roomy | tight | {large: 50, small: 50}
    if large == "queue":  # it bounds two
        sizes |= {"boundary": 50}
    validate(Config(method=config.Method(virtual=config.Virtual(**sizes))))
    sizes[small] = 51
    said = f"method.virtual.{small}=51 must be at most method.virtual.{large}=50"
    with pytest.raises(UserError, match=said):
        validate(Config(method=config.Method(virtual=config.Virtual(**sizes))))


def test_help(capsys):
    for flag in ("--help", "-h"):
        assert main.guard(main.run, ["main", flag]) == 0
        out, err = capsys.readouterr()
        assert f"--config.train.epochs={Config().train.epochs}" in out
        assert "--workdir" in out and not err


def test_exit_codes(capsys):
    from oal_jax.training.loop import Preempted, TrainingFailed

    for error, code in [
        (UserError("two\nlines"), 2),
        (TrainingFailed("loss is nan at step 3"), 1),
        (Preempted("stopped"), 143),
        (KeyboardInterrupt(), 130),
    ]:

        def command(_, error=error):
            raise error

        assert main.guard(command, []) == code
        assert capsys.readouterr().err.count("\n") == 1
    assert main.guard(lambda _: None, []) == 0


def test_choices_are_those_that_exist():
    assert set(CHOICES["evaluation.scores"]) == set(SCORES)
    validate(Config())


def test_shipped_weights_are_where_the_pipeline_looks():
    from oal_jax.stages import run as pipeline

    looked = {
        str(pipeline._package("pretrained", "weights", n))
        for n in os.listdir(pipeline._package("pretrained", "weights"))
    }
    assert {str(teacher.SHIPPED), str(generator.SHIPPED)} <= looked


def environment(cache):
    """Of a child process: what one compiles is there for the next, as a user's is."""
    inherited = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    return {
        **inherited,
        "JAX_NUM_CPU_DEVICES": "1",
        "XDG_CACHE_HOME": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


TRAIN = [
    *(sys.executable, "-m", "oal_jax.main", "--config", FASHION, "--stage", "train"),
    *("--config.method.name=ce", "--config.data.train_images=256", "--config.train.batch_size=32"),
    *("--config.train.epochs=24", "--config.train.log_every=3", "--config.student.width=4"),
]


def rows(workdir):
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def last_step(workdir):
    return max((row["step"] for row in rows(workdir)), default=0)


def stop(command, workdir, env, number):
    """(exit code, stderr) of the command, sent a signal when it has logged one more epoch."""
    before = last_step(workdir)
    with (workdir.parent / "stderr").open("w+") as err:
        child = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=err)
        try:
            deadline = time.monotonic() + 240
            while last_step(workdir) < before + 8:
                assert child.poll() is None and time.monotonic() < deadline
                time.sleep(0.002)
            child.send_signal(number)
            code = child.wait(60)
        finally:
            child.kill()
            child.wait()
        err.seek(0)
        return code, err.read()


def test_signals_stop_the_command_and_it_goes_on_to_the_same_bits(tmp_path):
    env = environment(tmp_path / "cache")
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    child = subprocess.run([*TRAIN, "--workdir", str(whole)], env=env, capture_output=True)
    assert child.returncode == 0, child.stderr
    assert any(tmp_path.glob("cache/oal_jax/programs/*/jit_*-cache"))
    command = [*TRAIN, "--workdir", str(stopped)]
    for number, expected, said in [
        (signal.SIGKILL, -9, None),
        (
            signal.SIGTERM,
            143,
            r"oal_jax: train: stopped by SIGTERM at step \d+, which was",
        ),
        (signal.SIGINT, 130, "oal_jax: interrupted; start the same command again to go on"),
    ]:
        code, err = stop(command, stopped, env, number)
        assert code == expected, err
        assert not (stopped / "train" / "manifest.json").exists()
        told = [line for line in re.split(r"[\r\n]+", err) if line and "train:  " not in line]
        if said:
            assert len(told) == 1 and re.match(said, told[0]), err
    child = subprocess.run(command, env=env, capture_output=True)
    assert child.returncode == 0, child.stderr
    tensors = [
        safetensors.numpy.load_file(d / "train" / "student.safetensors") for d in (whole, stopped)
    ]
    assert tensors[0].keys() == tensors[1].keys()
    for name, value in tensors[0].items():
        np.testing.assert_array_equal(value, tensors[1][name], err_msg=name)
    assert rows(stopped) == rows(whole)
    steps = [row["step"] for row in rows(whole)]
    assert steps == sorted(set(steps)) and steps[-1] == 192


def test_the_command_imports_little_before_its_flags_are_known():
    heavy = ("jax", "diffusers", "transformers", "tensorflow", "torch", "matplotlib", "scipy")
    code = f"import oal_jax.main, sys; print([m for m in {heavy} if m in sys.modules])"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert child.stdout.strip() == "[]"


def test_skipping_everything_imports_no_model_library():
    heavy = ("diffusers", "transformers", "tensorflow", "torch", "matplotlib", "flax", "orbax")
    code = "import oal_jax.stages.run, oal_jax.evaluation.tables, oal_jax.main, sys;"
    code += f"print([m for m in {heavy} if m in sys.modules])"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert child.stdout.strip() == "[]"
