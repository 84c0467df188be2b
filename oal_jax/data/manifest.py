"""`python -m oal_jax.data.manifest --root DIR`: write the sha256 of every file below DIR.

DIR is a `data.root`, or one image set in it. The file is DIR/SHA256SUMS, in the form that
`sha256sum --check` reads. Once it is there, sets are checked against it when they are read: image
files one by one, a TFDS set as a whole (once a process, at about a GB/s). A missing, changed or new
file is an error that names it. --check checks all files and writes nothing.
"""

import re
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import NamedTuple

from oal_jax.data import image_files
from oal_jax.errors import UserError
from oal_jax.runtime import artifacts, writing

NAME = "SHA256SUMS"
_LINE = re.compile(r"(\\?)([0-9a-f]{64})  (.+)\n?")
_REMEDY = f"get the file again, or write {NAME} again (python -m oal_jax.data.manifest)"


class Manifest(NamedTuple):
    """The files below a directory.

    Attributes:
      path: the manifest itself.
      digests: hexadecimal sha256 by path below its directory, with forward slashes.
    """

    path: Path
    digests: dict[str, str]

    def digest(self, path: Path) -> str:
        """The sha256 that a file must have; `UserError` if it is not listed."""
        relative = path.relative_to(self.path.parent).as_posix()
        if relative not in self.digests:
            raise UserError(f"{path} is not in {self.path}: {_REMEDY}")
        return self.digests[relative]

    def check_names(self, folder: Path, present: Sequence[Path]) -> None:
        """Raise `UserError` if a listed file below a folder is missing; `present` are not."""
        below = folder.relative_to(self.path.parent).as_posix()
        prefix = "" if below == "." else below + "/"
        unseen = {name for name in self.digests if name.startswith(prefix)}
        unseen -= {path.relative_to(self.path.parent).as_posix() for path in present}
        for path in (self.path.parent / name for name in sorted(unseen)):
            if not path.exists():  # a file that is no image may be there
                raise UserError(f"{path} is missing, {self.path} has it: {_REMEDY}")

    def check(self, path: Path) -> None:
        """Raise `UserError` if a file has changed. Reads each file once a process."""
        expected = self.digest(path)
        try:
            stat = path.stat()
            digest = _sha256(path, stat.st_size, stat.st_mtime_ns)
        except OSError as error:
            raise UserError(
                f"{path} cannot be read ({error.strerror}), {self.path} has it: {_REMEDY}"
            ) from error
        if digest != expected:
            raise changed(path, self.path)


def find(folder: Path, root: Path) -> Manifest | None:
    """The nearest manifest: in the folder itself or above it, up to `root`. None: there is none.

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
        with path.open(encoding="utf-8-sig", newline="\n") as file:
            for number, line in enumerate(file, start=1):
                match = _LINE.fullmatch(line)
                if not match:
                    raise UserError(f"{path}, line {number}: not 'SHA256  PATH': {_REMEDY}")
                escaped, digest, name = match.groups()
                if escaped:
                    name = re.sub(r"\\(.)", lambda m: "\n" if m[1] == "n" else m[1], name)
                digests[name] = digest
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}): {_REMEDY}") from error
    return Manifest(path, digests)


def write(root: Path) -> int:
    """Writes ROOT/SHA256SUMS; returns the number of files in it.

    Raises:
      UserError: no such folder, nothing in it, or a file that can't be read.
    """
    files = sorted(_files(root))
    text = {"encoding": "utf-8", "newline": "\n"}
    with writing.whole_file(root / NAME, "w", **text) as file, ThreadPoolExecutor() as threads:
        try:
            for path, digest in zip(files, threads.map(artifacts.sha256, files), strict=True):
                name = path.relative_to(root).as_posix()
                escaped = name.replace("\\", "\\\\").replace("\n", "\\n")
                mark = "\\" if escaped != name else ""
                file.write(f"{mark}{digest}  {escaped}\n")
        except OSError as error:
            raise UserError(f"{error.filename} can't be read ({error.strerror})") from error
    return len(files)


def changed(path: Path | str, manifest: Path | str) -> UserError:
    """The error for a file that has changed."""
    return UserError(f"{path} differs from its sha256 in {manifest}: {_REMEDY}")


@cache
def _sha256(path: Path, size: int, changed_ns: int) -> str:
    return artifacts.sha256(path)  # once for a file of this size and time of change


def _files(root: Path) -> Iterator[Path]:
    listing = image_files.find(root)
    for name in (*listing.names, *listing.others):
        base = name.rpartition("/")[2]
        if base and base != NAME and not image_files.is_hidden(base):
            yield root / name


def run(argv: Sequence[str]) -> None:
    """Parse the arguments; write or check the manifest; print a line about it."""
    from oal_jax.runtime.command import BareParser

    parser = BareParser("python -m oal_jax.data.manifest", __doc__)
    parser.add_argument("--root", type=Path, required=True, help="directory of image sets")
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    args = parser.parse_args(argv[1:])
    if not any(_files(args.root)):
        raise UserError(f"{args.root} holds no files: give --root a directory of image sets")
    if not args.check:
        print(f"{write(args.root)} files are in {args.root / NAME}")
        return
    manifest = read(args.root / NAME)
    for path in sorted({*_files(args.root), *(args.root / name for name in manifest.digests)}):
        manifest.check(path)
    print(f"{len(manifest.digests)} files are as in {args.root / NAME}")


if __name__ == "__main__":
    from oal_jax.runtime.command import guard

    sys.exit(guard(run, sys.argv))
