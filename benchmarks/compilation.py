"""Seconds that JAX spends on making programs."""

from typing import Any

import jax


class CompilationTime:
    """Time spans of tracing, lowering and compiling, from when the object is made."""

    def __init__(self) -> None:
        self._spans: list[tuple[float, float]] = []
        jax.monitoring.register_event_time_span_listener(self.add)

    def add(self, event: str, start: float, end: float, **_: Any) -> None:
        """Keep the time span of an event of JAX's compiler."""
        if event.startswith("/jax/core/compile/"):
            self._spans.append((start, end))

    @property
    def seconds(self) -> float:
        """Length of the union of all spans: tracing a function includes those that it calls."""
        total, last = 0.0, float("-inf")
        for start, end in sorted(self._spans):
            total += max(0.0, end - max(start, last))
            last = max(last, end)
        return total
