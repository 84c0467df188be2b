"""Stage `adapter`: A_t, a small map from latents to the teacher's features; and how far it holds.

Guidance (`latents.guide`) and selection (`latents.select`) ask it what decoder and teacher would
say. It is a regression onto the teacher's raw features, on latents of ID images with noise of small
random levels; the teacher's own linear head turns its features into logits. Far from ID it
extrapolates: `adapter.json` compares it there with the teacher on decoded latents.
"""

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float, Int

from oal_jax.generator import guidance
from oal_jax.methods.base import Method, split_variables
from oal_jax.models import latent_features
from oal_jax.outliers.selection import log_partition
from oal_jax.runtime import artifacts, batched, distributed
from oal_jax.runtime.keys import at_step, named
from oal_jax.runtime.ops import unit
from oal_jax.scores import compute
from oal_jax.stages import generator, latent_inputs, outliers, teacher, teacher_head
from oal_jax.stages.context import Context, outputs_of_set
from oal_jax.training import loop, session
from oal_jax.training.optimizer import adamw
from oal_jax.training.state import init_state, make_train_step

_FILE = "adapter.safetensors"
_REFERENCE = "reference.safetensors"
_REPORT = "adapter.json"
_PROBES = 500  # latents of each kind that the report compares


class Adapter(NamedTuple):
    """A trained A_t and what goes with it, on the host."""

    module: Any
    params: dict[str, Any]
    kernel: Float[np.ndarray, "d k"]  # of the teacher's head
    bias: Float[np.ndarray, " k"]
    bank: Float[np.ndarray, "n d"]  # unit features of ID training images, by the teacher
    validation_energy: Float[np.ndarray, " v"]  # logsumexp of ID validation latents, by A_t

    def steering(self, strength: float) -> guidance.Steering:
        """What a guide reads."""
        parts = self.params, self.kernel, self.bias, self.bank
        return guidance.Steering(*parts, np.float32(strength))


def run(context: Context) -> list[Path]:
    """Write the map, what it is compared with, and the report.

    `adapter.safetensors`: the parameters by their path. `reference.safetensors`: `kernel` (d, K)
    and `bias` (K,) of the teacher's head, `bank` (n, d) unit ID features, `validation_energy`.
    `adapter.json`: see `_report`.
    """
    stage = context.directory("adapter")
    sd, vae = generator.load(context, components=("vae",))
    rows, features = _targets(context)
    data = context.train_images()
    latents = latent_inputs.encode_rows(context, sd, vae, data, rows, jnp.float16)
    params = _train(context, latents, features)
    path = stage / _FILE
    flat = {".".join(k): v for k, v in flatten_dict(params).items()}
    artifacts.write_tensors(path, flat)

    kernel, bias = teacher_head.load(context)
    bank = np.asarray(unit(features[evenly(len(features), context.config.adapter.bank)]))
    found = Adapter(module(context), params, kernel, bias, bank, np.zeros(0, np.float32))
    validation = context.opened("validation")
    every = np.arange(validation.examples)
    of_validation = latent_inputs.encode_rows(context, sd, vae, validation, every)
    energy = np.asarray(log_partition(outputs(context, found, of_validation)[1]))
    reference = stage / _REFERENCE
    artifacts.write_tensors(
        reference, {"kernel": kernel, "bias": bias, "bank": bank, "validation_energy": energy}
    )
    report = stage / _REPORT
    artifacts.write_json(report, _report(context, found, sd, vae, validation, of_validation))
    return [path, reference, report]


def load(context: Context) -> Adapter:
    """What `run` wrote."""
    stage = context.directory("adapter")
    flat = artifacts.read_tensors(stage / _FILE)
    params = unflatten_dict({tuple(name.split(".")): v for name, v in flat.items()})
    return Adapter(module(context), params, **artifacts.read_tensors(stage / _REFERENCE))


def module(context: Context):
    """The network of A_t."""
    config = context.config.adapter
    return latent_features.make(config.architecture, context.config.teacher.width, config.hidden)


def outputs(
    context: Context, adapter: Adapter, latents: Float[np.ndarray, "n c h w"]
) -> tuple[Float[np.ndarray, "n d"], Float[np.ndarray, "n k"]]:
    """(features, logits) that A_t and the teacher's head give latents."""

    @jax.jit
    def forward(given, latents):
        params, kernel, bias = given
        latents = distributed.shard_batch(jnp.moveaxis(latents, 1, -1), context.mesh)
        features = adapter.module.apply({"params": params}, latents)
        return features, features @ kernel + bias[None]

    given = distributed.replicate((adapter.params, adapter.kernel, adapter.bias), context.mesh)
    batch = context.config.evaluation.batch_size
    return batched.apply(partial(forward, given), [latents], batch, context.mesh)


def _targets(context: Context) -> tuple[Int[np.ndarray, " n"], Float[np.ndarray, "n d"]]:
    """Rows of the training images that A_t learns from, and the teacher's features of them."""
    config = context.config
    features = artifacts.read_tensors(context.directory("features") / "features.safetensors")
    features = features["features"]
    rows = np.arange(len(features))
    if not config.teacher.views:  # then only the first of each class passed through the teacher
        labels = context.train_images().labels
        rows = outliers.first_of_classes(labels, config.outliers.knn.features_per_class)
    chosen = evenly(len(rows), config.adapter.images or len(rows))
    return rows[chosen], features[chosen]


def evenly(size: int, count: int) -> Int[np.ndarray, " n"]:
    """`count` of `size` rows at equal distances: of all classes, in whatever order they stand."""
    count = min(size, count)
    return np.arange(count) * size // count


