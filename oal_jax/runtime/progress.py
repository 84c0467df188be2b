"""The progress bar of whatever runs compiled programs."""

from tqdm import tqdm


class Bar(tqdm):
    """A bar that says "compiling" until the first piece of work is done.

    XLA compiles in the first piece. Its time would make the rate and the time left of all others
    wrong by orders of magnitude, so it counts in neither.
    """

    def __init__(self, total: int, name: str, unit: str, initial: int = 0):
        self._name, self._compiling = name, True
        super().__init__(
            total=total, desc=f"compiling {name}", unit=unit, initial=initial, mininterval=1.0
        )

    def compiling(self) -> None:
        """Say that the next piece needs another program."""
        if not self._compiling:
            self._compiling = True
            self.set_description(f"compiling {self._name}")

    def update(self, n: float | None = 1) -> bool | None:
        """Count `n` more as done."""
        if self.disable or not self._compiling:
            return super().update(n)
        self._compiling = False
        self.n += n
        if self.initial == self.last_print_n:  # the first piece
            self.initial = self.n
        self.last_print_n = self.n
        self.unpause()  # the clock goes on from here
        self.set_description(self._name)
        return True
