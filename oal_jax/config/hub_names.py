"""Names of models on the Hugging Face hub, written `hub:ORG/NAME@COMMIT`.

The commit is part of the name, so that a config means the same weights tomorrow.
"""

import re
from typing import NamedTuple

from oal_jax.errors import UserError

PREFIX = "hub:"
_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_COMMIT = re.compile(r"[0-9a-f]{40}")


class HubModel(NamedTuple):
    """A repository of models at a commit."""

    repository: str
    commit: str

    def __str__(self) -> str:
        return f"{PREFIX}{self.repository}@{self.commit}"


def parse(text: str) -> HubModel | None:
    """The model that `hub:ORG/NAME@COMMIT` names; None for a path.

    Raises:
        UserError: it begins with `hub:` and goes on otherwise. Branches and tags can move, so they
            are no commits.
    """
    if not text.startswith(PREFIX):
        return None
    repository, _, commit = text.removeprefix(PREFIX).partition("@")
    if not _NAME.fullmatch(repository) or not _COMMIT.fullmatch(commit):
        raise UserError(
            f"'{text}' is not {PREFIX}ORG/NAME@COMMIT, with the 40 hexadecimal digits of a commit"
            " (the hub shows them under Files, History)"
        )
    return HubModel(repository, commit)
