"""The exceptions that end a command with one line instead of a traceback."""


class UserError(Exception):
    """A mistake of the user's: one line that says what, where and what to do; exit code 2."""


class TrainingFailed(Exception):
    """The loss or the parameters stopped being finite, or the model collapsed; exit code 1."""


class Preempted(Exception):
    """SIGTERM arrived; in a training the state was saved first; exit code 143."""
