"""Where logged steps go: one JSON line a step, and TensorBoard files beside it."""

import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from oal_jax.runtime import artifacts, writing

FILE = "metrics.jsonl"


class MetricsLog:
    """`metrics.jsonl` of a run, and TensorBoard event files below the same directory."""

    def __init__(self, workdir: Path, stage: str, resumed_step: int = 0):
        """Continue the log of `stage`. Its lines past `resumed_step` are deleted."""
        # Not tensorboardX's SummaryWriter: a full disk kills its thread, and its queue then blocks
        # for ever.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import SessionLog

        self.stage = stage
        path = workdir / FILE
        _drop_after(path, stage, resumed_step)
        self._file = writing.open_to_append(path)
        board = workdir / "tensorboard" / stage
        board.mkdir(parents=True, exist_ok=True)
        self._board = EventsWriter(str(board / "events"))
        # TensorBoard drops what an earlier run logged from this step on.
        self._event(resumed_step + 1, session_log=SessionLog(status=SessionLog.START))

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add one logged step."""
        from tensorboardX.proto.summary_pb2 import Summary

        self._file.write(json.dumps({"stage": self.stage, "step": step, **metrics}) + "\n")
        self._file.flush()
        values = [Summary.Value(tag=k, simple_value=v) for k, v in metrics.items()]
        self._event(step, summary=Summary(value=values))

    def _event(self, step: int, **content) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self._board.write_event(Event(wall_time=time.time(), step=step, **content))

    def sync(self) -> None:
        """Bring both to the disk. A resumed run relies on the lines before its checkpoint."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._board.flush()

    def close(self) -> None:
        """Flush and close both."""
        try:
            self._file.close()
        finally:
            self._board.close()


def read(path: Path, stage: str) -> list[dict[str, float]]:
    """All logged steps of a stage in order. Lines that were cut short are skipped."""
    return [row for row in _rows(path) if row["stage"] == stage] if path.is_file() else []


def encode(rows: Iterable[Mapping]) -> bytes:
    """Rows as the log's lines."""
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def restore(workdir: Path, rows: list[dict], stages: Sequence[str]) -> bool:
    """Put the rows of finished stages back where the log has others; whether it had."""
    path = workdir / FILE
    if [row for stage in stages for row in read(path, stage)] == rows:
        return False
    others = [row for row in _rows(path) if row["stage"] not in stages] if path.exists() else []
    artifacts.write_bytes(path, encode([*others, *rows]))
    return True


def _rows(path: Path) -> list[dict]:
    rows = []
    for line in path.read_text("utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and "stage" in row and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


def _drop_after(path: Path, stage: str, last_step: int) -> None:
    """Delete the lines of `stage` past a step, and lines that a crash or a full disk cut short."""
    if not path.is_file():
        return
    rows = [row for row in _rows(path) if row["stage"] != stage or row["step"] <= last_step]
    with writing.whole_file(path) as file:
        file.write(encode(rows))
