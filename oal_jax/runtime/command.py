"""What all commands share: exit codes, one line for a user's mistake, the argument parser."""

import argparse
import errno
import os
import re
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from oal_jax.errors import Preempted, TrainingFailed, UserError
from oal_jax.runtime import processes, startup


def guard(command, argv: Sequence[str]) -> int:
    """Run a command; turn what a person can mend, or asked for, into one line and an exit code.

    Of several processes, each ends with the code of the first that failed.
    """
    startup.keep_freed_memory()
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


class BareParser(argparse.ArgumentParser):
    """An argument parser that raises `UserError` where argparse would leave the process."""

    def __init__(self, prog: str, doc: str):
        raw = argparse.RawDescriptionHelpFormatter
        super().__init__(prog=prog, description=doc, formatter_class=raw, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Raises instead of printing the usage."""
        raise UserError(f"{message}; see --help")


class Parser(BareParser):
    """Arguments of the commands on a finished run. Names take dashes or underscores."""

    def __init__(self, prog: str, doc: str):
        super().__init__(prog, doc)
        self.add_argument("--workdir", type=Path, required=True, help="directory of a finished run")
        self.add_argument("--score", help="default: the first of the run's config")
        self.add_argument(
            "--keep-id",
            type=float,
            help="share of ID validation images that the threshold keeps; default: the config's",
        )

    def parse_args(self, args: Sequence[str], namespace: Any = None) -> argparse.Namespace:  # type: ignore[override]
        """The arguments, checked.

        Raises:
          UserError: anything about them that is wrong, in one line.
        """
        spelled = [re.sub(r"^--[^=]+", lambda m: m[0].replace("_", "-"), a) for a in args]
        values = super().parse_args(spelled, namespace)
        if values.keep_id is not None and not 0 < values.keep_id < 1:
            raise UserError(f"--keep-id {values.keep_id} must lie between 0 and 1")
        return values
