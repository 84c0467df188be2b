"""The one exception that means: the user can mend this."""


class UserError(Exception):
    """A mistake of the user's: one line that says what, where and what to do; exit code 2."""
