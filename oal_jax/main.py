"""`python -m oal_jax.main --config FILE [--workdir DIR] [--config.a.b=VALUE ...] [--stage NAME]`.

Exit codes: 0 done; 2 a mistake of the user's, one line on stderr; 1 a training that failed or
any other error; 130 Ctrl-C; 143 SIGTERM, after saving.
"""

import difflib
import errno
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from oal_jax.config import Config, flatten, unknown_key
from oal_jax.errors import UserError


def define_flags(values: flags.FlagValues) -> None:
    """The flags of the command, in a set of their own."""
    config_flags.DEFINE_config_file("config", None, "config file", flag_values=values)
    flags.DEFINE_string("workdir", None, "directory of the run; default runs/CONFIG", flag_values=values)
    flags.DEFINE_string("stage", None, "run the stages up to this one", flag_values=values)
    flags.DEFINE_bool("force", False, "go on where another config ran; redo damaged", flag_values=values)
    flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0", flag_values=values)
    flags.DEFINE_integer("num_processes", None, "processes of this run", flag_values=values)
    flags.DEFINE_integer("process_id", None, "number of this process, from 0", flag_values=values)


def parse(argv: Sequence[str]) -> flags.FlagValues:
    """Parsed flags.

    Raises:
      UserError: anything about them that is wrong, in one line.
    """
    arguments = [_spelled(argument) for argument in argv[1:]]
    _check_config_arguments(arguments)
    values = flags.FlagValues()
    define_flags(values)
    try:
        rest = values([argv[0], *arguments])
    except flags.UnrecognizedFlagError as error:
        near = difflib.get_close_matches(error.flagname, list(values), n=1, cutoff=0.0)
        raise UserError(f"unknown flag --{error.flagname}; nearest: --{near[0]}") from None
    except (flags.Error, TypeError, ValueError, AttributeError, KeyError) as error:
        raise UserError(" ".join(str(error).split())) from None
    except (SyntaxError, ImportError, NameError) as error:
        raise UserError(f"the config file can't be read: {error}") from None
    if len(rest) > 1:
        raise UserError(f"argument '{rest[1]}' is not a flag; flags start with --")
    if values.config is None:
        raise UserError("--config FILE is missing; for example --config configs/fashion.py")
    if not isinstance(values.config, Config):
        raise UserError("the config file's get_config() must return an oal_jax.config.Config")
    return values


def _spelled(argument: str) -> str:
    """Flags are accepted with dashes or underscores in their names."""
    name, equals, value = argument.partition("=")
    if name.startswith("--") and not name.startswith("--config"):
        name = "--" + name[2:].replace("-", "_")
    return name + equals + value


def _check_config_arguments(arguments: Sequence[str]) -> None:
    """Unknown config keys and missing files are told before any config file is run."""
    known = flatten(Config())
    for i, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name == "--config":
            path = value if equals else (arguments[i + 1] if i + 1 < len(arguments) else "")
            if not Path(path).is_file():
                raise UserError(f"config file '{path}' does not exist")
        elif name.startswith("--config."):
            key = name.removeprefix("--config.")
            if key not in known:
                raise UserError(unknown_key(key))
            _check_type(key, value if equals else None, known[key])


def _check_type(key: str, value: str | None, default: object) -> None:
    # Strings take anything; lists are left to the parser.
    kind = type(default)
    if value is None or kind not in (bool, int, float):
        return
    try:
        right = value.lower() in ("true", "false", "0", "1") if kind is bool else bool([kind(value)])
    except ValueError:
        right = False
    if not right:
        raise UserError(f"config key '{key}' wants a value of type {kind.__name__}, got '{value}'")


def run(argv: Sequence[str]) -> None:
    """Parse, run the pipeline, print the table."""
    values = parse(argv)
    from oal_jax import distributed  # JAX starts only once the flags are known to be right

    distributed.initialize(values.coordinator, values.num_processes, values.process_id)
    from oal_jax import pipeline
    from oal_jax.evaluation.tables import format_table, read_csv

    workdir = Path(values.workdir or Path("runs") / Path(_config_path(argv)).stem)
    pipeline.run(values.config, workdir, only=values.stage, force=values.force)
    table = workdir / "report" / "ood.csv"
    if not values.stage or values.stage == "report":
        print(format_table(read_csv(table)))
        print(f"report: {workdir / 'report' / 'index.html'}")


def _config_path(argv: Sequence[str]) -> str:
    for i, argument in enumerate(argv):
        if argument.startswith("--config="):
            return argument.removeprefix("--config=")
        if argument == "--config":
            return argv[i + 1]
    return "run"


def guard(command, argv: Sequence[str]) -> int:
    """Run a command; turn what a person can mend, or asked for, into one line and an exit code."""
    try:
        command(argv)
    except UserError as error:
        return _say(error, 2)
    except KeyboardInterrupt:
        return _say("interrupted; start the same command again to go on", 130)
    except Exception as error:
        from oal_jax.training.loop import Preempted, TrainingFailed

        if isinstance(error, Preempted):
            return _say(f"{error}; start the same command again to go on", 143)
        if isinstance(error, TrainingFailed):
            return _say(error, 1)
        if _disk_is_full(error):
            return _say(
                "the disk is full: the stage under way is not done; make room and start again", 2
            )
        raise
    return 0


def _say(message: object, code: int) -> int:
    print(f"oal_jax: {message}", file=sys.stderr, flush=True)
    return code


def _disk_is_full(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if os.strerror(errno.ENOSPC) in str(error):  # storage libraries wrap the number away
            return True
        error = error.__cause__ or error.__context__
    return False


if __name__ == "__main__":
    sys.exit(guard(run, sys.argv))
