"""Profiler traces of the stages of a run (`--profile`).

`WORKDIR/profile/STAGE` holds the trace of a window of each stage that ran. TensorBoard's plugin
`xprof` shows it (`tensorboard --logdir WORKDIR/profile`), and https://ui.perfetto.dev opens its
`*.trace.json.gz`.
"""

import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax

from oal_jax.errors import UserError

WINDOW = 3.0  # seconds
# Seconds into a stage at which a window starts. A complete later window replaces an earlier one,
# so that a long stage shows its steady part and not its compilation.
STARTS = (0.0, 10.0, 60.0)


@contextmanager
def trace(folder: Path) -> Iterator[None]:
    """Trace a window of the block that this context surrounds, in place of the trace in `folder`.

    Raises:
      UserError: `folder` cannot be written to.
    """
    if folder.is_symlink() or folder.parent.is_symlink():
        raise UserError(f"--profile: {folder} is behind a link; delete it")
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise UserError(f"--profile: {folder} is not a writable directory ({error})") from None
    ended = threading.Event()
    # The trace is taken beside the block, which does not wait for a window to end.
    thread = threading.Thread(target=_take_windows, args=(folder, ended), daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _take_windows(folder: Path, ended: threading.Event) -> None:
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # events of Python calls would fill the trace
    scratch, elapsed = folder.with_name(f".{folder.name}"), 0.0
    try:
        for start in STARTS:
            if ended.wait(start - elapsed):
                break
            with jax.profiler.trace(scratch, profiler_options=options):
                cut_short = ended.wait(WINDOW)
            elapsed = start + WINDOW
            if start == 0 or not cut_short:
                shutil.rmtree(folder)
                scratch.rename(folder)
    except (RuntimeError, OSError) as error:  # the run is worth more than its trace
        print(f"profile: {folder.name} has no complete trace ({error})", flush=True)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
