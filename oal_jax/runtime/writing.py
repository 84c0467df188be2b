"""Files and folders that appear whole or not at all, outputs that a user names, and locks.

Directories may be someone else's, so links in them are not followed, and what is no regular file is
neither replaced nor waited for.
"""

import errno
import os
import secrets
import shutil
import stat
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from oal_jax.errors import UserError


@contextmanager
def whole_file(path: Path, mode: str = "wb", **options: Any) -> Iterator[IO]:
    """Open a file for writing that readers see complete or not at all.

    The block writes to a new file of a random name in the same directory, which takes the name
    `path` when the block ends without an error. A symbolic link at `path` is replaced, and what it
    points to stays as it is: the directory may be someone else's. `mode` and `options` are those
    of `open`.

    Raises:
      UserError: `path` is a directory, a device or a pipe, or no file can be written there.
    """
    with _new_file(path, path, mode, options) as file:
        yield file


@contextmanager
def output_file(path: Path, mode: str = "wb", **options: Any) -> Iterator[IO]:
    """Open the file that a user names as `--output`; like `whole_file`, but for what is no file.

    A symbolic link stays, and the file that it points to is replaced. A device, a pipe and the
    standard streams are written to directly.
    """
    if os.path.isdir(path):
        raise UserError(f"{path} is a directory; give the name of a file")
    if (stream := _standard_stream(path)) is not None:
        sys.stdout.flush()
        sys.stderr.flush()
        with os.fdopen(os.dup(stream), mode, **options) as file:
            yield file
    elif not is_replaced(path):
        with _open(path, path, mode, options) as file:
            yield file
    else:
        with _new_file(Path(os.path.realpath(path)), path, mode, options) as file:
            yield file


def is_replaced(path: Path) -> bool:
    """Whether a new file takes the place of an `--output`: it is no device, pipe or stream."""
    return _standard_stream(path) is None and (os.path.isfile(path) or not os.path.exists(path))


def is_stdout(path: Path) -> bool:
    """Whether an `--output` is where `print` writes to, such as /dev/stdout."""
    return _standard_stream(path) == 1


def _standard_stream(path: Path) -> int | None:
    """The descriptor 1 or 2 if `path` is what it writes to: opened again, it might be cut short."""
    for stream in (1, 2):
        with suppress(OSError):
            if os.path.samestat(os.stat(path), os.fstat(stream)):
                return stream
    return None


@contextmanager
def _new_file(path: Path, named: Path, mode: str, options: Mapping[str, Any]) -> Iterator[IO]:
    """`whole_file`, whose errors say `named`."""
    if path.is_dir():
        raise UserError(f"{named} is a directory; give the name of a file")
    if path.exists() and not path.is_file() and not path.is_symlink():
        raise UserError(f"{named} is a device or a pipe in the place of a file; delete it")
    temporary = path.with_name(_random_name())
    try:
        # Mode "x" never opens a file or link that is there.
        with _open(temporary, named, mode.replace("w", "x"), options) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if path.is_file() and not path.is_symlink():
            with suppress(OSError):
                shutil.copymode(path, temporary)
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A new folder for the block to fill, which takes the name `path` when the block ends.

    If the block fails, nothing is left. A folder at `path` is replaced; whether it may be is for
    the caller to check. A link stays, and the folder that it points to is replaced.

    Raises:
      UserError: no folder can be written there.
    """
    target = Path(os.path.realpath(path))
    temporary = target.with_name(_random_name())
    old = temporary.with_suffix(".old")
    try:
        try:
            temporary.mkdir(parents=True)
        except OSError as error:
            raise unwritable(path, error) from None
        yield temporary
        try:
            if target.exists():
                os.replace(target, old)
            os.replace(temporary, target)
        except OSError as error:  # `target` may be a mount point
            if old.exists() and not target.exists():
                os.replace(old, target)
            raise unwritable(path, error) from None
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _random_name() -> str:
    return f".{secrets.token_hex(8)}.partial"


def _open(path: Path, named: Path, mode: str, options: Mapping[str, Any]) -> IO:
    try:
        return path.open(mode, **options)
    except OSError as error:
        raise unwritable(named, error) from None


def unwritable(path: Path, error: OSError) -> Exception:
    """What to raise for a file that can't be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return error  # the command has a line for a full disk
    return UserError(f"{path} can't be written ({error.strerror})")


def open_to_append(path: Path) -> IO[str]:
    """Open a text file to append to. Refuses a link, a device and a pipe in its place."""
    return os.fdopen(_open_own(path, os.O_WRONLY | os.O_APPEND), "a", encoding="utf-8")


def _open_own(path: Path, access: int) -> int:
    """The descriptor of a regular file, made where it is missing, and never cut short.

    Raises:
      UserError: something else is there, or the file can't be opened.
    """
    # Windows has neither flag.
    careful = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        descriptor = os.open(path, access | os.O_CREAT | careful, 0o666)
    except OSError as error:
        if path.is_symlink():
            raise UserError(f"{path} is a link in the place of a file; delete it") from None
        raise unwritable(path, error) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UserError(f"{path} is a device or a pipe in the place of a file; delete it")
    return descriptor


@contextmanager
def alone(lock: Path, busy: str) -> Iterator[None]:
    """Hold a lock file: one process at a time is inside. The lock ends with its process.

    Raises:
      UserError: another process holds the lock; the message is `busy`. Or no lock can be written.
    """
    descriptor = _open_own(lock, os.O_RDWR)
    try:
        try:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(busy) from None
        except (ImportError, OSError):
            pass  # this system or file system has no locks; the user must avoid two runs at once
        yield
    finally:
        os.close(descriptor)
