"""Stage `outliers`: per-class boundary outliers in the teacher's feature space.

`outliers.boundary`: sampled around the edge of each class by k-NN distances, or ID features moved
over the teacher's decision boundary. The first are written whole, or (`outliers.lazy`) as what any
one of them is computed from when it is drawn: for CIFAR-100 at the paper's sizes, 100 x 10,000 x
768, that is 27 MB instead of 3.07 GB.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt32
from tqdm import tqdm

from oal_jax.config import Config, Crossing, Knn
from oal_jax.errors import UserError
from oal_jax.generator import conditioning, stable_diffusion
from oal_jax.outliers.crossing import MAX_STEPS, cross_class
from oal_jax.outliers.knn import redraw, sample_class, select_class
from oal_jax.runtime import artifacts, distributed
from oal_jax.runtime.keys import at_step
from oal_jax.runtime.ops import unit
from oal_jax.stages import generator, teacher_head
from oal_jax.stages.context import Context

_FILE = "outliers.safetensors"
_LAZY_FILE = "lazy_outliers.safetensors"


@flax.struct.dataclass
class LazyOutliers:
    """A pool of C * n outliers as indices, one class after the other; `take` computes rows of it.

    A pytree of arrays: it is put on the devices, and handed to a step, as an array is.
    """

    points: Float[Array, "C b d"]  # the boundary of each class, over the noise's sigma
    anchor: Int[Array, "C n"]  # which of them each outlier is around
    noise_row: Int[Array, "C n"]  # which row of its repeat's noise
    factor: Float[Array, "C n"]  # what gives it its norm
    per_repeat: Int[Array, ""]  # outliers a repeat: outlier i of a class is of i // per_repeat
    keys: UInt32[Array, "C k"]  # data of each class's key

    @property
    def shape(self) -> tuple[int, int]:
        """Of the array that it stands for: (C * n, d)."""
        return self.anchor.shape[0] * self.anchor.shape[1], self.points.shape[2]


Pool = Float[Array, "m d"] | LazyOutliers


def take(pool: Pool, rows: Int[Array, " q"]) -> Float[Array, "q d"]:
    """Rows of a pool, of either form; pure, for use inside jit."""
    return _redrawn(pool, rows) if isinstance(pool, LazyOutliers) else pool[rows]


@jax.jit
def _redrawn(pool: LazyOutliers, rows: Int[Array, " q"]) -> Float[Array, "q d"]:
    classes, numbers = jnp.divmod(rows, pool.anchor.shape[1])

    def one(c, i):
        return redraw(
            jax.random.wrap_key_data(pool.keys[c]),
            pool.points[c, pool.anchor[c, i]],
            i // pool.per_repeat,
            pool.noise_row[c, i],
            pool.factor[c, i],
        )

    return jax.vmap(one)(classes, numbers)


def sampling(knn: Knn) -> dict[str, Any]:
    """What `sample_class` and `select_class` are told, by the config."""
    return {
        "k": knn.neighbour,
        "count": knn.boundary,
        "anchors": knn.anchors,
        "sigma": knn.sigma,
        "noise_rows": knn.noise_rows,
        "keep": knn.keep,
        "repeats": knn.repeats,
        "selection": knn.selection,
    }


def run(context: Context) -> list[Path]:
    """Write `outliers.safetensors`: `outliers` (C, n, d) float32 and `labels` (C,) int32.

    Of those moved over the boundary also `steps` (C, n) int32, each one's until it crossed.
    Or `lazy_outliers.safetensors`: the fields of `LazyOutliers`.
    """
    config, directory = context.config.outliers, context.directory("outliers")
    knn = config.knn
    classes = _class_features(context)
    # The scale of what they replace: a row of the text encoder's token table.
    scale = _token_norms(context) if knn.scale_by_token else np.ones(len(classes), np.float32)
    if config.boundary == "crossing":
        return [_write_crossed(context, classes, scale)]
    keys = [at_step(context.key, "outliers", c) for c in range(len(classes))]
    keys = np.stack([jax.random.key_data(key) for key in keys])
    sample = select_class if config.lazy else sample_class

    def of_class(key, features):
        return sample(jax.random.wrap_key_data(key), features, **sampling(knn))

    directions = np.asarray(unit(classes))
    sampled = _class_by_class(context, of_class, (keys, directions), "k-NN outliers")
    if config.lazy:
        points, anchor, noise_row, factor = sampled
        pool = LazyOutliers(
            points,
            anchor,
            noise_row,
            factor * scale[:, None].astype(np.float32),
            np.int32(knn.anchors * knn.keep),
            keys,
        )
        artifacts.write_tensors(directory / _LAZY_FILE, vars(pool))
        return [directory / _LAZY_FILE]
    outliers = sampled
    if knn.scale_by_token:
        outliers = outliers * scale[:, None, None]
    labels = np.arange(len(outliers), dtype=np.int32)
    artifacts.write_tensors(directory / _FILE, {"outliers": outliers, "labels": labels})
    return [directory / _FILE]


def _class_by_class(
    context: Context, function: Callable[..., Any], arguments: tuple[np.ndarray, ...], name: str
) -> Any:
    """`function` of the rows of each class, stacked: a class a device at a time.

    Every device runs the program for one class: on any number of them the draws are the same, the
    numbers but for rounding, and the memory is that of one class.

    Args:
      function: pure; one class's rows to a pytree of arrays.
      arguments: arrays (C, ...).
      name: what the bar says.
    """
    mesh, classes = context.mesh, len(arguments[0])
    sharding = distributed.over_data(mesh)

    def one(*rows):
        return jax.tree.map(lambda a: a[None], function(*(row[0] for row in rows)))

    run = jax.jit(
        jax.shard_map(
            one, mesh=mesh, in_specs=sharding.spec, out_specs=sharding.spec, check_vma=False
        )
    )
    at_once, found = mesh.shape["data"], []
    for start in tqdm(range(0, classes, at_once), desc=name, unit="step"):
        # The last step's spare devices repeat its last class.
        rows = np.minimum(np.arange(start, start + at_once), classes - 1)
        drawn = run(*distributed.place(tuple(a[rows] for a in arguments), sharding))
        found.append(jax.tree.map(distributed.to_host, drawn))
    return jax.tree.map(lambda *parts: np.concatenate(parts)[:classes], *found)


def _write_crossed(
    context: Context, classes: Float[np.ndarray, "C n d"], scale: Float[np.ndarray, " C"]
) -> Path:
    """Write the outliers of `outliers.boundary=crossing`; rows of unit norm times `scale`."""
    crossing = context.config.outliers.crossing
    kernel, bias = teacher_head.load(context)

    def of_class(label, features):
        crossed, _, taken = cross_class(features, kernel, bias, label, **walk(crossing))
        return unit(crossed), taken

    labels = np.arange(len(classes), dtype=np.int32)
    directions, steps = _class_by_class(context, of_class, (labels, classes), "boundary crossing")
    stuck = int(np.sum(steps > MAX_STEPS))
    if stuck:
        raise UserError(
            f"{stuck} features are still on their side of the decision boundary after {MAX_STEPS}"
            f" steps of outliers.crossing.step={crossing.step}; raise it, or set"
            " outliers.crossing.exact=True"
        )
    path = context.directory("outliers") / _FILE
    outliers = directions * scale[:, None, None]
    artifacts.write_tensors(path, {"outliers": outliers, "labels": labels, "steps": steps})
    return path


def walk(crossing: Crossing) -> dict[str, Any]:
    """What `cross_class` is told, by the config."""
    return {
        "count": crossing.points,
        "step": crossing.step,
        "steps_after": crossing.steps_after,
        "exact": crossing.exact,
    }


def flat(context: Context) -> Pool:
    """All outliers of all classes, (C * n, d), one class after the other."""
    directory = context.directory("outliers")
    if context.config.outliers.lazy:
        return LazyOutliers(**artifacts.read_tensors(directory / _LAZY_FILE))
    outliers = artifacts.read_tensors(directory / _FILE)["outliers"]
    return outliers.reshape(-1, outliers.shape[-1])


def of_classes(
    context: Context, labels: Int[np.ndarray, " q"], numbers: Int[np.ndarray, " q"]
) -> Float[np.ndarray, "q d"]:
    """Outlier `numbers` of the classes `labels`, each in [0, `per_class`)."""
    pool = flat(context)
    return np.asarray(take(pool, labels * per_class(context.config) + numbers))


def per_class(config: Config) -> int:
    """Outliers of a class."""
    knn = config.outliers.knn
    if config.outliers.boundary == "crossing":
        return config.outliers.crossing.points
    return knn.repeats * knn.anchors * knn.keep


def shapes(config: Config, classes: int, width: int) -> Any:
    """A pool's shapes and types, in place of its arrays."""
    of = jax.ShapeDtypeStruct
    each = per_class(config)
    if not config.outliers.lazy:
        return of((classes * each, width), jnp.float32)
    key = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))
    return LazyOutliers(
        of((classes, config.outliers.knn.boundary, width), jnp.float32),
        *(of((classes, each), dtype) for dtype in (jnp.int32, jnp.int32, jnp.float32)),
        of((), jnp.int32),
        of((classes, *key.shape), jnp.uint32),
    )


