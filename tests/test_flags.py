"""The command line: how flags become a config, and what is refused before any work."""

import sys
from pathlib import Path

import pytest

from oal_jax import config, main
from oal_jax.config import Config
from oal_jax.config.flags import parse
from oal_jax.config.rules import validate
from oal_jax.errors import UserError

FASHION = str(Path(__file__).parents[1] / "configs" / "fashion.py")


def refusal(capsys, *arguments, config=FASHION):
    """The one line with which the command refuses."""
    code = main.guard(main.run, ["main", *(["--config", config] if config else []), *arguments])
    lines = capsys.readouterr().err.splitlines()
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
        (["--config.epochs=3"], "key 'epochs' is unknown; nearest: 'train.epochs', 'teacher"),
        (["--config.lr=3"], "key 'lr' is unknown; nearest: 'train.learning_rate', 'teacher"),
        (["--epochs=3"], "unknown flag --epochs; nearest: --config.train.epochs, --config.teacher"),
        (["--epochs", "3"], "unknown flag --epochs; nearest: --config.train.epochs, --config.teac"),
        (["--train.epochs=3"], "unknown flag --train.epochs; nearest: --config.train.epochs"),
        (["--seed=3"], "unknown flag --seed; nearest: --config.seed"),
        (["--method=kd"], "unknown flag --method; nearest: --config.method.name"),
        (["--output-dir=x"], "unknown flag --output-dir; nearest: --workdir"),
        (["--noconfig.smke"], "config key 'smke' is unknown; nearest: 'smoke'"),
        (["--config.method=kd"], "config key 'method' is unknown; nearest: 'method.name'"),
        (["--config.train.epochs=many"], "'train.epochs' must be of type int, got 'many'"),
        (["--config.train.epochs", "many"], "'train.epochs' must be of type int, got 'many'"),
        (["--config.train.epochs=1.5"], "'train.epochs' must be of type int, got '1.5'"),
        (["--config.train.clip=tight"], "'train.clip' must be of type float, got 'tight'"),
        (["--config.train.clip=nan"], "'train.clip' must be of type float, got nan"),
        (["--config.smoke=maybe"], "'smoke' must be of type bool, got 'maybe'"),
        (["--config.evaluation.scores=(1,)"], "'evaluation.scores' must be of type tuple"),
        (["--config.evaluation.scores=enrgy"], "scores='enrgy' is not known; nearest: 'energy'"),
        (["--config.evaluation.scores=()"], "evaluation.scores is empty"),
        (
            ["--config.method.name=oak"],
            "method.name='oak' is not one of ce, kd, oal, pixel, um, umap, logitnorm, oe, energy,"
            " woods, vos, npos; nearest: 'oal'",
        ),
        (["--config.evaluation.scores=energy,knm"], "scores='knm' is not known; nearest: 'knn'"),
        (
            ["--config.method.npos.neighbour=1001"],
            "method.npos.neighbour=1001 must be at most method.npos.queue_size=1000",
        ),
        (
            ["--config.method.name=oe", "--config.outliers.images=letters"],
            "outliers.images='letters' is the far set of the benchmark; train on other images",
        ),
        (["--config.student.depth=19"], "student.depth=19 is not one of 18, 34, 50"),
        (["--config.train.epochs=0"], "train.epochs=0 must be above 0"),
        (["--config.data.shift=-1"], "data.shift=-1 must be at least 0"),
        (["--config.train.warmup=1.5"], "train.warmup=1.5 must be at least 0, at most 1"),
        (["--config.teacher.heads=3"], "teacher.width=128 is not divisible by teacher.heads=3"),
        (["--config.teacher.heads=0"], "teacher.heads=0 must be above 0"),
        (["--config.outliers.knn.neighbour=501"], "neighbour=501 must be at most"),
        (
            ["--config.outliers.knn.per_anchor=40", "--config.smoke"],
            "per_anchor=40 must be at most outliers.knn.noise_rows=32",
        ),
        (["--bogus"], "unknown flag --bogus; --help lists what there is"),
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
        ("c.trian = 3", "config key 'trian' is unknown; nearest: 'train.start'"),
        ("c.train.epochs = '3'", "'train.epochs' must be of type int, got '3'"),
        ("c.train.epochs = True", "'train.epochs' must be of type int, got True"),
        ("c.train = None", "config train must be a Train, is a NoneType"),
        ("c.method.name = None", "'method.name' must be of type str, got None"),
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
    said = refusal(capsys, config="configs/fashion_vs.py")
    assert "'configs/fashion_vs.py' does not exist" in said and "nearest: fashion_vos" in said
    assert "config file '' does not exist" in refusal(capsys, "--config", config=None)
    assert "for example --config fashion" in refusal(capsys, config=None)


def test_a_packaged_config_has_a_name(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for arguments in (["--config", "fashion_vos"], ["--config=fashion_vos"]):
        assert parse(["main", *arguments]).config.method.name == "vos"
    # A file of the user's comes first.
    (tmp_path / "fashion_vos").write_text(Path(FASHION).read_text())
    monkeypatch.delitem(sys.modules, "config_config", raising=False)
    assert parse(["main", "--config=fashion_vos"]).config.method.name == "oal"


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
    values = parse(["main", "--config", FASHION, *arguments])
    usual = Config().train.epochs  # where None is expected
    assert (values.config.smoke, values.config.train.epochs) == (smoke, epochs or usual)


def test_other_forms_of_flags():
    values = parse(
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
        (("energy,",), ("energy", "")),  # for `validate` to complain about
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
    with pytest.raises(UserError, match="'evaluation.scores' must be of type tuple"):
        validate(config.expand(settings))


def test_scores_by_flags_reach_the_run():
    for text, expected in [
        ("energy,knn", ("energy", "knn")),
        ("all", config.SCORES),
        ("('vim',)", ("vim",)),
    ]:
        values = parse(["main", f"--config={FASHION}", f"--config.evaluation.scores={text}"])
        assert config.expand(values.config).evaluation.scores == expected


def help_of(capsys, *arguments):
    assert main.guard(main.run, ["main", *arguments]) == 0
    out, err = capsys.readouterr()
    assert not err
    return out


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_shows_the_flags_the_common_fields_and_those_of_the_method(capsys, flag):
    out = help_of(capsys, flag)
    assert "--workdir" in out
    assert f"--config.train.epochs={Config().train.epochs}" in out
    assert "--config.method.oal.objective=energy" in out
    assert "--config.method.vos." not in out and "method.vos" in out


def test_help_follows_the_method_of_the_config(capsys):
    out = help_of(capsys, "--config", FASHION, "--config.method.name=vos", "--help")
    assert "--config.method.vos.queue_size=1000" in out
    assert "--config.method.oal.objective" not in out


def test_help_of_fields_and_sections(capsys):
    out = help_of(capsys, "--help", "train.epochs", "method.umap")
    shown = [line.split("=")[0] for line in out.split() if line.startswith("--config.")]
    assert shown == [
        "--config.train.epochs",
        "--config.method.umap.mask_density",
        "--config.method.umap.freeze",
    ]
    assert "--config.outliers.knn.sigma" in help_of(capsys, "--help", "outliers")
    assert "nearest: 'train.epochs'" in refusal(capsys, "--help", "train.epoch")
