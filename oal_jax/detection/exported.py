"""A detector as files that run without oal_jax: program, weights, description, model card."""

import dataclasses
import datetime
import importlib.metadata
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.export import Exported

from oal_jax.data import decoding as decoding_file
from oal_jax.data.decoding import Decoding
from oal_jax.detection import onnx_file, program
from oal_jax.detection.folder import (
    CARD,
    EXPORTED,
    MODEL,
    ONNX,
    PREPROCESS,
    PROGRAM,
    WEIGHTS,
    check_replaceable,
)
from oal_jax.detection.parts import Parts, decide
from oal_jax.detection.saved import weight_names
from oal_jax.evaluation.tables import Row, is_mean
from oal_jax.report.html import markdown
from oal_jax.runtime import artifacts, writing

PLATFORMS = program.PLATFORMS

# What JAX promises of its exported programs.
COMPATIBILITY = (
    "JAX loads an exported program for at least six months after the release that wrote it;"
    " for later, export again, or build the model from weights.safetensors"
)


def write(
    output: Path, parts: Parts, platforms: Sequence[str] = PLATFORMS, onnx: bool = False
) -> int:
    """Write the folder, whole or not at all; returns its size in bytes.

    Raises:
      UserError: `output` can't be written or holds other files, or the model can't be written as a
        program, or not as one of ONNX.
    """
    check_replaceable(output, MODEL, EXPORTED)
    contents: dict[str, bytes] = {PROGRAM: bytes(exported(parts, platforms).serialize())}
    if onnx:
        contents[ONNX] = onnx_file.convert(parts, description(parts))
    recipe = decoding_of(parts)
    if recipe is not None:
        contents[PREPROCESS] = preprocess(recipe).encode()
    described = description(parts) | {"platforms": list(platforms)}
    contents[CARD] = card(parts, described, list(contents)).encode()
    with writing.whole_folder(output) as folder:
        for name, data in contents.items():
            artifacts.write_bytes(folder / name, data)
        artifacts.write_tensors(folder / WEIGHTS, _tensors(parts))
        described["files"] = {
            name: {
                "sha256": artifacts.sha256(folder / name),
                "bytes": (folder / name).stat().st_size,
            }
            for name in (*contents, WEIGHTS)
        }
        artifacts.write_json(folder / MODEL, described)
    return sum(path.stat().st_size for path in output.iterdir())


def exported(parts: Parts, platforms: Sequence[str] = PLATFORMS) -> Exported:
    """The detector as one program with its weights inside, for batches of any size.

    Returns:
      Takes uint8 images (b, h, w, c); gives label int32, confidence and ood_score float32, is_ood
      bool, each (b,). For one device; `.serialize()` makes bytes of it.
    """
    # On the host, so that the program is for one device wherever the arrays lie now.
    arrays = jax.tree.map(np.asarray, (parts.forward, dict(parts.state)))
    score, threshold = program.row_by_row(parts.score), np.float32(parts.threshold)

    def call(images):
        forward, state = jax.tree.map(jnp.asarray, arrays)
        return decide(score, forward, state, threshold, images)

    return program.by_rows(call, (), parts.image_shape, jnp.uint8, platforms)


def decoding_of(parts: Parts) -> Decoding | None:
    """How files become images of the detector; None for numbers of channels that no file has."""
    if parts.decoding is not None or parts.image_shape[2] not in (1, 3, 4):
        return parts.decoding
    return Decoding.to_shape(parts.image_shape)


def preprocess(decoding: Decoding) -> str:
    """The text of a Python file that reads images as this package does.

    It needs Pillow and NumPy alone; its function `read` gives the pixels of one file.
    """
    source = inspect.getsource(decoding_file)
    source = source.replace("from oal_jax.errors import UserError\n", "UserError = ValueError\n")
    return f'''{source}

RECIPE = {decoding!r}


def read(file: str | os.PathLike | bytes | BinaryIO) -> np.ndarray:
    """The image that the detector takes: uint8 (height, width, channels)."""
    return decode(file, RECIPE)
'''


def _tensors(parts: Parts) -> dict[str, np.ndarray]:
    leaves = map(np.asarray, jax.tree.leaves(parts.forward))
    tensors = {f"model.{k}": v for k, v in zip(weight_names(parts.forward), leaves, strict=True)}
    tensors |= {f"score.{k}": np.asarray(v) for k, v in parts.state.items()}
    return tensors | {"id_val_scores": parts.id_val_scores}


