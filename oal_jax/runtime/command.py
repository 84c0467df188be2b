"""Shared by all commands: exit codes, one line for a user's mistake, the argument parser."""

import argparse
import difflib
import errno
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from oal_jax.errors import Preempted, TrainingFailed, UserError
from oal_jax.runtime import processes, startup


def guard(command: Callable[[Sequence[str]], None], argv: Sequence[str]) -> int:
    """Run a command; its exit code. An error that the user can mend becomes one line on stderr.

    Where one process of several fails, the others end with its code.
    """
    startup.keep_freed_memory()
    try:
        command(argv)
        sys.stdout.flush()
    except BaseException as error:
        outcome = _outcome(error)
        if processes.several():
            if outcome is None:
                processes.give_way()  # the error may be a connection that another process broke
                traceback.print_exc()
                outcome = 1, f"{type(error).__name__}: {error}"
            processes.leave(outcome[0], _one_line(outcome[1]))
        if outcome is None:
            raise
        # Python would warn of coroutines that were cut off, such as those of a save.
        warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
        print("oal_jax:", _one_line(outcome[1]), file=sys.stderr, flush=True)
        return outcome[0]
    return 0


def _outcome(error: BaseException) -> tuple[int, str] | None:
    """(exit code, message) of an error that needs no traceback; None for a bug."""
    if isinstance(error, UserError):
        return 2, str(error)
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted; start the same command again to go on"
    if isinstance(error, Preempted):
        return 143, f"{error}; start the same command again to go on"
    if isinstance(error, TrainingFailed):
        return 1, str(error)
    if isinstance(error, BrokenPipeError):
        # What is left in Python's buffer would fail again when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1, "the program that reads the output has ended"
    if isinstance(error, Exception) and _disk_is_full(error):
        return 2, "the disk is full, and the stage did not finish; make room and start again"
    return None


def _one_line(message: str) -> str:
    return " ".join(message.split())


def _disk_is_full(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if os.strerror(errno.ENOSPC) in str(error):  # storage libraries hide the number
            return True
        error = error.__cause__ or error.__context__
    return False


class BareParser(argparse.ArgumentParser):
    """An argument parser that raises `UserError` where argparse would exit."""

    def __init__(self, prog: str, doc: str):
        raw = argparse.RawDescriptionHelpFormatter
        super().__init__(prog=prog, description=doc, formatter_class=raw, allow_abbrev=False)

    def parse_args(self, args: Sequence[str], namespace: Any = None) -> argparse.Namespace:  # type: ignore[override]
        """Parse the arguments; `UserError` for an unknown one, with the nearest flag."""
        values, rest = self.parse_known_args(args, namespace)
        if rest:
            flags = re.findall(r"--[\w-]+", self.format_usage())
            near = difflib.get_close_matches(rest[0].partition("=")[0], flags, n=1, cutoff=0.6)
            hint = f"nearest: {near[0]}" if near else "see --help"
            raise UserError(f"unknown argument {rest[0]}; {hint}")
        return values

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage."""
        raise UserError(f"{message}; see --help")


class Parser(BareParser):
    """Arguments of the commands on a detector. Their names take dashes or underscores."""

    def __init__(self, prog: str, doc: str):
        super().__init__(prog, doc)
        source = self.add_mutually_exclusive_group(required=True)
        source.add_argument("--workdir", type=Path, help="directory of a finished run")
        source.add_argument("--detector", type=Path, help="directory that detector.save wrote")
        self.add_argument("--score", help="default: the headline score of the run")
        self.add_argument(
            "--keep-id",
            type=float,
            help="fraction of ID validation images below the threshold; default: the detector's",
        )

    def parse_args(self, args: Sequence[str], namespace: Any = None) -> argparse.Namespace:  # type: ignore[override]
        """Parse and check the arguments; `UserError` for what is wrong with them."""
        spelled = [re.sub(r"^--[^=]+", lambda m: m[0].replace("_", "-"), a) for a in args]
        values = super().parse_args(spelled, namespace)
        if values.keep_id is not None and not 0 < values.keep_id < 1:
            raise UserError(f"--keep-id {values.keep_id} must lie between 0 and 1")
        values.directory = values.workdir or values.detector
        return values
