"""Stage `adapter`: the map learns, its report is the formulas; who needs it, and what reruns."""

import functools
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from test_smoke import start

from oal_jax.config import Config, flatten, stages_before
from oal_jax.config.rules import validate
from oal_jax.errors import UserError
from oal_jax.methods import registry
from oal_jax.models import latent_features
from oal_jax.runtime import distributed
from oal_jax.stages import adapter, latents
from oal_jax.stages import run as pipeline
from oal_jax.stages.context import Context


def config_of(**changes):
    config = Config()
    for path, value in changes.items():
        *parents, name = path.split("__")
        setattr(functools.reduce(getattr, parents, config), name, value)
    return config


GUIDED = {"latents__guide__by": "energy"}
SELECTED = {"latents__select__oversample": 2.0, "latents__select__max_msp": 0.5}


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({}, False),
        (GUIDED, True),
        (SELECTED, True),
        (GUIDED | {"method__name": "kd"}, False),
        (GUIDED | {"method__name": "oe", "outliers__images": "decoded"}, True),
    ],
)
def test_the_stage_is_there_where_something_needs_it(changes, wanted):
    config = config_of(**changes)
    validate(config)
    planned = [stage.name for stage in pipeline.plan(config)]
    assert ("adapter" in planned) == wanted == ("adapter" in stages_before(config))
    if wanted:
        order = [planned.index(s) for s in ("generator", "features", "adapter", "latents")]
        assert order[0] < order[2] and order[1] < order[2] < order[3]


@pytest.mark.parametrize(
    ("prefix", "stages"),
    [
        ("adapter.", {"adapter"}),
        ("latents.guide.", {"latents"}),
        ("latents.select.", {"latents"}),
        ("outliers.crossing.", {"outliers"}),
        ("outliers.boundary", {"outliers"}),
        ("latents.kind", {"latents"}),
    ],
)
def test_new_keys_rerun_the_stages_that_read_them_alone(prefix, stages):
    keys = [key for key in flatten(Config()) if key.startswith(prefix)]
    assert keys
    for key in keys:
        reads = {
            stage.name
            for stage in pipeline.STAGES
            if any(pipeline._below(key, p) for p in stage.reads_config)
            and not any(pipeline._below(key, p[1:]) for p in stage.reads_config if p[0:1] == "-")
        }
        assert reads == stages | {"report"}


@pytest.mark.parametrize(
    ("source", "arrays"),
    [
        ("latents", {"outlier_latent", "latents"}),
        ("latents_mixed", {"outlier_latent", "latents"}),
        ("half_random", {"latents"}),
    ],
)
def test_the_new_sources_read_what_they_need(source, arrays):
    config = config_of(outliers__source=source)
    validate(config)
    assert set(registry.METHODS["oal"].arrays(config)) == arrays
    assert latents.learns_from_id_latents(config)


@pytest.mark.parametrize("architecture", ["conv", pytest.param("residual", marks=pytest.mark.slow)])
def test_the_map_learns_raw_features_of_any_scale(architecture, tmp_path):
    """Features that are a function of the latents, with a mean and a scale of their own."""
    config = config_of(
        adapter__architecture=architecture,
        adapter__epochs=12,
        adapter__batch_size=64,
        adapter__hidden=32,
        adapter__noise=0.1,
        teacher__width=6,
    )
    context = Context(config, tmp_path, distributed.make_mesh(), jax.random.key(0))
    rng = np.random.default_rng(0)
    z = rng.normal(size=(1536, 4, 4, 4)).astype(np.float32)
    weights = rng.normal(size=(4, 6)).astype(np.float32)
    features = 50 + 20 * np.tanh(z.mean(axis=(2, 3)) @ weights)
    params = adapter._train(context, z[:1024].astype(np.float16), features[:1024])
    assert params[latent_features.LAST]["bias"].mean() > 10  # it gives raw features
    kernel, bias = rng.normal(size=(6, 3)).astype(np.float32), np.ones(3, np.float32)
    empty = np.zeros((0, 6), np.float32)
    found = adapter.Adapter(adapter.module(context), params, kernel, bias, empty, empty[:, 0])
    out, logits = adapter.outputs(context, found, z[1024:])
    np.testing.assert_allclose(logits, out @ kernel + bias, rtol=1e-4, atol=1e-2)
    left = np.mean((out - features[1024:]) ** 2) / np.var(features[1024:], axis=0).mean()
    assert left < 0.2


