"""Where logged steps go: a JSON line each, TensorBoard beside it."""

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path


class MetricsLog:
    """`metrics.jsonl` of a run, and TensorBoard event files in the same directory."""

    def __init__(self, workdir: Path, stage: str, resumed_step: int = 0):
        """Continue the log of `stage`; lines past `resumed_step` are replaced by those to come."""
        # Not tensorboardX's SummaryWriter: its thread dies of a full disk, and then the queue to
        # it blocks for ever.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import SessionLog

        self.path = workdir / "metrics.jsonl"
        self.stage = stage
        _keep(self.path, stage, resumed_step)
        self._file = self.path.open("a", encoding="utf-8")
        board = workdir / "tensorboard" / stage
        board.mkdir(parents=True, exist_ok=True)
        self._board = EventsWriter(str(board / "events"))
        # TensorBoard forgets what an earlier run logged from this step on.
        self._event(resumed_step + 1, session_log=SessionLog(status=SessionLog.START))

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add one logged step."""
        from tensorboardX.proto.summary_pb2 import Summary

        self._file.write(json.dumps({"stage": self.stage, "step": step, **metrics}) + "\n")
        self._file.flush()
        values = [Summary.Value(tag=k, simple_value=v) for k, v in metrics.items()]
        self._event(step, summary=Summary(value=values))

    def _event(self, step: int, **what) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self._board.write_event(Event(wall_time=time.time(), step=step, **what))

    def sync(self) -> None:
        """Bring both to the disk: before a checkpoint, whose resumption relies on these lines."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._board.flush()

    def close(self) -> None:
        """Flush and close both."""
        try:
            self._file.close()
        finally:
            self._board.close()


def _keep(path: Path, stage: str, last_step: int) -> None:
    """Drop what `stage` logged past a step, and lines that a crash or a full disk cut short."""
    if not path.exists():
        return
    kept = [
        json.dumps(row) + "\n"
        for row in _rows(path)
        if row["stage"] != stage or row["step"] <= last_step
    ]
    temporary = path.with_suffix(".partial")
    temporary.write_text("".join(kept), "utf-8")
    os.replace(temporary, path)


def _rows(path: Path) -> list[dict]:
    rows = []
    for line in path.read_text("utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and {"stage", "step"} <= row.keys():
            rows.append(row)
    return rows


def read(path: Path, stage: str) -> list[dict[str, float]]:
    """All logged steps of a stage, in order; lines that were cut short are passed over."""
    return [row for row in _rows(path) if row["stage"] == stage] if path.exists() else []
