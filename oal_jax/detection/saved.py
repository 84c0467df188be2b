"""A detector as a directory that `oal_jax.load` reads without the code of its model.

`detector.json` describes it, `forward.jax_export` is the classifier's program, and
`detector.safetensors` has the weights, what the score was fitted to, and the ID validation scores.
Nothing is pickled, and no file is trusted.
"""

import dataclasses
import datetime
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.tree_util import Partial

from oal_jax import scores as post_hoc
from oal_jax.data.decoding import Decoding
from oal_jax.detection import program
from oal_jax.detection.folder import DETECTOR, FORWARD, SAVED, TENSORS, check_replaceable
from oal_jax.detection.parts import Parts, check_runs
from oal_jax.errors import UserError
from oal_jax.evaluation.tables import MEANS, Row
from oal_jax.runtime import artifacts, distributed, writing

_VERSION = 1
_REMEDY = "save the detector again"


def write(directory: Path, parts: Parts) -> None:
    """Write the directory, whole or not at all.

    Raises:
      UserError: it holds other files, it can't be written, or JAX can't write the model as a
        program.
    """
    check_replaceable(directory, DETECTOR, SAVED)
    forward = program.trace(parts.forward, parts.image_shape, parts.score.needs)
    names = weight_names(parts.forward)
    weights = dict(zip(names, map(np.asarray, jax.tree.leaves(parts.forward)), strict=True))
    tensors = {f"weights.{name}": _storable(value) for name, value in weights.items()}
    tensors |= {f"state.{name}": np.asarray(value) for name, value in parts.state.items()}
    tensors["id_val_scores"] = np.float32(parts.id_val_scores)
    with writing.whole_folder(directory) as folder:
        artifacts.write_bytes(folder / FORWARD, forward)
        artifacts.write_tensors(folder / TENSORS, tensors)
        files = {name: artifacts.sha256(folder / name) for name in (FORWARD, TENSORS)}
        artifacts.write_json(folder / DETECTOR, _describe(parts, names) | {"files": files})


def _describe(parts: Parts, names: list[str]) -> dict[str, Any]:
    return {
        "format": SAVED,
        "format_version": _VERSION,
        "score": parts.score.name,
        "parameters": dict(parts.params),
        "threshold": parts.threshold,
        "keep_id": parts.keep_id,
        "image_shape": list(parts.image_shape),
        "decoding": parts.decoding and dataclasses.asdict(parts.decoding),
        "class_names": parts.class_names and list(parts.class_names),
        "batch_size": parts.batch_size,
        "weights": names,
        "about": dict(parts.about),
        "versions": artifacts.versions(),
        "saved": datetime.date.today().isoformat(),
    }


def weight_names(forward: Partial) -> list[str]:
    """A name for every weight, in the order of the leaves: its way through the pytree."""
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(forward)]
    long = [jax.tree_util.keystr(path, simple=True, separator=".") for path in paths]
    names = [re.sub(r"^([0-9]+\.)+", "", name) for name in long]  # positions of arguments
    unique = len(set(names)) == len(names)
    return names if unique else [f"{i}.{name}" for i, name in enumerate(names)]


def _storable(value: np.ndarray) -> np.ndarray:
    # NumPy's reader of safetensors knows no bfloat16 and no 8-bit floats.
    return value if value.dtype.kind in "biuf" else value.view(f"u{value.dtype.itemsize}")


