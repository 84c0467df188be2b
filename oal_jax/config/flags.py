"""The flags of `oal_jax.main`: how a command line becomes a checked config."""

import re
import textwrap
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from oal_jax.config import GENERATED, Config, expand, flatten
from oal_jax.config.help import describe
from oal_jax.config.nearest import config_file, packaged_configs, unknown_flag, unknown_key
from oal_jax.config.rules import validate
from oal_jax.config.smoke import shrink
from oal_jax.errors import UserError


def define_flags(values: flags.FlagValues, argv: Sequence[str]) -> None:
    """The flags of the command, in a set of their own; `argv` says which config keys are set."""
    config_flags.DEFINE_config_file(
        "config",
        None,
        "config file, or the name of one that comes with the package"
        f" ({', '.join(packaged_configs())}); --config.a.b=VALUE sets a key",
        values,
        sys_argv=list(argv),
    )
    for name, text in {
        "workdir": "directory of the run; default runs/CONFIG",
        "stage": "run the stages up to this one",
        "reuse": "take finished stages from this run",
        "coordinator": "HOST:PORT of process 0",
        "compare": "directories of finished runs, and OpenOOD's CSV files; needs no --config",
        "output": "with --compare: an .html or .csv file for the result",
    }.items():
        flags.DEFINE_string(name, None, text, flag_values=values)
    for name, text in {
        "num_processes": "processes of this run",
        "process_id": "number of this process, from 0",
        "join_timeout": "seconds in which all processes must have joined; default 120",
        "heartbeat_timeout": "seconds of silence after which one counts as dead; default 60",
    }.items():
        flags.DEFINE_integer(name, None, text, flag_values=values)
    flags.DEFINE_bool(
        "distributed",
        False,
        "several processes as a TPU pod, SLURM, Open MPI or Kubernetes started them",
        flag_values=values,
    )
    flags.DEFINE_bool(
        "force",
        False,
        "continue where another config ran; redo what is damaged",
        flag_values=values,
    )
    flags.DEFINE_bool(
        "check",
        False,
        "list everything that is wrong with the config, its data and its files; trains nothing",
        flag_values=values,
    )
    flags.DEFINE_bool(
        "profile",
        False,
        "write a profiler trace of a window of each stage that runs to WORKDIR/profile/STAGE",
        flag_values=values,
    )
    flags.DEFINE_bool(
        "help",
        False,
        "show this; --help KEY ... shows fields or sections of the config, such as train.epochs or"
        " method.vos",
        short_name="h",
        flag_values=values,
    )
    flags.DEFINE_list("help_keys", [], "what --help was asked about", flag_values=values)


def parse(argv: Sequence[str]) -> flags.FlagValues:
    """Parsed flags; the config among them is validated, unless help is asked for.

    Raises:
      UserError: anything about them that is wrong, in one line.
    """
    arguments = _with_config_file([spelled(argument) for argument in argv[1:]])
    _check_config_arguments(arguments)
    values = flags.FlagValues()
    define_flags(values, [argv[0], *arguments])
    try:
        with warnings.catch_warnings():
            # ml_collections' way to import a config file; works up to Python 3.14.
            warnings.filterwarnings("ignore", r"the load_module\(\)", DeprecationWarning)
            rest = values([argv[0], *arguments])
    except flags.UnrecognizedFlagError as error:
        names = [name for name in values if not name.startswith("config.")]
        typed = {spelled(a).partition("=")[0]: a.partition("=")[0] for a in argv[1:]}
        flag = typed.get(f"--{error.flagname}", error.flagname).lstrip("-")
        raise UserError(unknown_flag(flag, names)) from None
    except flags.Error as error:
        raise UserError(error) from None
    except Exception as error:  # the config file is code, and can raise anything
        raise UserError(_config_problem(error)) from None
    if values.help:
        values.help_keys = rest[1:]
        return values
    if len(rest) > 1:
        raise UserError(f"argument '{rest[1]}' is not a flag; flags start with --")
    if values.output:
        raise UserError("--output goes with --compare")
    if values.config is None:
        raise UserError("--config is missing; for example --config fashion")
    if not isinstance(values.config, Config):
        raise UserError(
            "the config file's get_config() must return an oal_jax.config.Config,"
            f" returned a {type(values.config).__name__}"
        )
    values.config.evaluation = expand(values.config).evaluation
    if not values.check:
        validate(values.config)
    return values