def _train(
    context: Context, latents: Float[np.ndarray, "n c h w"], features: Float[np.ndarray, "n d"]
) -> dict[str, Any]:
    """The parameters of A_t, which give raw features."""
    config, mesh, net = context.config.adapter, context.mesh, module(context)
    distributed.check_batch("adapter.batch_size", config.batch_size, mesh)
    mean = features.mean(axis=0)
    scale = np.float32(max(np.sqrt(np.mean((features - mean) ** 2)), 1e-6))
    arrays = {
        "latent": np.moveaxis(latents, 1, -1),
        "feature": (features - mean) / scale,  # of any teacher the loss of a constant is 1
    }
    plan = loop.Plan(len(latents), config.batch_size, config.epochs, log_every=50)
    optimizer = adamw(
        peak=config.learning_rate,
        steps=plan.steps,
        warmup=0.1,
        floor=1e-2,
        weight_decay=0.01,
        clip=1.0,
    )
    method = regression(net, arrays["latent"].shape[1:], config.noise)
    key = named(context.key, "adapter")

    def make_batch(arrays, indices, epoch, step):
        del epoch, step
        return {
            "latent": arrays["latent"][indices].astype(jnp.float32),
            "feature": arrays["feature"][indices],
        }

    state = session.train(
        make_train_step(method, optimizer, key),
        init_state(method, optimizer, key, mesh),
        arrays,
        make_batch,
        plan,
        workdir=context.workdir,
        directory=context.directory("adapter") / "checkpoints",
        name="adapter",
        key=key,
        mesh=mesh,
    )
    params = jax.tree.map(distributed.to_host, state.params["adapter"])
    last = params[latent_features.LAST]
    last = {"kernel": last["kernel"] * scale, "bias": last["bias"] * scale + mean}
    return params | {latent_features.LAST: last}


def regression(net: Any, latent_shape: tuple[int, int, int], noise: float) -> Method:
    """Train `net` (group "adapter") by the mean squared error of the features of noised latents.

    A batch has `latent` (b, h, w, c) and `feature` (b, d); each latent gets Gaussian noise of a
    standard deviation that is drawn from 0 to `noise`.
    """

    def init(key):
        params, rest = split_variables(net.init(key, jnp.zeros((1, *latent_shape))))
        return {"adapter": params}, {"adapter": rest}

    def loss(params, model_state, batch, step, key):
        del step
        latents = batch["latent"]
        shape = (latents.shape[0], 1, 1, 1)
        level = noise * jax.random.uniform(named(key, "level"), shape)
        noised = latents + level * jax.random.normal(named(key, "noise"), latents.shape)
        features = net.apply({"params": params["adapter"]}, noised)
        return jnp.mean((features - batch["feature"]) ** 2), (model_state, {})

    return Method(init, loss)


def _report(context: Context, adapter: Adapter, sd, vae, validation, of_validation):
    """A_t beside the teacher: on ID validation, and ever further from it.

    Of each kind of latents means over `examples`: `cosine` of the two features and `squared_error`
    over the teacher's squared length; `agreement`, the share of equal predictions; `norm` of the
    features and `energy`, -logsumexp of the logits, by either. The teacher sees the image itself
    (`id_validation`) or the decoded latent: `id_decoded`; `id_noised`, ID latents + N(0, 1);
    `normal`, N(0, 1).
    """
    forward, batch = teacher.load(context), context.config.evaluation.batch_size
    fields = ("features",)
    teachers, _ = outputs_of_set(forward, validation, batch, context.mesh, fields)
    ours = outputs(context, adapter, of_validation)
    found = {"id_validation": compare(*ours, teachers.features, teachers.logits)}
    few = of_validation[evenly(len(of_validation), _PROBES)]
    key = at_step(context.key, "adapter probes", 0)
    noise = np.asarray(jax.random.normal(key, few.shape))
    for name, latents in {"id_decoded": few, "id_noised": few + noise, "normal": noise}.items():
        images = generator.decode(context, sd, vae, latents, validation.image_shape)
        teachers = compute(forward, images, batch, fields, context.mesh)
        ours = outputs(context, adapter, latents)
        found[name] = compare(*ours, teachers.features, teachers.logits)
    return found


def compare(
    features: Float[Array, "n d"],
    logits: Float[Array, "n k"],
    teacher_features: Float[Array, "n d"],
    teacher_logits: Float[Array, "n k"],
) -> dict[str, Any]:
    """The means of `_report` for one kind of latents."""

    def sizes(values):
        return {name: round(float(np.mean(v)), 4) for name, v in values.items()}

    squares = np.sum((features - teacher_features) ** 2, axis=-1)
    lengths = [np.linalg.norm(f, axis=-1) for f in (features, teacher_features)]
    energies = [-np.asarray(log_partition(x)) for x in (logits, teacher_logits)]
    same = np.argmax(logits, axis=-1) == np.argmax(teacher_logits, axis=-1)
    named_means = {
        "cosine": np.sum(np.asarray(unit(features)) * np.asarray(unit(teacher_features)), axis=-1),
        "squared_error": squares.mean() / np.mean(lengths[1] ** 2),
        "agreement": same,
    }
    return {
        "examples": len(features),
        **sizes(named_means),
        "norm": sizes(dict(zip(("adapter", "teacher"), lengths, strict=True))),
        "energy": sizes(dict(zip(("adapter", "teacher"), energies, strict=True))),
    }