def read(directory: Path, keep_id: float | None = None, batch_size: int | None = None) -> Parts:
    """The parts of a saved detector.

    Raises:
      UserError: a file is missing, damaged, or of another form; it is named.
    """
    path = directory / DETECTOR
    values = _checked(artifacts.read_json(path, _REMEDY), path)
    for name, digest in values["files"].items():
        if not (directory / name).is_file():
            raise UserError(f"{directory / name} is missing; {_REMEDY}")
        if artifacts.sha256(directory / name) != digest:
            raise UserError(f"{directory / name} has another sha256 than {path} says; {_REMEDY}")
    forward, state, id_val_scores = _arrays(directory, values["weights"])
    params = {k: tuple(v) if isinstance(v, list) else v for k, v in values["parameters"].items()}
    decoding, names = values["decoding"], values["class_names"]
    try:
        mesh = distributed.make_mesh()
        parts = Parts(
            forward=distributed.place_parameters(forward, mesh),
            score=post_hoc.make(values["score"], **params),
            state=distributed.replicate(state, mesh),
            id_val_scores=id_val_scores,
            image_shape=tuple(values["image_shape"]),
            keep_id=values["keep_id"],
            class_names=names and tuple(names),
            batch_size=values["batch_size"] if batch_size is None else batch_size,
            params=params,
            mesh=mesh,
            decoding=decoding and Decoding.from_json(decoding),
            about=values["about"],
        )
    except (UserError, TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{path}: {error}") from None
    if not np.isclose(parts.threshold, values["threshold"], rtol=1e-6, atol=0):
        raise UserError(
            f"{path}: threshold {values['threshold']} is not what keep_id={parts.keep_id} gives,"
            f" {parts.threshold}; give load a keep_id"
        )
    check_runs(parts, directory, _REMEDY)
    return parts if keep_id is None else parts.with_keep_id(keep_id)


def _checked(values: Any, path: Path) -> dict[str, Any]:
    """The values of `detector.json`, each of its type."""
    integer = lambda x: isinstance(x, int) and not isinstance(x, bool) and 0 < x < 2**31
    number = lambda x: isinstance(x, int | float) and not isinstance(x, bool) and abs(x) < 1e300
    strings = lambda x: isinstance(x, list) and all(isinstance(s, str) and _is_text(s) for s in x)
    shape = lambda x, n: isinstance(x, list) and len(x) == n and all(map(integer, x))
    rules = {
        "format": lambda x: x == SAVED,
        "format_version": lambda x: x == _VERSION,
        "score": lambda x: isinstance(x, str),
        "parameters": lambda x: isinstance(x, dict),
        "threshold": number,
        "keep_id": lambda x: number(x) and 0 < x < 1,
        "image_shape": lambda x: shape(x, 3),
        "decoding": lambda x: (
            x is None
            or (
                isinstance(x, dict)
                and x.keys() == {"channels", "resize", "crop"}
                and x["channels"] in (1, 3, 4)
                and (x["resize"] is None or integer(x["resize"]))
                and shape(x["crop"], 2)
            )
        ),
        "class_names": lambda x: x is None or strings(x),
        "batch_size": integer,
        "weights": strings,
        "about": _is_about,
        "files": lambda x: isinstance(x, dict) and x.keys() == {FORWARD, TENSORS},
    }
    if not isinstance(values, dict):
        raise UserError(f"{path} is no JSON object; {_REMEDY}")
    for name, rule in rules.items():
        if name not in values:
            raise UserError(f"{path} has no {name!r}; {_REMEDY}")
        if not rule(values[name]):
            shown = repr(values[name])[:80]
            raise UserError(f"{path}: {name} is {shown}, which detector.save never writes")
    shape, decoding = values["image_shape"], values["decoding"]
    if decoding and [*decoding["crop"], decoding["channels"]] != shape:
        raise UserError(f"{path}: decoding does not give images of image_shape {shape}")
    return values


def _is_text(name: str) -> bool:
    """Whether a name can be written; bytes of a file's name that are no UTF-8 can."""
    try:
        name.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return False
    return True


def _is_about(about: Any) -> bool:
    """Whether it has the form that the loader of a run writes."""
    fields = {"id_set": str, "source": str, "method": str, "epochs": int, "seed": int}
    if not isinstance(about, dict) or about.keys() - {"architecture", "trained_on", "measured"}:
        return False
    trained, rows = about.get("trained_on"), about.get("measured", [])
    sound = trained is None or (
        isinstance(trained, dict)
        and trained.keys() == fields.keys()
        and all(isinstance(trained[name], kind) for name, kind in fields.items())
    )
    return sound and isinstance(rows, list) and all(map(_is_row, rows))


def _is_row(row: Any) -> bool:
    return (
        isinstance(row, list)
        and len(row) == len(Row._fields)
        and all(isinstance(x, str) for x in row[:3])
        and row[2] in MEANS
        and all(isinstance(x, int | float) for x in row[3:])
    )


def _arrays(directory: Path, names: list[str]) -> tuple[Partial, dict[str, np.ndarray], np.ndarray]:
    """The classifier, the score's state, and the ID validation scores."""
    path = directory / FORWARD
    try:
        exported = program.read(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is damaged or not to be trusted: {error}; {_REMEDY}") from None
    path = directory / TENSORS
    try:
        tensors = artifacts.read_tensors(path)
    except UserError as error:
        raise UserError(f"{str(error).split(';')[0]}; {_REMEDY}") from None
    expected = exported.in_avals[:-1]
    if len(expected) != len(names):
        raise UserError(f"{path}: {len(names)} weights for a program of {len(expected)}")
    leaves = []
    for name, aval in zip(names, expected, strict=True):
        value = tensors.get(f"weights.{name}")
        if value is None or value.shape != aval.shape or value.itemsize != aval.dtype.itemsize:
            raise UserError(f"{path}: weight {name} does not fit the program; {_REMEDY}")
        leaves.append(value.view(aval.dtype))
    scores = tensors.get("id_val_scores", np.zeros(0))
    rising = scores.ndim == 1 and scores.size and (np.diff(scores) >= 0).all()
    if not (rising and np.isfinite(scores).all()):
        raise UserError(f"{path}: id_val_scores are not rising numbers; {_REMEDY}")
    begin = "state."
    state = {k.removeprefix(begin): v for k, v in tensors.items() if k.startswith(begin)}
    for name, value in state.items():
        if value.dtype.kind == "f" and np.isnan(value).any():
            raise UserError(f"{path}: {begin}{name} holds NaN; {_REMEDY}")
    return Partial(program.as_function(exported), leaves), state, scores


def is_saved(directory: Path) -> bool:
    """Whether the directory is that of a saved detector, and not of a run."""
    return (directory / DETECTOR).is_file()