def spelled(argument: str) -> str:
    """Flags are accepted with one dash or two, and with dashes or underscores in their names."""
    name, equals, value = argument.partition("=")
    if name.startswith("-") and name.strip("-") and not name.lstrip("-")[0].isdigit():
        name = "--" + name.lstrip("-")
        if not _config_key(name):
            name = "--" + name[2:].replace("-", "_")
    return name + equals + value


def _config_key(name: str) -> str | None:
    """The key that `--config.KEY` or `--noconfig.KEY` sets."""
    for prefix in ("--config.", "--noconfig."):
        if name.startswith(prefix):
            return name.removeprefix(prefix)
    return None


def _with_config_file(arguments: Sequence[str]) -> list[str]:
    """The arguments with the path of the config file where `--config` gives its name.

    Raises:
      UserError: there is no such file or name.
    """
    arguments = list(arguments)
    for i, argument in enumerate(arguments):
        if argument.startswith("--config="):
            arguments[i] = "--config=" + config_file(argument.removeprefix("--config="))
        elif argument == "--config":
            arguments[i + 1 :] = [
                config_file("".join(arguments[i + 1 : i + 2])),
                *arguments[i + 2 :],
            ]
    return arguments


def _check_config_arguments(arguments: Sequence[str]) -> None:
    """Raise `UserError` for unknown keys and wrong types; runs no config file."""
    known = flatten(Config())
    for i, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if not equals and i + 1 < len(arguments):
            value = arguments[i + 1]
        key = _config_key(name)
        if key is not None and key not in known:
            raise UserError(unknown_key(key))
        elif key is not None and (equals or not isinstance(known[key], bool)):
            _check_type(key, value, known[key])


_PARSERS = {bool: flags.BooleanParser, int: flags.IntegerParser, float: flags.FloatParser}


def _check_type(key: str, value: str, default: object) -> None:
    # Strings take anything; lists are left to the flag's own parser and to `validate`.
    kind = type(default)
    if kind not in _PARSERS:
        return
    try:
        _PARSERS[kind]().parse(value)
    except ValueError:
        raise UserError(
            f"config key '{key}' must be of type {kind.__name__}, got '{value}'"
        ) from None


def _config_problem(error: Exception) -> str:
    """What is wrong with a config file that could not be run, and in which line."""
    if "has no attribute 'get_config'" in str(error):
        return "the config file has no function get_config()"
    if isinstance(error, SyntaxError):
        return f"the config file can't be read: {error}"  # says the file and line itself
    frame = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{Path(frame.filename).name}, line {frame.lineno}"
    return f"the config file can't be read: {type(error).__name__}: {error} ({where})"


def usage(doc: str, values: flags.FlagValues) -> str:
    """What `--help [KEY ...]` prints: the command's `doc`, its flags, its config; or the keys."""
    config = values.config if isinstance(values.config, Config) else Config()
    keys = values.help_keys
    if keys:
        return describe(keys, config)
    names = [name for name in sorted(values) if name not in ("h", "help_keys")]
    lines = [
        line
        for name in names
        if "config." not in name
        for line in textwrap.wrap(f"--{name}: {values[name].help}", 96, subsequent_indent="    ")
    ]
    return "\n".join([doc, "Flags:", *(f"  {line}" for line in lines), describe((), config)])


def read_for_compiling(arguments: Sequence[str]) -> Config:
    """The config of `--config FILE --config.a.b=VALUE ...`, as a stage gets it.

    Raises:
      UserError: another flag than these, or anything that is wrong about the config.
    """
    wrong = [a for a in arguments if a.startswith("-") and not re.match(r"--?(no)?config\b", a)]
    if wrong:
        raise UserError(f"unknown flag {wrong[0]}; known: --config, --topology, --stage")
    if not any(re.match(r"--?config(=|$)", a) for a in arguments):
        raise UserError("--config is missing; for example --config fashion")
    argv = ["oal_jax.compile", *arguments]
    try:
        config = parse(argv).config
    except UserError:
        # Files that are not there are not read: a trained start has the shapes of a fresh one, and
        # the teacher the sizes in the config.
        unread = ("data.root=unread", "train.start=unread", f"teacher.weights={GENERATED}")
        config = parse([*argv, *(f"--config.{key}" for key in unread)]).config
    if config.smoke:
        config = shrink(config)
        validate(config)
    return config
