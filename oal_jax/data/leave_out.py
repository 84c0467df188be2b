"""Classes left out of an ID set, which are near-OOD for the classes that remain.

Leaving out one class after another gives as many near-OOD problems as there are classes. A method
can be chosen on them without the benchmark's own near-OOD sets.
"""

import difflib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32

from oal_jax.errors import UserError

_FEWEST = 2  # classes that must remain


def relabelled(
    class_names: Sequence[str], leave_out: Sequence[str], left_out: bool = False
) -> tuple[Int32[np.ndarray, " k"], tuple[str, ...]]:
    """New labels of the classes, and what these labels mean.

    Args:
      class_names: of the whole ID set.
      leave_out: some of them; "a,b" is two, as a flag gives them.
      left_out: select the classes of `leave_out`, all with label 0, "ood". Otherwise the other
        classes are selected, labelled in their order.

    Returns:
      The new label of each class, -1 where its images are not selected; the new class names.

    Raises:
      UserError: a name that no class has, or fewer than two classes remain.
    """
    out = [name for entry in leave_out for name in _names(entry, class_names)]
    for name in out:
        if name not in class_names:
            near = difflib.get_close_matches(name, class_names, n=1, cutoff=0.0)
            raise UserError(
                f"config data.leave_out names '{name}', which is no class of the ID set; nearest:"
                f" '{near[0]}'"
            )
    rest = [name for name in class_names if name not in out]
    if len(rest) < _FEWEST:
        raise UserError(
            f"config data.leave_out leaves {len(rest)} of the {len(class_names)} classes of the ID"
            f" set; leave at least {_FEWEST}"
        )
    new = dict.fromkeys(out, 0) if left_out else {name: i for i, name in enumerate(rest)}
    table = np.array([new.get(name, -1) for name in class_names], np.int32)
    return table, ("ood",) if left_out else tuple(rest)


def _names(entry: str, class_names: Sequence[str]) -> list[str]:
    return [entry] if entry in class_names else [part.strip() for part in entry.split(",")]
