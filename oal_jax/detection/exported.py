"""A detector as files that run without oal_jax: program, weights, description, model card."""

import datetime
import importlib.metadata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from jax.export import Exported

from oal_jax.detection.detector import Detector
from oal_jax.detection.parts import predict
from oal_jax.evaluation.tables import is_mean, read_csv
from oal_jax.report.html import markdown
from oal_jax.runtime import artifacts, writing
from oal_jax.stages import train
from oal_jax.stages.context import Context

FORMAT = "oal_jax detector"


PROGRAM, WEIGHTS, MODEL, CARD = (
    "detector.jax_export",
    "weights.safetensors",
    "model.json",
    "README.md",
)


# What JAX promises of its exported programs.
COMPATIBILITY = (
    "JAX loads an exported program for at least six months after the release that wrote it;"
    " for later, export again, or build the model from weights.safetensors"
)


def write(output: Path, detector: Detector, context: Context, platforms: Sequence[str]) -> int:
    """Write the folder, whole or not at all; returns its size in bytes.

    Raises:
      UserError: `output` can't be written.
    """
    with writing.whole_folder(output) as folder:
        _write(folder, detector, context, tuple(platforms))
    return sum(path.stat().st_size for path in output.iterdir())


def exported(detector: Detector, platforms: Sequence[str] = ("cpu", "cuda", "tpu")) -> Exported:
    """The detector as one program with its weights inside, for batches of any size.

    Returns:
      Takes uint8 images (b, h, w, c); gives label int32, confidence and ood_score float32, is_ood
      bool, each (b,). For one device; `.serialize()` makes bytes of it.
    """
    # On the host, so that the program is for one device wherever the arrays lie now.
    arrays = jax.tree.map(np.asarray, (detector.forward, dict(detector.state)))
    score, threshold = _row_by_row(detector.score), np.float32(detector.threshold)

    def call(images):
        forward, state = jax.tree.map(jnp.asarray, arrays)
        label, confidence, ood_score = predict(score, forward, state, images)
        return label, confidence, ood_score, ~(ood_score <= threshold)

    (batch,) = export.symbolic_shape("b")
    images = jax.ShapeDtypeStruct((batch, *detector.image_shape), jnp.uint8)
    return export.export(jax.jit(call), platforms=list(platforms))(images)


def _row_by_row(score):
    """The score of single rows, mapped over a batch of unknown size.

    Scores that work in blocks compare the batch's size with a block's, which a symbolic size does
    not allow.
    """

    def one(function):
        def of_row(state, *rest):
            *others, row = rest
            alone = jax.tree.map(lambda x: x[None], row)
            return jax.tree.map(lambda x: x[0], function(state, *others, alone))

        return lambda state, *rest: jax.vmap(lambda row: of_row(state, *rest[:-1], row))(rest[-1])

    return score._replace(score=one(score.score), perturb=score.perturb and one(score.perturb))


def _write(folder: Path, detector: Detector, context: Context, platforms: tuple[str, ...]) -> None:
    artifacts.write_bytes(folder / PROGRAM, bytes(exported(detector, platforms).serialize()))
    student = artifacts.read_tensors(context.directory("train") / train.STUDENT)
    of_student = ("params.student.", "state.student.")
    tensors = {f"student.{k}": v for k, v in student.items() if k.startswith(of_student)}
    tensors |= {f"score.{k}": np.asarray(v) for k, v in detector.state.items()}
    artifacts.write_tensors(folder / WEIGHTS, tensors | {"id_val_scores": detector.id_val_scores})
    described = _describe(detector, context, platforms)
    artifacts.write_bytes(folder / CARD, _card(detector, described, context).encode())
    described["files"] = {
        name: {"sha256": artifacts.sha256(folder / name), "bytes": (folder / name).stat().st_size}
        for name in (PROGRAM, WEIGHTS, CARD)
    }
    artifacts.write_json(folder / MODEL, described)


