"""`python -m oal_jax.main --config FILE [--workdir DIR] [--config.a.b=VALUE ...] [--stage NAME]`.

`python -m oal_jax.main --compare RUN1 RUN2 ... [--output FILE.html]` compares finished runs, seeds
of one config together; a CSV file in OpenOOD's layout counts as one more.

Exit codes: 0 done; 2 a mistake of the user's, one line on stderr; 1 a training that failed or
any other error, or another process of the run that died; 130 Ctrl-C; 143 SIGTERM, after saving.
Where one process of several fails, the others end with its code.
"""

import difflib
import errno
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from oal_jax import compilation_cache, host_memory, processes
from oal_jax.config import Config, expand, flatten, unknown_key
from oal_jax.config_checks import validate
from oal_jax.errors import Preempted, TrainingFailed, UserError


def define_flags(values: flags.FlagValues, argv: Sequence[str]) -> None:
    """The flags of the command, in a set of their own; `argv` says which config keys are set."""
    config_flags.DEFINE_config_file(
        "config", None, "config file; --config.a.b=VALUE sets a key", values, sys_argv=list(argv)
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
        "force", False, "go on where another config ran; redo what is damaged", flag_values=values
    )
    flags.DEFINE_bool(
        "profile",
        False,
        "write a trace of each stage and where its time went to WORKDIR/profile",
        flag_values=values,
    )
    flags.DEFINE_bool("help", False, "show this", short_name="h", flag_values=values)


def parse(argv: Sequence[str]) -> flags.FlagValues:
    """Parsed flags; the config among them is validated, unless help is asked for.

    Raises:
      UserError: anything about them that is wrong, in one line.
    """
    arguments = [_spelled(argument) for argument in argv[1:]]
    _check_config_arguments(arguments)
    values = flags.FlagValues()
    define_flags(values, [argv[0], *arguments])
    try:
        with warnings.catch_warnings():
            # ml_collections' way to import a config file; works up to Python 3.14.
            warnings.filterwarnings("ignore", r"the load_module\(\)", DeprecationWarning)
            rest = values([argv[0], *arguments])
    except flags.UnrecognizedFlagError as error:
        near = difflib.get_close_matches(error.flagname, list(values), n=1, cutoff=0.0)
        raise UserError(f"unknown flag --{error.flagname}; nearest: --{near[0]}") from None
    except flags.Error as error:
        raise UserError(error) from None
    except Exception as error:  # the config file is code, and can raise anything
        raise UserError(_config_problem(error)) from None
    if values.help:
        return values
    if len(rest) > 1:
        raise UserError(f"argument '{rest[1]}' is not a flag; flags start with --")
    if values.output:
        raise UserError("--output goes with --compare")
    if values.config is None:
        raise UserError("--config FILE is missing; for example --config configs/fashion.py")
    if not isinstance(values.config, Config):
        raise UserError(
            "the config file's get_config() must return an oal_jax.config.Config,"
            f" returned a {type(values.config).__name__}"
        )
    values.config.evaluation = expand(values.config).evaluation
    validate(values.config)
    return values


def _spelled(argument: str) -> str:
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


def _check_config_arguments(arguments: Sequence[str]) -> None:
    """Unknown config keys, wrong types and missing files are told before any config file is run."""
    known = flatten(Config())
    for i, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if not equals and i + 1 < len(arguments):
            value = arguments[i + 1]
        key = _config_key(name)
        if name == "--config":
            if not Path(value).is_file():
                raise UserError(f"config file '{value}' does not exist")
        elif key is not None and key not in known:
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
            f"config key '{key}' wants a value of type {kind.__name__}, got '{value}'"
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


def usage() -> str:
    """What `--help` prints."""
    values = flags.FlagValues()
    define_flags(values, [])
    lines = [f"  --{name}: {values[name].help}" for name in sorted(values) if name != "h"]
    keys = [f"  --config.{key}={value}" for key, value in flatten(Config()).items()]
    return "\n".join([__doc__, "Flags:", *lines, "", "Config keys and defaults:", *keys])


def run(argv: Sequence[str]) -> None:
    """Parse, run the pipeline, print the table; or compare finished runs."""
    arguments = [_spelled(argument) for argument in argv[1:]]
    names = {argument.partition("=")[0] for argument in arguments}
    if "--compare" in names and not names & {"--help", "--h"}:
        from oal_jax.evaluation import compare

        compare.run(arguments)
        return
    compilation_cache.keep_programs()  # before JAX is imported, which a config file may do
    values = parse(argv)
    if values.help:
        print(usage())
        return
    from oal_jax import distributed  # JAX starts only once the flags are known to be right

    timeouts = {name: values[name].value for name in ("join_timeout", "heartbeat_timeout")}
    distributed.initialize(
        values.coordinator,
        values.num_processes,
        values.process_id,
        detect=values.distributed,
        **{name: seconds for name, seconds in timeouts.items() if seconds is not None},
    )
    with processes.only_main_prints():
        _run(values)


def _run(values: flags.FlagValues) -> None:
    from oal_jax import pipeline
    from oal_jax.evaluation.tables import format_table, read_csv
    from oal_jax.generator import flax_models

    flax_models.leave_torch_out()
    name = Path(config_flags.get_config_filename(values["config"])).stem
    workdir = Path(values.workdir or Path("runs") / name)
    reuse = Path(values.reuse) if values.reuse else None
    options = {"only": values.stage, "force": values.force, "reuse": reuse}
    if values.profile and processes.is_main():
        from oal_jax.profiling import profile

        with profile(workdir / "profile") as watch:
            pipeline.run(values.config, workdir, **options, watch=watch)
    else:
        pipeline.run(values.config, workdir, **options)
    table = workdir / "report" / "ood.csv"
    if processes.is_main() and (not values.stage or values.stage == "report"):
        print(format_table(read_csv(table)))
        print(f"report: {workdir / 'report' / 'index.html'}")


def guard(command, argv: Sequence[str]) -> int:
    """Run a command; turn what a person can mend, or asked for, into one line and an exit code.

    Of several processes, each ends with the code of the first that failed.
    """
    host_memory.keep_freed()
    try:
        command(argv)
    except BaseException as error:
        told = _told(error)
        if processes.several():
            if told is None:
                told = processes.failure_of_another()  # this one only lost its connection
            if told is None:
                traceback.print_exc()
                told = 1, f"{type(error).__name__}: {error}"
            processes.leave(told[0], _say(told[1]))
        if told is None:
            raise
        # Of coroutines that were cut off, such as a save's, Python would tell on top of the line.
        warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
        _say(told[1])
        return told[0]
    return 0


def _told(error: BaseException) -> tuple[int, str] | None:
    """(exit code, message) of what a person can mend or asked for; None of anything else."""
    if isinstance(error, UserError):
        return 2, str(error)
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted; start the same command again to go on"
    if isinstance(error, Preempted):
        return 143, f"{error}; start the same command again to go on"
    if isinstance(error, TrainingFailed):
        return 1, str(error)
    if isinstance(error, Exception) and _disk_is_full(error):
        return 2, "the disk is full: the stage under way is not done; make room and start again"
    return None


def _say(message: str) -> str:
    line = " ".join(message.split())
    print("oal_jax:", line, file=sys.stderr, flush=True)
    return line


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
