"""The processes of one run: what process 0 does for all, and how all of them stop together.

They talk through the key-value store of JAX's coordination service, which process 0 hosts: no
device takes part, so a process may wait there as long as another one works or writes. A run of one
process passes through all of this without a trace.
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
from typing import Any, NoReturn

from oal_jax.errors import Preempted

_FAILURE = "oal_jax/failure"
_LEFT = "oal_jax/left"
_POLL = 1.0  # seconds between two looks for a failure
_GRACE = 5.0  # seconds in which a process may end by itself after another one has failed
_LONG = 7 * 24 * 3600 * 1000  # milliseconds; who dies meanwhile is found by the heartbeats
_GONE = (
    "this process was stopped because another one of the run is gone; start the same command again"
    " on all of them to go on from the last checkpoint"
)


class _Told:
    """How often the processes have spoken, the same on all; and whether process 0 does just now."""

    numbers = itertools.count()
    on_main = False


def several() -> bool:
    """Whether this process is one of several of a run."""
    return (runtime := _runtime()) is not None and runtime.num_processes > 1


def index() -> int:
    """The number of this process, from 0."""
    return runtime.process_id if (runtime := _runtime()) is not None else 0


def is_main() -> bool:
    """Whether this process writes the reports and the files that exist once."""
    return index() == 0


def on_main(function: Callable[[], Any]) -> Any:
    """What `function()` returns on process 0, a JSON value, on all; the others wait for it.

    All processes call this at the same places; calls inside of `function` are process 0's own.
    Where it raises, the run ends, on all.
    """
    if not several() or _Told.on_main:
        return function()
    key = f"oal_jax/main/{next(_Told.numbers)}"
    if not is_main():
        return json.loads(_client().blocking_key_value_get(key, _LONG))
    _Told.on_main = True
    try:
        value = function()
    finally:
        _Told.on_main = False
    _client().key_value_set(key, json.dumps(value))
    return value


def wait_for_all() -> None:
    """Wait until all processes are here."""
    if several():
        _client().wait_at_barrier(f"oal_jax/all/{next(_Told.numbers)}", _LONG)


@contextlib.contextmanager
def only_main_prints() -> Iterator[None]:
    """While inside, the others print nothing and show no bars; errors they still tell."""
    if is_main():
        yield
        return
    os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def tell_aborts() -> None:
    """From now on, when the runtime aborts this process, it says why and exits with code 1.

    Its heartbeats find processes that died. It then aborts the others, from a thread of its own,
    where nothing of Python's runs any more but a handler of the C library does.
    """
    if sys.platform == "win32":
        return
    c_signal = ctypes.CDLL(None).signal
    c_signal.argtypes, c_signal.restype = [ctypes.c_int, type(_aborted)], ctypes.c_void_p
    c_signal(signal.SIGABRT, _aborted)


def watch() -> None:
    """From now on this process ends when another one fails, whatever it is waiting for.

    SIGTERM raises `Preempted`, so that the others are told of it too.
    """
    if not several():
        return
    stop = threading.Event()
    atexit.register(stop.set)
    threading.Thread(target=_watch, args=(stop,), daemon=True).start()
    signal.signal(signal.SIGTERM, _preempted)


def leave(code: int, message: str) -> NoReturn:
    """End this process of several with an exit code, after telling the others to end likewise."""
    told = json.dumps({"process": index(), "code": code, "message": message})
    with contextlib.suppress(Exception):  # another one failed before, or process 0 is gone
        _client().key_value_set(_FAILURE, told)
    _end(code)


def failure_of_another() -> tuple[int, str] | None:
    """(exit code, message) of the process that failed first; None if it was none or this one."""
    # It may be told a moment after the broken connection that this process trips over.
    deadline = time.monotonic() + 2 * _POLL
    while time.monotonic() < deadline:
        if failure := _failure():
            return None if failure[0] == index() else failure[1:]
        time.sleep(_POLL / 4)
    return None


def exit_now(code: int, message: str) -> NoReturn:
    """End this process with one line, from any thread."""
    _write(message)
    os._exit(code)


def _runtime() -> Any:
    # JAX has no public name for its store; Orbax takes the same way to it. Where JAX has not been
    # imported there are no other processes.
    module = sys.modules.get("jax._src.distributed")
    state = module and module.global_state
    return state if state and state.client is not None else None


def _client() -> Any:
    return _runtime().client


def _failure() -> tuple[int, int, str] | None:
    """(process, exit code, message) of the first failure, if there is one."""
    try:
        told = json.loads(_client().key_value_try_get(_FAILURE))
    except Exception:  # there is none; or no service any more, of which the runtime takes care
        return None
    return told["process"], told["code"], f"process {told['process']}: {told['message']}"


def _watch(stop: threading.Event) -> None:
    while not stop.wait(_POLL):
        failure = _failure()
        if failure and failure[0] == index():
            return
        if failure and not stop.wait(_GRACE):
            _write(failure[2])
            _end(failure[1])


def _end(code: int) -> NoReturn:
    """Exit without the runtime's own shutdown, which waits for processes that will not come."""
    client, count = _client(), _runtime().num_processes
    with contextlib.suppress(Exception):
        client.key_value_set(f"{_LEFT}/{index()}", "")
    # Who goes at once looks dead to the others, whom the runtime would abort before they have said
    # why they end; process 0, which they hear it from, goes last.
    deadline = time.monotonic() + 2 * _GRACE
    while time.monotonic() < deadline:
        with contextlib.suppress(Exception):
            if len(client.key_value_dir_get(_LEFT)) == count:
                time.sleep(_POLL * is_main())
                break
        time.sleep(_POLL / 4)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(code)


def _preempted(*_: Any) -> NoReturn:
    raise Preempted("stopped by SIGTERM")


def _write(message: str) -> None:
    os.write(2, f"oal_jax: {message}\n".encode())


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _aborted(_: int) -> None:
    exit_now(1, _GONE)