def _describe(detector: Detector, context: Context, platforms: tuple[str, ...]) -> dict[str, Any]:
    card = artifacts.read_json(context.directory("train") / train.CLASSIFIER)
    config = context.config
    return {
        "format": FORMAT,
        "version": importlib.metadata.version("oal-jax"),
        "class_names": list(detector.class_names),
        "image_shape": list(detector.image_shape),
        "image_type": "uint8",
        "outputs": ["label", "confidence", "ood_score", "is_ood"],
        "score": detector.score.name,
        "parameters": dict(detector.params),
        "threshold": detector.threshold,
        "keep_id": detector.keep_id,
        "id_validation_images": len(detector.id_val_scores),
        "architecture": card["architecture"],
        "trained_on": {
            "id_set": config.data.id_set,
            "source": config.data.source,
            "method": config.method.name,
            "epochs": config.train.epochs,
            "seed": config.seed,
        },
        "platforms": list(platforms),
        "versions": artifacts.versions(),
        "exported": datetime.date.today().isoformat(),
        "compatibility": COMPATIBILITY,
    }


def _card(detector: Detector, described: dict[str, Any], context: Context) -> str:
    h, w, c = detector.image_shape
    trained = described["trained_on"]
    written_by = described["versions"]["jax"]
    params = ", ".join(f"{k}={v}" for k, v in described["parameters"].items()) or "its defaults"
    return f"""# OOD detector: {markdown(trained["id_set"])}, {detector.score.name}

A classifier that says which images are unlike its training data (out-of-distribution, OOD).

- Trained on `{trained["id_set"]}` ({trained["source"]}) by method `{trained["method"]}`; epochs:
  {trained["epochs"]}, seed: {trained["seed"]}.
- Takes uint8 images of shape (n, {h}, {w}, {c}), for any n.
- Gives `label`, `confidence` (the largest softmax probability), `ood_score` (higher = more OOD) and
  `is_ood` (ood_score above {detector.threshold:.6g}).
- Score `{detector.score.name}` with {params}. The threshold keeps {detector.keep_id:.1%} of
  {len(detector.id_val_scores)} ID validation images; measure what it keeps of yours.
- Classes: {", ".join(map(markdown, detector.class_names))}.

## Use it

Needs `jax` (this was written by {written_by}) and `flatbuffers`, nothing else; runs on
{", ".join(described["platforms"])}:

```python
import jax, numpy as np
from jax import export
with open("{PROGRAM}", "rb") as file:
    detector = jax.jit(export.deserialize(bytearray(file.read())).call)
images = np.zeros((3, {h}, {w}, {c}), np.uint8)
label, confidence, ood_score, is_ood = detector(images)
```

`{MODEL}` has the class names, the threshold, the sha256 of each file and the versions; `{WEIGHTS}`
has the student (`student.*`) and what the score was fitted to (`score.*`).

{COMPATIBILITY}.

## Measured

{_measured(detector, context)}
"""


def _measured(detector: Detector, context: Context) -> str:
    """The score's rows of the report as a Markdown table, or that there are none."""
    report = context.directory("report")
    rows = []
    if (report / artifacts.MANIFEST).exists():
        rows = read_csv(artifacts.verified(report, "ood.csv"))
        rows = [row for row in rows if row.score == detector.score.name]
    if not rows:
        return f"The run did not measure `{detector.score.name}`."
    lines = [
        f"ID test accuracy {rows[0].id_accuracy:.2f} %. In percent; OOD is the positive class.",
        "",
        "| OOD set | group | AUROC | FPR at 95 % OOD TPR | FPR at 95 % ID TPR |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        name = f"**mean, {row.group}**" if is_mean(row) else markdown(row.dataset)
        rates = f"{row.fpr_at_95_ood_tpr:.2f} | {row.fpr_at_95_id_tpr:.2f}"
        lines.append(f"| {name} | {row.group} | {row.auroc:.2f} | {rates} |")
    return "\n".join(lines)
