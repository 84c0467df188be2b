"""The processes of one run: what process 0 does for all, and how all of them stop together.

They talk through the key-value store of JAX's coordination service, which process 0 hosts. No
device takes part, so a process may wait there as long as another one works. In a run of one process
all of this does nothing.
"""

import atexit
import contextlib
import ctypes
import itertools
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, NoReturn

from oal_jax.errors import Preempted

_FAILURE = "oal_jax/failure"
_POLL = 1.0  # seconds between two reads of that key
_GRACE = 2.0  # seconds in which a process may end by itself after another one has failed
_WEEK = 7 * 24 * 3600 * 1000  # milliseconds; heartbeats detect a process that dies meanwhile
_LOST = (
    "another process of the run died, so this one stops; start the same command again on all of"
    " them to go on from the last checkpoint"
)

_numbers = itertools.count()  # of the messages: all processes count alike
_inside_on_main = ContextVar("inside_on_main", default=False)
_ending = threading.Lock()  # held by the thread that ends this process


def several() -> bool:
    """Whether this process is one of several of a run."""
    return count() > 1


def index() -> int:
    """The number of this process, from 0."""
    return runtime.process_id if (runtime := _runtime()) is not None else 0


def count() -> int:
    """The number of processes of the run."""
    return runtime.num_processes if (runtime := _runtime()) is not None else 1


def is_main() -> bool:
    """Whether this is process 0, which writes the files that exist once."""
    return index() == 0


def on_main(function: Callable[[], Any]) -> Any:
    """Call `function` on process 0; all processes wait for its value, which JSON can hold.

    All processes call this at the same places. A call inside of `function` is process 0's own. If
    `function` raises, the run ends on all processes.
    """
    if not several() or _inside_on_main.get():
        return function()
    key = f"oal_jax/main/{next(_numbers)}"
    if not is_main():
        return json.loads(_client().blocking_key_value_get(key, _WEEK))
    token = _inside_on_main.set(True)
    try:
        value = function()
    finally:
        _inside_on_main.reset(token)
    _client().key_value_set(key, json.dumps(value))
    return value


def wait_for_all() -> None:
    """Wait until all processes call this."""
    if several():
        _client().wait_at_barrier(f"oal_jax/all/{next(_numbers)}", _WEEK)


@contextlib.contextmanager
def only_main_prints() -> Iterator[None]:
    """Silence stdout and progress bars of the processes other than 0. Errors are still printed."""
    if is_main():
        yield
        return
    os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def explain_aborts() -> None:
    """Turn an abort by JAX's runtime into one line on stderr and exit code 1.

    Heartbeats find a process that died. The runtime then aborts the others from a thread of its
    own, where no Python handler runs, but one of the C library does.
    """
    c_signal = ctypes.CDLL(None).signal
    c_signal.argtypes, c_signal.restype = [ctypes.c_int, type(_aborted)], ctypes.c_void_p
    c_signal(signal.SIGABRT, _aborted)


def watch() -> None:
    """End this process when another one fails, whatever it waits for. SIGTERM is such a failure."""
    if several():
        finished = threading.Event()
        atexit.register(finished.set)
        threading.Thread(target=_watch, args=(finished,), daemon=True).start()
        signal.signal(signal.SIGTERM, _preempted)


def leave(code: int, message: str) -> NoReturn:
    """End this process with a line on stderr; the others end with the same exit code."""
    _ending.acquire()
    with contextlib.suppress(Exception):  # another process failed first, or process 0 is gone
        _client().key_value_set(_FAILURE, json.dumps([index(), code, message]))
    _exit(code, message)


def give_way() -> None:
    """Wait until `watch` would have ended this process, if another one failed before it."""
    time.sleep(2 * _POLL + _GRACE)


def exit_now(code: int, message: str) -> NoReturn:
    """End this process with a line on stderr, from any thread."""
    os.write(2, f"oal_jax: {message}\n".encode())
    os._exit(code)


def _runtime() -> Any:
    # JAX has no public name for the store; Orbax, too, takes it from here. Where JAX is not
    # imported yet, no processes have joined.
    module = sys.modules.get("jax._src.distributed")
    state = module and module.global_state
    return state if state and state.client is not None else None


def _client() -> Any:
    return _runtime().client


def _watch(finished: threading.Event) -> None:
    while not finished.wait(_POLL):
        try:
            process, code, message = json.loads(_client().key_value_try_get(_FAILURE))
        except Exception:  # no failure; or no store any more, which the runtime notices
            continue
        if not finished.wait(_GRACE) and _ending.acquire(blocking=False):
            _exit(code, f"process {process}: {message}")
        return


def _exit(code: int, message: str) -> NoReturn:
    """Exit without the runtime's own shutdown, which waits for processes that will not come."""
    os.write(2, f"oal_jax: {message}\n".encode())
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    if is_main():  # it hosts the store; the runtime aborts the others when it is gone
        time.sleep(2 * _POLL + _GRACE)
    os._exit(code)


def _preempted(*_: Any) -> NoReturn:
    raise Preempted("stopped by SIGTERM")


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _aborted(_: int) -> None:
    exit_now(1, _LOST)
