"""The arguments that the commands on a finished run have in common."""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from oal_jax.errors import UserError


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are `UserError`s; names take dashes or underscores."""

    def __init__(self, prog: str, doc: str):
        raw = argparse.RawDescriptionHelpFormatter
        super().__init__(prog=prog, description=doc, formatter_class=raw, allow_abbrev=False)
        self.add_argument("--workdir", type=Path, required=True, help="directory of a finished run")
        self.add_argument("--score", help="default: the first of the run's config")
        self.add_argument(
            "--keep-id",
            type=float,
            help="share of ID validation images that the threshold keeps; default: the config's",
        )

    def parse_args(self, args: Sequence[str], namespace: Any = None) -> argparse.Namespace:  # type: ignore[override]
        """The arguments, checked.

        Raises:
          UserError: anything about them that is wrong, in one line.
        """
        spelled = [re.sub(r"^--[^=]+", lambda m: m[0].replace("_", "-"), a) for a in args]
        values = super().parse_args(spelled, namespace)
        if values.keep_id is not None and not 0 < values.keep_id < 1:
            raise UserError(f"--keep-id {values.keep_id} must lie between 0 and 1")
        return values

    def error(self, message: str) -> NoReturn:
        """Instead of printing the usage and leaving."""
        raise UserError(f"{message}; see --help")