def description(parts: Parts) -> dict[str, Any]:
    """What `model.json` and the metadata of ONNX say of a detector."""
    recipe = decoding_of(parts)
    return {
        "format": EXPORTED,
        "version": importlib.metadata.version("oal-jax"),
        "class_names": parts.class_names and list(parts.class_names),
        "image_shape": list(parts.image_shape),
        "image_type": "uint8",
        "decoding": recipe and dataclasses.asdict(recipe),
        "outputs": ["label", "confidence", "ood_score", "is_ood"],
        "score": parts.score.name,
        "parameters": dict(parts.params),
        "threshold": parts.threshold,
        "keep_id": parts.keep_id,
        "id_validation_images": len(parts.id_val_scores),
        **{k: v for k, v in parts.about.items() if k != "measured"},
        "versions": artifacts.versions(),
        "exported": datetime.date.today().isoformat(),
        "compatibility": COMPATIBILITY,
    }


def card(parts: Parts, described: Mapping[str, Any], files: Sequence[str]) -> str:
    """The model card. Names that come from elsewhere are plain text in it."""
    h, w, c = parts.image_shape
    trained = described.get("trained_on")
    name = markdown(parts.score.name)
    is_set = trained and trained["source"] != "own"
    title = f"{markdown(trained['id_set'])}, {name}" if is_set else name
    origin = "- The classifier is a model that this package did not train.\n"
    if trained:
        origin = (
            f"- Trained on {_trained_on(trained, parts.class_names or ())} by method"
            f" {markdown(trained['method'])}; epochs: {trained['epochs']}, seed:"
            f" {trained['seed']}.\n"
        )
    params = ", ".join(f"{k}={v}" for k, v in parts.params.items()) or "its defaults"
    classes = ", ".join(map(markdown, parts.class_names or ())) or "without names"
    images, imports = f"np.zeros((3, {h}, {w}, {c}), np.uint8)", ""
    if PREPROCESS in files:
        images, imports = 'np.stack([preprocess.read("photo.jpg")])', "\nimport preprocess"
    onnx = ""
    if ONNX in files:
        onnx = (
            f"\n`{ONNX}` is the same detector for onnxruntime and others: input `images`, uint8;"
            " threshold, class\nnames and decoding are in its metadata.\n"
        )
    return f"""# OOD detector: {title}

A classifier that says which images are unlike its training data (out-of-distribution, OOD).

{origin}- Takes uint8 images of shape (n, {h}, {w}, {c}), for any n.
- Gives `label`, `confidence` (the largest softmax probability), `ood_score` (higher = more OOD) and
  `is_ood` (ood\\_score above {parts.threshold:.6g}).
- Score {name} with {markdown(params)}. The threshold keeps {parts.keep_id:.1%} of
  {len(parts.id_val_scores)} ID validation images; measure what it keeps of yours.
- Classes: {classes}.

## Use it

The program needs `jax` (this was written by {described["versions"]["jax"]}) and `flatbuffers`, and
runs on {", ".join(described["platforms"])}. {_preprocessing(PREPROCESS in files)}

```python
import jax, numpy as np
from jax import export{imports}
with open("{PROGRAM}", "rb") as file:
    detector = jax.jit(export.deserialize(bytearray(file.read())).call)
images = {images}
label, confidence, ood_score, is_ood = detector(images)
```
{onnx}
`{MODEL}` has the class names, the threshold, the sha256 of each file and the versions; `{WEIGHTS}`
has the weights (`model.*`), what the score was fitted to (`score.*`), and the ID validation scores.

{COMPATIBILITY}.

## Measured

{_measured(parts)}
"""


def _trained_on(trained: Mapping[str, Any], class_names: Sequence[str]) -> str:
    if trained["source"] != "own":
        return f"{markdown(trained['id_set'])} ({markdown(trained['source'])})"
    return f"a folder of one's own images, of {len(class_names)} classes (below),"


def _preprocessing(is_there: bool) -> str:
    if not is_there:
        return "Images come as arrays."
    return (
        f"`{PREPROCESS}` needs Pillow and NumPy;\nit turns, converts, resizes and crops an image"
        " file as for the threshold."
    )


def _measured(parts: Parts) -> str:
    """The score's rows of a run's report as a Markdown table, or that there are none."""
    rows = [Row(*row) for row in parts.about.get("measured", ())]
    if not rows:
        return f"Nothing was measured with {markdown(parts.score.name)}."
    lines = [
        f"ID test accuracy {rows[0].id_accuracy:.2f} %. In percent; OOD is the positive class.",
        "",
        "| OOD set | group | AUROC | FPR at 95 % OOD TPR | FPR at 95 % ID TPR |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        name, group = markdown(row.dataset), markdown(row.group)
        name = f"**mean, {group}**" if is_mean(row) else name
        rates = f"{row.fpr_at_95_ood_tpr:.2f} | {row.fpr_at_95_id_tpr:.2f}"
        lines.append(f"| {name} | {group} | {row.auroc:.2f} | {rates} |")
    return "\n".join(lines)