def spread(context: Context, count: int) -> Float[np.ndarray, "q d"]:
    """About `count` outliers at equal distances in the pool: some of every class."""
    pool = flat(context)
    rows = np.arange(0, pool.shape[0], max(1, pool.shape[0] // count))
    return np.asarray(take(pool, rows))


def first_of_classes(labels: Int[np.ndarray, " n"], count: int) -> Int[np.ndarray, " m"]:
    """Where the first `count` images of each class stand, in data order."""
    found = [np.flatnonzero(labels == c)[:count] for c in range(labels.max() + 1)]
    return np.sort(np.concatenate(found))


def _class_features(context: Context) -> Float[np.ndarray, "C n d"]:
    """The features that stand for each class: the first in data order."""
    count = context.config.outliers.knn.features_per_class
    source = artifacts.read_tensors(context.directory("features") / "features.safetensors")
    features, labels = source["features"], source["labels"]
    smallest = np.bincount(labels).min()
    if smallest < count:
        raise UserError(
            f"a class of {context.benchmark.id_set} has {smallest} training images, fewer than"
            f" outliers.knn.features_per_class={count}; lower that"
        )
    return np.stack([features[labels == c][:count] for c in range(labels.max() + 1)])


def _token_norms(context: Context) -> Float[np.ndarray, " C"]:
    """The norm of each class word, as `outliers.knn.token` has it."""
    if context.config.outliers.knn.token == "input_table":
        return generator.token_norms(context)
    # As the script of arXiv 2406.16525's code makes them: all positions count, padding too.
    sd, params = generator.load(context, components=("text_encoder",))
    names = [conditioning.prompt_word(word)[0] for word in generator.class_words(context)]
    ids = stable_diffusion.tokenize(sd, names)
    states = stable_diffusion.encode_prompts(sd, params, ids)
    return np.asarray(jnp.linalg.norm(jnp.mean(states, axis=1), axis=-1), np.float32)
