"""`python -m oal_jax.data.manifest --root DIR`: write down the sha256 of every file below DIR.

DIR is a `data.root`, or one image set in it. The file is DIR/SHA256SUMS, in the form that
`sha256sum --check` reads. Where there is one, sets are checked against it as they are read: image
files one by one, the files of a TFDS set as wholes (once in a process: about a GB/s). What is
missing, changed or new is an error that names the file. With --check, everything is checked at once
and nothing is written.
"""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import NamedTuple

from oal_jax.errors import UserError
from oal_jax.runtime import artifacts

NAME = "SHA256SUMS"
_DIGITS = frozenset("0123456789abcdef")


class Manifest(NamedTuple):
    """What the files below a directory were.

    Attributes:
      path: of the manifest itself.
      digests: paths below its directory, with forward slashes, to the hexadecimal sha256.
    """

    path: Path
    digests: dict[str, str]

    def digest(self, path: Path) -> str:
        """The sha256 that a file must have.

        Raises:
          UserError: the file was not there when the manifest was written.
        """
        relative = path.relative_to(self.path.parent).as_posix()
        if relative not in self.digests:
            raise UserError(f"{path} is not in {self.path}: {_remedy(self.path)}")
        return self.digests[relative]

    def check_names(self, folder: Path, found: Sequence[Path]) -> None:
        """Raise `UserError` where a file that is listed below a folder is gone; these are there."""
        prefix = folder.relative_to(self.path.parent).as_posix() + "/"
        unseen = {name for name in self.digests if name.startswith(prefix)}
        unseen -= {path.relative_to(self.path.parent).as_posix() for path in found}
        for path in (self.path.parent / name for name in sorted(unseen)):
            if not path.exists():  # what is there is no image
                raise UserError(f"{path} is missing, {self.path} has it: {_remedy(self.path)}")

    def check(self, path: Path) -> None:
        """Raise `UserError` where a file is not what it was; reads it once in a process."""
        wanted = self.digest(path)
        try:
            stat = path.stat()
            found = _sha256(path, stat.st_size, stat.st_mtime_ns)
        except OSError as error:
            raise UserError(
                f"{path} cannot be read ({error.strerror}), {self.path} has it:"
                f" {_remedy(self.path)}"
            ) from error
        if found != wanted:
            raise changed(path, self.path)


def find(folder: Path, root: Path) -> Manifest | None:
    """The manifest of a folder: the nearest one, in the folder itself or above, up to `root`.

    Raises:
      UserError: it can't be read.
    """
    for parent in (folder, *folder.parents):
        if (parent / NAME).is_file():
            return read(parent / NAME)
        if parent == root:
            break
    return None


def read(path: Path) -> Manifest:
    """The manifest in a file.

    Raises:
      UserError: it can't be read, or a line is not "SHA256  PATH"; names the line.
    """
    digests = {}
    try:
        with path.open(encoding="utf-8", newline="\n") as file:
            for number, line in enumerate(file, start=1):
                escaped = line.startswith("\\")
                digest, separator, name = line[escaped:].rstrip("\n").partition("  ")
                if not separator or len(digest) != 64 or not _DIGITS.issuperset(digest):
                    raise UserError(f"{path}, line {number}: not 'SHA256  PATH': {_remedy(path)}")
                digests[_unescaped(name) if escaped else name] = digest
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}): {_remedy(path)}") from error
    return Manifest(path, digests)


def write(root: Path) -> int:
    """Writes ROOT/SHA256SUMS, whole or not at all; returns how many files it lists.

    Raises:
      UserError: no such folder, nothing in it, or a file that can't be read.
    """
    files = sorted(_files(root))
    if not files:
        raise UserError(f"{root} holds no files: give --root a directory of image sets")
    target, draft = root / NAME, root / f".{NAME}.draft"
    try:
        with ThreadPoolExecutor() as threads, draft.open("w", encoding="utf-8", newline="\n") as to:
            for path, digest in zip(files, threads.map(artifacts.sha256, files), strict=True):
                to.write(_line(digest, path.relative_to(root).as_posix()))
        draft.replace(target)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise UserError(f"{error.filename or target}: {error.strerror}") from error
    return len(files)


def check(root: Path) -> int:
    """Reads every file that ROOT/SHA256SUMS lists; returns how many.

    Raises:
      UserError: there is no manifest, or a file is missing, changed or new; names the first.
    """
    if not (root / NAME).is_file():
        raise UserError(f"no {root / NAME}: write it with python -m oal_jax.data.manifest")
    manifest = read(root / NAME)
    for path in sorted({*_files(root), *(root / name for name in manifest.digests)}):
        manifest.check(path)
    return len(manifest.digests)


def changed(path: Path | str, manifest: Path | str) -> UserError:
    """The error of a file that is not what it was."""
    return UserError(f"{path} differs from its sha256 in {manifest}: {_remedy(manifest)}")


def _remedy(manifest: Path | str) -> str:
    return f"get the file anew, or write {NAME} anew (python -m oal_jax.data.manifest)"


@cache
def _sha256(path: Path, size: int, changed_ns: int) -> str:
    """Of a file of this size and time of change: another one is hashed anew."""
    return artifacts.sha256(path)


def _files(root: Path) -> Iterator[Path]:
    if not root.is_dir():
        raise UserError(f"{root} is no folder: give --root a directory of image sets")
    for parent, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if not name.startswith(".") and name != NAME:
                yield Path(parent, name)


def _line(digest: str, name: str) -> str:
    """As sha256sum writes it: names with a backslash or a newline are escaped, and marked."""
    escaped = name.replace("\\", "\\\\").replace("\n", "\\n")
    mark = "\\" if escaped != name else ""
    return f"{mark}{digest}  {escaped}\n"


def _unescaped(name: str) -> str:
    return name.replace("\\\\", "\0").replace("\\n", "\n").replace("\0", "\\")


def run(argv: Sequence[str]) -> None:
    """Parse the arguments, write or check, say what was done."""
    parser = argparse.ArgumentParser(
        prog="python -m oal_jax.data.manifest",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--root", type=Path, required=True, help="directory of image sets")
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    args = parser.parse_args(argv[1:])
    count = check(args.root) if args.check else write(args.root)
    print(f"{count} files {'are as in' if args.check else 'are in'} {args.root / NAME}")


if __name__ == "__main__":
    from oal_jax.runtime.command import guard

    sys.exit(guard(run, sys.argv))