def test_the_report_is_the_formulas():
    rng = np.random.default_rng(0)
    ours, theirs = rng.normal(size=(2, 20, 5)).astype(np.float32)
    a, b = rng.normal(size=(2, 20, 3)).astype(np.float32)
    found = adapter.compare(ours, a, theirs, b)
    lengths = [np.linalg.norm(f, axis=1) for f in (ours, theirs)]
    assert found["examples"] == 20
    assert found["cosine"] == pytest.approx(
        np.mean((ours * theirs).sum(1) / lengths[0] / lengths[1]), abs=1e-4
    )
    error = ((ours - theirs) ** 2).sum(1).mean() / (lengths[1] ** 2).mean()
    assert found["squared_error"] == pytest.approx(error, abs=1e-4)
    assert found["agreement"] == pytest.approx((a.argmax(1) == b.argmax(1)).mean(), abs=1e-4)
    assert found["norm"]["teacher"] == pytest.approx(lengths[1].mean(), abs=1e-4)
    energy = -np.log(np.exp(a).sum(1)).mean()
    assert found["energy"]["adapter"] == pytest.approx(energy, abs=1e-4)


def test_rows_at_equal_distances_are_of_every_class():
    np.testing.assert_array_equal(adapter.evenly(10, 4), [0, 2, 5, 7])
    np.testing.assert_array_equal(adapter.evenly(3, 8), [0, 1, 2])


@pytest.mark.parametrize("value", [0, 24])
def test_a_width_that_groups_do_not_divide_is_told(value):
    with pytest.raises(UserError, match=f"adapter.hidden={value} must be a multiple of 16"):
        validate(config_of(adapter__hidden=value))


@pytest.mark.parametrize("changes", [GUIDED, SELECTED, {"latents__kind": "partial"}])
def test_skipped_images_of_a_stream_are_told_where_rows_are_paired(changes):
    streamed = {"data__source": "folder", "data__root": "/sets", "data__stream": True}
    streamed |= {"teacher__views": 0, "outliers__source": "knn"}
    validate(config_of(**streamed, **changes))
    with pytest.raises(UserError, match=r"on_corrupt='skip'.* what is asked of latents"):
        validate(config_of(**streamed, **changes, data__on_corrupt="skip"))


def test_half_of_the_outliers_must_be_divided_by_the_microbatches():
    halved = {"outliers__source": "half_random", "train__accumulate": 4}
    validate(config_of(**halved, train__batch_size=64))
    with pytest.raises(UserError, match="halves the 60 outliers .* a multiple of 8"):
        validate(config_of(**halved, train__batch_size=60))


EVERYTHING = [
    "--config.outliers.source=latents_mixed",
    "--config.outliers.boundary=crossing",
    "--config.latents.kind=mixture",
    "--config.latents.guide.by=both",
    "--config.latents.select.oversample=2",
    "--config.latents.select.max_msp=0.9",
    "--config.latents.select.max_energy_percentile=50",
    "--config.latents.select.diverse=True",
]


@pytest.mark.slow
def test_a_run_with_everything_on_goes_from_start_to_report(tmp_path, capsys):
    assert start(tmp_path / "run", *EVERYTHING) == 0
    out = capsys.readouterr().out
    assert "adapter: " in out and "index.html" in out
    report = json.loads((tmp_path / "run/adapter/adapter.json").read_text())
    assert set(report) == {"id_validation", "id_decoded", "id_noised", "normal"}
    assert report["id_validation"]["agreement"] > 0.3
    reference = load_file(tmp_path / "run/adapter/reference.safetensors")
    assert reference["bank"].shape == (64, 128) and reference["kernel"].shape == (128, 8)
    np.testing.assert_allclose(np.linalg.norm(reference["bank"], axis=1), 1, rtol=1e-5)
    chosen = json.loads((tmp_path / "run/latents/selection.json").read_text())
    assert (chosen["sampled"], chosen["kept"]) == (64, 32)
    written = load_file(tmp_path / "run/latents/latents.safetensors")
    np.testing.assert_array_equal(written["labels"], np.tile(np.arange(8), 4))
    assert written["latents"].shape == (32, 4, 8, 8) and len(set(written["indices"])) == 32
    assert written["indices"].max() >= 32  # some of the second half were better
    assert start(tmp_path / "run", *EVERYTHING) == 0
    assert capsys.readouterr().out.count("done already, skipped") == 9
