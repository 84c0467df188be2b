"""Where logged steps go: a JSON line each, TensorBoard beside it."""

import json
import os
from collections.abc import Mapping
from pathlib import Path


class MetricsLog:
    """`metrics.jsonl` of a run, and TensorBoard event files in the same directory."""

    def __init__(self, workdir: Path, stage: str, resumed_step: int = 0):
        """Continue the log of `stage`; lines past `resumed_step` are replaced by those to come."""
        from tensorboardX import SummaryWriter

        self.path = workdir / "metrics.jsonl"
        self.stage = stage
        _keep(self.path, stage, resumed_step)
        self._file = self.path.open("a", encoding="utf-8")
        self._board = SummaryWriter(
            str(workdir / "tensorboard" / stage), purge_step=resumed_step + 1
        )

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add one logged step."""
        self._file.write(json.dumps({"stage": self.stage, "step": step, **metrics}) + "\n")
        self._file.flush()
        for name, value in metrics.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close both."""
        self._file.close()
        self._board.close()


def _keep(path: Path, stage: str, last_step: int) -> None:
    if not path.exists():
        return
    kept = [
        line
        for line in path.read_text("utf-8").splitlines(keepends=True)
        if line.endswith("\n") and _precedes(line, stage, last_step)
    ]
    temporary = path.with_suffix(".partial")
    temporary.write_text("".join(kept), "utf-8")
    os.replace(temporary, path)


def _precedes(line: str, stage: str, last_step: int) -> bool:
    row = json.loads(line)
    return row["stage"] != stage or row["step"] <= last_step


def read(path: Path, stage: str) -> list[dict[str, float]]:
    """All logged steps of a stage, in order."""
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    return [row for row in rows if row["stage"] == stage]
