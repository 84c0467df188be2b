"""OAL's energy loss on a step's outliers: images, and latents that follow the student."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oal_jax.config import Config
from oal_jax.config.rules import validate
from oal_jax.errors import UserError
from oal_jax.methods import oal, registry
from oal_jax.methods.oal import Adaptation
from oal_jax.models.conv import Conv, batch_norm
from oal_jax.models.resnet import ResNet

RESNET = ResNet(num_classes=3, width=2, stem="small")
IMAGE, LATENT, TEACHER, ROWS = (8, 8, 1), (4, 4, 2), 6, 8


class Tiny(nn.Module):
    """A student that compiles at once: a convolution, the mean, the head."""

    feature_width: int = 6

    @nn.compact
    def __call__(self, images, train=False, statistics=None):
        mask = None if statistics is None else statistics[:, None, None, None]
        x = Conv(self.feature_width, 3, 2, name="conv1")(images)
        x = nn.relu(batch_norm(train, True)(name="bn1")(x, mask=mask))
        features = jnp.mean(x, axis=(1, 2))
        return nn.Dense(3, name="fc")(features), features


NET = Tiny()


def method(**more):
    return oal.energy(
        more.pop("model", NET),
        IMAGE,
        TEACHER,
        more.pop("latent_shape", LATENT),
        logit_weight=1.0,
        feature_weight=1.0,
        energy_weight=0.5,
        adapter_weight=0.05,
        ramp_steps=(-2.0, -1.0),
        feature_outliers=False,
        **more,
    )


def batch(seed: int = 0):
    rng = np.random.default_rng(seed)
    drawn = {
        "image": rng.uniform(size=(ROWS, *IMAGE)),
        "teacher_logits": rng.normal(size=(ROWS, 3)),
        "teacher_features": rng.normal(size=(ROWS, TEACHER)),
        "latent": rng.normal(size=(ROWS, *LATENT)),
        "outlier_latent": rng.normal(size=(ROWS, *LATENT)),
        "outlier_image": rng.uniform(size=(ROWS // 2, *IMAGE)),
    }
    found = {name: jnp.asarray(value, jnp.float32) for name, value in drawn.items()}
    return found | {"label": jnp.arange(ROWS, dtype=jnp.int32) % 3}


def loss_and_metrics(made, data):
    params, model_state = made.init(jax.random.key(0))
    step, key = jnp.zeros((), jnp.int32), jax.random.key(1)
    grads, (_, metrics) = jax.jit(jax.grad(made.loss, has_aux=True))(
        params, model_state, data, step, key
    )
    return grads, metrics


def latent_energy(adaptation: Adaptation) -> float:
    return float(
        loss_and_metrics(method(adaptation=adaptation), batch())[1]["outlier_energy_latent"]
    )


def test_of_each_few_the_one_most_like_id_is_kept():
    """By the energies of latents taken one by one."""
    alone, made = [], method()
    loss, variables = jax.jit(made.loss), made.init(jax.random.key(0))
    for row in range(ROWS):
        data = batch()
        data["outlier_latent"] = data["outlier_latent"][row : row + 1]
        _, (_, metrics) = loss(*variables, data, jnp.zeros((), jnp.int32), jax.random.key(1))
        alone.append(float(metrics["outlier_energy_latent"]))
    for of in (1, 2, 4, ROWS):
        kept = np.reshape(alone, (-1, of)).max(1)
        assert latent_energy(Adaptation(of)) == pytest.approx(kept.mean(), abs=1e-5)


def test_steps_move_latents_towards_id_or_away_from_it():
    as_sampled = latent_energy(Adaptation())
    towards = [latent_energy(Adaptation(steps=n, rate=0.02)) for n in (1, 3)]
    assert as_sampled < towards[0] < towards[1]
    assert latent_energy(Adaptation(steps=1, rate=-0.02)) < as_sampled


def test_adapted_latents_carry_no_gradient_to_the_adapter():
    plain, _ = loss_and_metrics(method(), batch())
    adapted, _ = loss_and_metrics(method(adaptation=Adaptation(2, 2, 0.1)), batch())
    for a, b in zip(*(jax.tree.leaves(g["adapter"]) for g in (plain, adapted)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_outlier_images_reach_the_whole_student_and_no_statistics():
    data = batch()
    without, with_images = method(latent_shape=None), method(latent_shape=None, image_outliers=True)
    _, metrics = loss_and_metrics(with_images, data)
    params, model_state = with_images.init(jax.random.key(0))
    energies = jax.nn.logsumexp(
        NET.apply(
            {"params": params["student"], **model_state["student"]},
            jnp.concatenate([data["image"], data["outlier_image"]]),
            train=True,
            statistics=jnp.arange(ROWS + ROWS // 2) < ROWS,
            mutable=["batch_stats"],
        )[0][0],
        axis=-1,
    )
    assert metrics["outlier_energy_image"] == pytest.approx(float(energies[ROWS:].mean()), abs=1e-5)
    assert metrics["id_energy"] == pytest.approx(float(energies[:ROWS].mean()), abs=1e-5)
    slopes = []
    for seed in (0, 1):  # other images, another gradient of the first layer
        data["outlier_image"] = batch(seed)["outlier_image"]
        grads, _ = loss_and_metrics(with_images, data)
        slopes.append(np.asarray(grads["student"]["conv1"]["kernel"]))
    assert np.abs(slopes[0] - slopes[1]).max() > 1e-5
    states = []
    for made in (without, with_images):
        _, (state, _) = made.loss(
            *made.init(jax.random.key(0)), data, jnp.zeros((), jnp.int32), jax.random.key(1)
        )
        states.append(jax.tree.leaves(state["student"]))
    for a, b in zip(*states, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_latents_enter_after_a_stage_and_train_what_lies_behind_it():
    data, stage = batch(), 2
    made = method(model=RESNET, latent_stage=stage, image_outliers=True)
    params, model_state = made.init(jax.random.key(0))
    student = {"params": params["student"], **model_state["student"]}
    plain, left = RESNET.apply(student, data["image"], mutable=["maps"])
    maps = left["maps"]["stage2"][0]
    for found, wanted in zip(RESNET.apply(student, maps, after=stage), plain, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)

    slopes, step, key = [], jnp.zeros((), jnp.int32), jax.random.key(1)
    grad = jax.jit(jax.grad(made.loss, has_aux=True))
    for seed in (1, 0):
        data["outlier_latent"] = batch(seed)["outlier_latent"]
        grads, (state, metrics) = grad(params, model_state, data, step, key)
        slopes.append(grads)
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), *slopes)
    assert moved["student"]["layer3_0"]["conv1"]["kernel"] > 1e-6
    assert (
        moved["student"]["layer2_0"]["conv1"]["kernel"] == moved["adapter"]["conv1"]["kernel"] == 0
    )
    assert set(state["student"]) == {"batch_stats"}

    adapter = oal.make_adapter(RESNET, IMAGE, stage)
    mapped = adapter.apply({"params": params["adapter"]}, data["outlier_latent"])
    assert mapped.shape == maps.shape
    energy = jax.nn.logsumexp(RESNET.apply(student, mapped, after=stage)[0], axis=-1)
    assert metrics["outlier_energy_latent"] == pytest.approx(float(energy.mean()), abs=1e-5)
    # The adapter's target is the map of the ID images as the step computes it.
    shown = jnp.concatenate([data["image"], data["outlier_image"]])
    among, kept = jnp.arange(len(shown)) < ROWS, ["maps", "batch_stats"]
    _, left = RESNET.apply(student, shown, train=True, statistics=among, mutable=kept)
    predicted = adapter.apply({"params": params["adapter"]}, data["latent"])
    error = ((predicted - left["maps"]["stage2"][0][:ROWS]) ** 2).sum(-1).mean()
    assert metrics["adapter_error"] == pytest.approx(float(error), rel=1e-4)


def test_latents_enter_a_resnet_alone():
    config = Config()
    for stage, architecture in ((4, "resnet"), (-1, "resnet"), (1, "densenet")):
        config.method.latent_stage, config.student.architecture = stage, architecture
        config.student.depth = 40 if architecture == "densenet" else 18
        with pytest.raises(UserError, match=f"latent_stage={stage} must be 0, or a stage of"):
            validate(config)


def test_a_choice_of_each_few_wants_whole_groups():
    config = Config()
    config.method.adapt.of = 3
    with pytest.raises(UserError, match=r"adapt\.of=3 must divide the 128 latent outliers"):
        validate(config)
    config.method.adapt.of, config.train.accumulate = 4, 2
    validate(config)


def test_the_control_that_decodes_noise_samples_nothing():
    config = Config()
    config.outliers.image_share = 0.25
    wanted = {"decoded": True, "decoded_half": True, "decoded_random": False, "procedural": False}
    for images, reads in wanted.items():
        config.outliers.images = images
        validate(config)
        assert registry.reads_sampled(config) == reads
