"""Suite `latent_map`: the student's map of latents beside what decoder and student make of them.

    python -m benchmarks.run --suite latent_map --output results.json [--seeds 0,1,2]
        [--cases random,guided] [--workdir runs/latent_map] [--config.a.b=VALUE ...]

Latent outliers are never decoded: a small map A, trained on ID images, says what features the
student has of a latent. Here they are decoded after all, and the student sees them. A row a case,
seed and kind of latents, up to 500 of each:

    id        latents of ID test images
    noised    the same plus N(0, 1)
    normal    N(0, 1)
    outliers  those that the run has sampled

Means of `cosine`, of the two features, and of `energy_map` and `energy_pixels`, -logsumexp of the
logits by A and by the pixels; `auroc_map` and `auroc_pixels` of the kind against `id` by these
energies: what the training has made of latents, and what of it is true of images.
"""

import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float
from oal_jax.outliers.selection import log_partition

from benchmarks import cases
from benchmarks.cases import Case, markdown, spread
from benchmarks.run import row
from oal_jax.config import flatten, unflatten
from oal_jax.data.sources import ImageSet
from oal_jax.evaluation.metrics import auroc
from oal_jax.methods import oal
from oal_jax.outliers.knn import unit
from oal_jax.runtime import artifacts, distributed
from oal_jax.runtime.keys import named
from oal_jax.stages import adapter, generator, train
from oal_jax.stages import run as pipeline
from oal_jax.stages.context import Context, apply_in_batches, classifier

SUITE = "latent_map"
_GUIDED = {"outliers.source": "latents", "latents.guide.by": "energy"}
CASES: Mapping[str, Case] = {
    "random": Case({"outliers.source": "random"}),
    "noised": Case({"outliers.source": "latents", "latents.kind": "noised"}),
    "guided": Case(_GUIDED),
    "guided-stage2": Case(_GUIDED | {"method.latent_stage": 2}),
}
KINDS = ("id", "noised", "normal", "outliers")
NUMBERS = ("cosine", "energy_map", "energy_pixels", "auroc_map", "auroc_pixels")
_EXAMPLES = 500

Side = tuple[Float[np.ndarray, "n d"], Float[np.ndarray, " n"]]  # features and energies


def run(argv: Sequence[str]) -> list[dict[str, Any]]:
    """Train every case for every seed, compare; print means over the seeds; return the rows."""
    plan = cases.parse(SUITE, CASES, argv, {"outliers.image_share": 0.0})
    rows = []
    for seed in plan.seeds:
        done: list[Path] = []
        for name in plan.cases:
            print(f"--- {name}, seed {seed}", flush=True)
            workdir = plan.workdir / f"seed{seed}" / name
            config = unflatten(flatten(plan.base) | dict(CASES[name].changes) | {"seed": seed})
            pipeline.run(config, workdir, only="train", reuse=tuple(done))
            done.append(workdir)
            start = time.perf_counter()
            found = compare(pipeline.resolve(workdir))
            seconds = time.perf_counter() - start
            for kind, numbers in found.items():
                rows.append(row(SUITE, name, [seconds], seed=seed, kind=kind, **numbers))
    print(summary(rows))
    return rows


def compare(context: Context) -> dict[str, dict[str, float]]:
    """Kind of latents to its `NUMBERS`, for a run whose student is trained."""
    sd, parameters = generator.load(context, components=("vae",))
    data = context.images("test", limit=_EXAMPLES)
    of_id = generator.encode(context, sd, parameters, data.images)
    noise = np.asarray(jax.random.normal(named(context.key, "probes"), of_id.shape))
    path = context.directory("latents") / "latents.safetensors"
    sampled = artifacts.read_tensors(path)["latents"]
    few = sampled[adapter.evenly(len(sampled), _EXAMPLES)]
    kinds = dict(zip(KINDS, (of_id, of_id + noise, noise, few), strict=True))
    by_map, by_pixels = _sides(context, data)
    found, energies = {}, {}
    for kind, latents in kinds.items():
        decoded = generator.decode(context, sd, parameters, latents, data.image_shape)
        (mapped, here), (seen, there) = by_map(latents), by_pixels(decoded)
        energies[kind] = here, there
        cosine = np.sum(np.asarray(unit(mapped)) * np.asarray(unit(seen)), axis=-1)
        means = cosine.mean(), here.mean(), there.mean()
        areas = (auroc(a, b) for a, b in zip(energies["id"], energies[kind], strict=True))
        found[kind] = dict(zip(NUMBERS, map(float, (*means, *areas)), strict=True))
    return found


def _sides(context: Context, data: ImageSet):
    """Functions of latents (n, C, h, w) and of uint8 images to the student's `Side`."""
    config, mesh = context.config, context.mesh
    params, model_state = train.load(context)
    net = train.student(config, len(data.class_names))
    stage, batch = config.method.latent_stage, config.evaluation.batch_size
    into_student = oal.make_adapter(net, data.image_shape, stage)

    @jax.jit
    def forward(groups, latents):
        params, model_state = groups
        mapped = into_student.apply({"params": params["adapter"]}, latents)
        return oal.outputs_of_mapped(net, params, model_state, mapped, stage)

    groups = distributed.replicate((params, model_state), mesh)
    student = classifier(net, mesh)(train.student_variables(params, model_state))

    def side(function, inputs) -> Side:
        logits, features = apply_in_batches(function, inputs, batch, mesh)
        return features, -np.asarray(log_partition(logits))

    mapped = partial(forward, groups)
    return lambda z: side(mapped, np.moveaxis(z, 1, -1)), lambda images: side(student, images)


def summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: a line a case and kind of latents, mean +- std over the seeds."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for found in rows:
        groups.setdefault((found["case"], found["kind"]), []).append(found)
    lines = [
        [
            *key,
            *(
                spread([r[n] * (100 if n.startswith("auroc") else 1) for r in members])
                if n != "cosine"
                else f"{np.mean([r[n] for r in members]):.2f}"
                for n in NUMBERS
            ),
        ]
        for key, members in groups.items()
    ]
    return markdown(["case", "latents", *(n.replace("_", ", ") for n in NUMBERS)], lines)
