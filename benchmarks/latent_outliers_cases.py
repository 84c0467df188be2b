"""The cases of suite `latent_outliers`: what trains the student, and on which outliers."""

from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.cases import Case
from oal_jax.config import PROCEDURAL


def _oal(source: str, **more: Any) -> Case:
    changes = {key.replace("__", "."): value for key, value in more.items()}
    return Case({"method.name": "oal", "outliers.source": source, **changes})


def _times(key: str, factor: float) -> Callable[[Mapping[str, Any]], int]:
    return lambda flat: max(1, round(factor * flat[key]))


_GUIDED = {"latents__guide__by": "energy"}
_MIXTURE = {"latents__kind": "mixture"}
_IMAGES = {"outliers__images": "decoded", "outliers__image_share": 0.25}
# Shapes and textures: neither data nor a generator is asked.
_PROCEDURAL = {"outliers__images": PROCEDURAL, "outliers__image_share": 0.25}
_SHAPES = _PROCEDURAL | {"outliers__image_share": 0.125}
_SELECTED = {
    "latents__select__oversample": 3.0,
    "latents__select__max_msp": 0.9,
    "latents__select__max_energy_percentile": 50.0,
    "latents__select__diverse": True,
}
# The generator's word embeddings are what the teacher's features are trained towards.
_ALIGNED = {"teacher__train": True, "teacher__alignment": 0.1}
# A generator that has learned what the teacher's features mean.
_TOLD = {"generator__train": True, "generator__feature_share": 0.5}
# A value that is a function gets the flat config of all other changes.
CASES: Mapping[str, Case] = {
    "kd": Case({"method.name": "kd"}),
    # As long as `pixel` takes.
    "kd-longer": Case({"method.name": "kd", "train.epochs": _times("train.epochs", 1.5)}),
    "oal-none": _oal("none"),
    "oal-random": _oal("random"),
    "oal-random-half": _oal("random", method__outlier_batch=_times("train.batch_size", 0.5)),
    "oal-knn": _oal("knn"),
    "oal-crossing": _oal("knn", outliers__boundary="crossing"),
    "oal-diffusion": _oal("diffusion"),
    "oal-mixed": _oal("mixed"),
    "oal-noised": _oal("latents", latents__kind="noised"),
    "oal-class": _oal("latents", latents__kind="class"),
    "oal-half-random": _oal("half_random"),
    "oal-latents": _oal("latents"),
    "oal-partial": _oal("latents", latents__kind="partial"),
    "oal-mixture": _oal("latents", **_MIXTURE),
    "oal-aligned": _oal("latents", **_ALIGNED),
    "oal-guided": _oal("latents", **_GUIDED),
    "oal-guided-knn": _oal("latents", latents__guide__by="knn"),
    "oal-guided-both": _oal("latents", latents__guide__by="both"),
    "oal-guided-residual": _oal("latents", **_GUIDED, adapter__architecture="residual"),
    "oal-guided-selected": _oal("latents", **_GUIDED, **_SELECTED),
    "oal-guided-adapted": _oal("latents", **_GUIDED, method__adapt__of=2, method__adapt__steps=2),
    "oal-random-adapted": _oal("random", method__adapt__of=2, method__adapt__steps=2),
    "oal-guided-stage2": _oal("latents", **_GUIDED, method__latent_stage=2),
    "oal-random-stage2": _oal("random", method__latent_stage=2),
    "oal-guided-mixed": _oal("latents_mixed", **_GUIDED),
    "oal-told": _oal("latents", **_TOLD),
    "oal-told-crossing": _oal("latents", outliers__boundary="crossing", **_TOLD),
    "oal-crossing-guided": _oal("latents", outliers__boundary="crossing", **_GUIDED),
    "oal-images": _oal("random", **_IMAGES),
    "oal-images-guided": _oal("random", **_IMAGES, **_GUIDED),
    "oal-images-told": _oal("random", **_IMAGES, **_TOLD),
    "oal-images-told-crossing": _oal("random", outliers__boundary="crossing", **_IMAGES, **_TOLD),
    "oal-images-mixture": _oal("random", **_IMAGES, **_MIXTURE),
    "oal-images-noised": _oal("random", **_IMAGES, latents__kind="noised"),
    "oal-images-random": _oal("random", **_IMAGES | {"outliers__images": "decoded_random"}),
    "oal-images-half": _oal("random", **_IMAGES | {"outliers__images": "decoded_half"}, **_GUIDED),
    "oal-images-procedural": _oal("random", **_PROCEDURAL),
    "oal-none-shapes": _oal("none", **_SHAPES),
    "oal-random-shapes": _oal("random", **_SHAPES),
    "oal-guided-shapes": _oal("latents", **_GUIDED, **_SHAPES),
    "oal-guided-knn-shapes": _oal("latents", latents__guide__by="knn", **_SHAPES),
    "oal-guided-stage2-shapes": _oal("latents", **_GUIDED, **_SHAPES, method__latent_stage=2),
    "oal-random-stage2-shapes": _oal("random", **_SHAPES, method__latent_stage=2),
    "oal-guided-selected-shapes": _oal("latents", **_GUIDED, **_SELECTED, **_SHAPES),
    "pixel": Case({"method.name": "pixel"}),
}
