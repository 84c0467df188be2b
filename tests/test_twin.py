"""Parity of the benchmarks' PyTorch twin with this package, and whole runs of the twin."""

import functools
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

import oal_jax
from oal_jax.config import Config, Knn, Latents, Outliers
from oal_jax.generator import conditioning, create, samplers, stable_diffusion
from oal_jax.models.normalise import moments
from oal_jax.models.resnet import ResNet
from oal_jax.models.vit import VisionTransformer
from oal_jax.outliers import knn
from oal_jax.runtime import artifacts, ops
from oal_jax.runtime.keys import named
from oal_jax.stages import student, train
from oal_jax.training.state import init_state, make_train_step

pytestmark = [
    pytest.mark.parity,
    # Warnings of PyTorch and diffusers do not fail these tests.
    pytest.mark.filterwarnings("default"),
]

WEIGHTS = Path(oal_jax.__file__).parent / "pretrained" / "weights"
MOMENTS = moments("fashion")
TOLERANCE = 1e-4
SHAPE, CLASSES, BATCH, STEPS = (28, 28, 1), 8, 32, 100
LATENT = (8, 8, 4)
LATENT_SOURCES = ("diffusion", "random")  # of outliers, of the energy objective


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


def flat(tree) -> dict[str, np.ndarray]:
    return {".".join(path): np.asarray(leaf) for path, leaf in flatten_dict(tree).items()}


def pixels(torch, images: np.ndarray):
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def moved(variables, key):
    """Statistics that differ from the initial ones, so that a test can see them."""
    leaves, tree = jax.tree.flatten(variables)
    keys = jax.random.split(key, len(leaves))
    noise = [0.2 * jax.random.uniform(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(tree, [x + n for x, n in zip(leaves, noise, strict=True)])


@pytest.mark.parametrize("stem", ["small", "cifar", "imagenet"])
def test_the_student_has_our_outputs(torch, stem):
    from benchmarks.torch_twin.models import ResNet as Twin
    from benchmarks.torch_twin.models import load_ours

    net = ResNet(CLASSES, width=8, stem=stem, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25))
    images = np.random.default_rng(0).random((4, 32, 32, 3), np.float32)
    variables = net.init(jax.random.key(0), images)
    variables |= {"batch_stats": moved(variables["batch_stats"], jax.random.key(1))}
    twin = Twin(3, CLASSES, (net.mean, net.std), depth=18, width=8, stem=stem).eval()
    load_ours(twin, flat(variables["params"]) | flat(variables["batch_stats"]))
    with torch.no_grad():
        outputs = twin(pixels(torch, images))
    for ours, theirs in zip(net.apply(variables, images), outputs, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=TOLERANCE)


def test_the_shipped_teacher_has_our_outputs(torch):
    pytest.importorskip("timm")
    from benchmarks.torch_twin.models import Teacher, load_ours

    net = VisionTransformer(CLASSES, 4, 128, 4, 4, 2.0, *MOMENTS)
    tensors = artifacts.read_tensors(WEIGHTS / "fashion_teacher.safetensors")
    sizes = {"patch": 4, "width": 128, "depth": 4, "heads": 4, "mlp_ratio": 2.0}
    twin = Teacher(SHAPE, CLASSES, MOMENTS, **sizes).eval()
    load_ours(twin.vit, tensors, 4)
    images = np.random.default_rng(0).random((4, *SHAPE), np.float32)
    params = {tuple(k.split(".")): np.float32(v) for k, v in tensors.items()}
    ours = net.apply({"params": unflatten_dict(params)}, images)
    with torch.no_grad():
        theirs = twin(pixels(torch, images))
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=TOLERANCE, rtol=TOLERANCE)


def experiment(objective: str, source: str, image_share: float) -> Config:
    config = Config()
    config.method.oal.objective, config.outliers.source = objective, source
    config.outliers.image_share = image_share
    config.student.width, config.train.batch_size = 8, BATCH
    # The energy loss has its full weight, and every part of the update is large enough to test.
    config.method.oal.ramp_start, config.method.oal.ramp_end = -1.0, 0.0
    config.train.warmup, config.method.oal.club_rate = 0.0, 0.01
    return config


def draw(config: Config) -> dict[str, np.ndarray]:
    """A batch in our layout."""
    rng = np.random.default_rng(0)
    width = config.teacher.width

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    batch = {
        "image": rng.random((BATCH, *SHAPE), np.float32),
        "label": rng.integers(0, CLASSES, BATCH).astype(np.int32),
        "teacher_logits": 3 * normal(BATCH, CLASSES),
        "teacher_features": normal(BATCH, width),
    }
    if config.method.oal.objective == "club":
        return batch | {"outlier": normal(BATCH, width), "outlier_latent": normal(BATCH, 8)}
    if config.outliers.source != "none":
        batch["outlier"] = normal(BATCH, width)
    if config.outliers.source in LATENT_SOURCES:
        batch |= {"outlier_latent": normal(BATCH, *LATENT), "latent": normal(BATCH, *LATENT)}
    if config.outliers.image_share:
        count = round(config.outliers.image_share * BATCH)
        batch["outlier_image"] = rng.random((count, *SHAPE), np.float32)
    return batch


def in_torch(torch, batch):
    """The same batch in PyTorch's layout."""
    tensors = {}
    for name, array in batch.items():
        tensor = torch.from_numpy(array)
        tensors[name] = tensor.permute(0, 3, 1, 2).contiguous() if array.ndim == 4 else tensor
    return tensors | {"label": tensors["label"].long()}


@functools.cache
def ours(objective: str, source: str, image_share: float):
    """Config, batch, state before and after a step of ours, and its metrics."""
    config = experiment(objective, source, image_share)
    net = student.network(config, CLASSES)
    batch = draw(config)
    steps_an_epoch = STEPS // config.train.epochs
    method = train.assemble(config, net, SHAPE, batch, {}, steps_an_epoch * BATCH)
    key = jax.random.key(0)
    optimizer = train.make_optimizer(config, list(jax.eval_shape(method.init, key)[0]), STEPS)
    state = init_state(method, optimizer, key)
    state = state.replace(model_state=moved(state.model_state, named(key, "moved")))
    after, metrics = jax.jit(make_train_step(method, optimizer, key))(state, batch)
    return config, batch, state, after, metrics


def twin_of(torch, config, state, club: str):
    from benchmarks.torch_twin.losses import Oal

    latent = (8,)
    if config.method.oal.objective == "energy":
        has_latents = config.outliers.source in LATENT_SOURCES
        latent = (LATENT[2], *LATENT[:2]) if has_latents else None
    twin = Oal(config, SHAPE[2], CLASSES, MOMENTS, latent, club)
    load(twin, state)
    return twin.train()


def tensors_of(state) -> dict[str, np.ndarray]:
    """Parameters and batch statistics of all groups by their paths."""
    tensors = flat(state.params)
    for group, rest in state.model_state.items():
        tensors |= {f"{group}.{k}": v for k, v in flat(rest.get("batch_stats", {})).items()}
    return tensors


def load(twin, state) -> None:
    from benchmarks.torch_twin.models import from_ours

    tensors = from_ours(tensors_of(state))
    rest = {k: v for k, v in twin.state_dict().items() if k.endswith("num_batches_tracked")}
    twin.load_state_dict(tensors | rest)


CASES = [
    ("energy", "random", 0.0),
    ("energy", "random", 0.25),
    ("energy", "knn", 0.0),
    ("energy", "none", 0.0),
    ("energy", "none", 0.25),
    ("club", "diffusion", 0.0),
]


@pytest.mark.parametrize("club", ["pairs", "linear"])
@pytest.mark.parametrize(("objective", "source", "image_share"), CASES)
def test_every_term_of_the_loss_agrees(torch, objective, source, image_share, club):
    config, batch, state, _, metrics = ours(objective, source, image_share)
    twin = twin_of(torch, config, state, club)
    weight = torch.tensor(config.method.oal.energy_weight)
    loss, terms = twin(in_torch(torch, batch), weight)
    expected = {"ce", "kd_logits", "kd_features"}
    expected |= {k for k in metrics if k == "latent_projector_error"}
    expected |= {k for k in metrics if k.startswith("energy_")}
    expected |= {f"club_{n}" for n in ("outlier", "outlier_latent") if f"club_{n}" in metrics}
    assert set(terms) == expected
    for name, value in terms.items():
        np.testing.assert_allclose(
            metrics[name], value.detach(), rtol=TOLERANCE, atol=TOLERANCE, err_msg=name
        )
    np.testing.assert_allclose(metrics["loss"], loss.detach(), rtol=TOLERANCE)


@pytest.mark.parametrize(
    ("objective", "source", "image_share", "how"),
    [
        *((*case, how) for case in CASES for how in ("reference", "tuned")),
        ("energy", "random", 0.25, "compiled"),
        ("club", "diffusion", 0.0, "compiled"),
    ],
)
def test_a_step_leaves_our_parameters(torch, objective, source, image_share, how):
    from benchmarks import timing
    from benchmarks.torch_twin import forms, training
    from benchmarks.torch_twin.models import from_ours

    if how == "compiled" and not timing.can_compile("cpu"):
        pytest.skip("no C++ compiler")
    config, batch, state, after, _ = ours(objective, source, image_share)
    form = forms.make("reference" if how == "reference" else "tuned", eager=how != "compiled")
    twin = twin_of(torch, config, state, form.club)
    training.make_step(twin, None, config, form, STEPS)(in_torch(torch, batch))
    state_dict = twin.state_dict()
    before = from_ours(tensors_of(state))
    for name, expected in from_ours(tensors_of(after)).items():
        if name.endswith("running_var"):
            continue  # PyTorch divides by n - 1, we by n
        np.testing.assert_allclose(
            expected, state_dict[name], atol=TOLERANCE, rtol=TOLERANCE, err_msg=name
        )
    largest = max(float((state_dict[n] - before[n]).abs().max()) for n in before)
    assert largest > 100 * TOLERANCE


def class_features(rng, count=60, width=16) -> np.ndarray:
    features = rng.normal(size=(count, width)) + 2 * rng.normal(size=(1, width))
    return np.asarray(ops.unit(features.astype(np.float32)))


@pytest.mark.parametrize("how", ["faiss", "matmul", "products"])
@pytest.mark.parametrize("selection", ["top", "reference"])
def test_the_same_outliers_are_selected_from_the_same_noise(torch, how, selection):
    from benchmarks.torch_twin import outliers

    if how == "faiss":
        pytest.importorskip("faiss")
    rng = np.random.default_rng(0)
    features = class_features(rng)
    noise = 0.5 * rng.normal(size=(40, 16)).astype(np.float32)
    edge = np.asarray(knn.boundary(features, 20, 12))
    their_edge = outliers.boundary(torch.from_numpy(features), 20, 12, how)
    np.testing.assert_array_equal(edge, their_edge)
    ours = knn.candidate_distances(features[edge], noise, features, 20)
    anchors = torch.from_numpy(features[edge])
    bank, rows = torch.from_numpy(features), torch.from_numpy(noise)
    theirs = outliers.DISTANCES[how](anchors, rows, bank, 20)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    chosen = knn.SELECTIONS[selection](ours, 2)
    np.testing.assert_array_equal(chosen, outliers.select(theirs, 2, selection))


def test_a_class_gives_as_many_unit_outliers_as_ours(torch):
    from benchmarks.torch_twin import outliers

    features = class_features(np.random.default_rng(1))
    sizes = {"neighbour": 20, "boundary_points": 12, "anchors": 10, "noise_rows": 40}
    config = Outliers(knn=Knn(**sizes, per_anchor=3, repeats=2, sigma=0.3))
    random = torch.Generator().manual_seed(0)
    sampled = outliers.sample_class(torch.from_numpy(features), config, "products", random)
    assert sampled.shape == (2 * 10 * 3, 16)
    np.testing.assert_allclose(sampled.norm(dim=1), 1, atol=1e-6)
    # Outliers lie further from the class than its own points do.
    own = knn.kth_distance(features, features, 20)
    assert knn.kth_distance(sampled.numpy(), features, 20).mean() > own.mean()


@pytest.fixture(scope="module")
def generators(torch):
    pytest.importorskip("diffusers")
    from benchmarks.torch_twin import diffusion

    directory = WEIGHTS / "fashion_sd"
    return stable_diffusion.load(directory), diffusion.load(directory, torch.device("cpu"))


@pytest.mark.parametrize("injection", ["all_pieces", "first_piece"])
def test_outliers_enter_the_prompt_where_ours_do(torch, generators, injection):
    from benchmarks.torch_twin import diffusion

    (sd, params), twin = generators
    words = create.FASHION_CLASSES
    ids, mask, _ = conditioning.class_tokens(sd, words, injection)
    their_mask = diffusion.injection_mask(twin, words, injection)
    np.testing.assert_array_equal(mask, their_mask)
    norms = np.linalg.norm(conditioning.token_embeddings(sd, params, words), axis=1)
    np.testing.assert_allclose(norms, diffusion.token_norms(twin, words), rtol=1e-5)
    vectors = np.random.default_rng(0).normal(size=(len(words), 128)).astype(np.float32)
    ours = conditioning.encode_with_injection(sd, params, ids, mask, vectors)
    with torch.no_grad():
        tokens, rows = torch.tensor(ids).long(), torch.from_numpy(vectors)
        theirs = diffusion.encode(twin, tokens, their_mask, rows)
        np.testing.assert_allclose(ours, theirs, atol=TOLERANCE)
        if injection == "first_piece":  # as the official code: overwrite a row of the table
            table = twin.text_encoder.get_input_embeddings().weight
            before = table.clone()
            token = diffusion.token_ids(twin, words[1])[0]
            one = diffusion.encode_by_table(twin, tokens[1:2], token, rows[1])
            np.testing.assert_allclose(ours[1:2], one, atol=TOLERANCE)
            assert torch.equal(before, table)


@pytest.mark.parametrize(("sampler", "steps"), [("pndm", 10), ("dpm_solver_pp_2m", 20)])
def test_latents_of_the_same_noise_agree(torch, generators, sampler, steps):
    from benchmarks.torch_twin import diffusion

    (sd, params), twin = generators
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(2, *sd.latent_shape)).astype(np.float32)
    cond, uncond = rng.normal(size=(2, 2, 16, 128)).astype(np.float32)
    apply = functools.partial(stable_diffusion.apply_unet, sd)
    ours = jax.jit(samplers.make_sampler(apply, sd.schedule, sampler, steps, guidance=2.0))
    config = Latents(sampler=sampler, steps=steps, guidance=2.0)
    with torch.no_grad():
        states = torch.from_numpy(np.concatenate([uncond, cond]))
        theirs = diffusion.denoise(twin.unet, twin.schedule, config, pixels(torch, noise), states)
    theirs = theirs.permute(0, 2, 3, 1)
    np.testing.assert_allclose(ours(params, noise, cond, uncond), theirs, atol=1e-3)


def test_images_are_encoded_and_latents_decoded_as_ours(torch, generators):
    from benchmarks.torch_twin import diffusion

    (sd, params), twin = generators
    images = np.random.default_rng(0).random((2, *SHAPE), np.float32)
    latents = np.asarray(stable_diffusion.encode_images(sd, params, images))
    with torch.no_grad():
        theirs = diffusion.encode_images(twin, pixels(torch, images))
        decoded = diffusion.decode(twin, pixels(torch, latents))
    np.testing.assert_allclose(latents, theirs.permute(0, 2, 3, 1), atol=1e-3)
    ours = stable_diffusion.decode_latents(sd, params, latents)
    np.testing.assert_allclose(ours, decoded.permute(0, 2, 3, 1), atol=1e-3)


def test_augmented_images_are_shifted_and_flipped_copies(torch):
    from benchmarks.torch_twin import data

    images = np.random.default_rng(0).integers(0, 256, (5, *SHAPE), np.uint8)
    random = torch.Generator().manual_seed(0)
    draws = data.Draws((2, 5), Config().data, torch.device("cpu"), random)
    indices, views = torch.tensor([3, 0, 4, 3]), torch.tensor([0, 1, 1, 1])
    tensor = data.as_tensor(images, torch.device("cpu"))
    augmented = draws.augment(tensor[indices], indices, views)
    for row, index, view in zip(augmented, indices, views, strict=True):
        padded = np.pad(images[index, :, :, 0], 2)
        top, left = draws.moves[view, index]
        cut = padded[top : top + 28, left : left + 28]
        cut = cut[:, ::-1] if draws.flips[view, index] else cut
        np.testing.assert_allclose(row[0], cut / 255, atol=1e-7)
    assert draws.flips.any() and not draws.flips.all()


@pytest.mark.parametrize("form", ["reference", "tuned", "shortcuts"])
def test_the_whole_job_runs(torch, form, tmp_path):
    """Tiny sizes without the compiler: all stages, and metrics of every near and far set."""
    pytest.importorskip("faiss" if form == "reference" else "diffusers")
    from benchmarks import job, timing

    flags = ["--twin-eager", "--device=cpu"]
    args, outputs = timing.make_parser("job", "").parse_args(flags), {}
    args.smoke, args.warm_cache = True, False
    job.their_job(form, job.configs(smoke=True), tmp_path, args, outputs).run()
    ((output,),) = outputs.values()
    assert list(output["stages"]) == [
        *("data", "features", "outliers", "latents", "train", "evaluate")
    ]
    assert output["metrics"].keys() == {"id", "sandal", "bag", "mnist", "letters", "photos"}
    assert all(0 <= sets["auroc"] <= 1 for n, sets in output["metrics"].items() if n != "id")
    assert output["compile_s"] == 0


@pytest.mark.parametrize(
    ("suite", "flags"),
    [
        ("scores", ["--train=200", "--test=100", "--width=32"]),
        ("features", ["--cases=shipped", "--batch=1", "--twin-eager"]),
        ("outliers", ["--classes=2", "--features=400", "--width=16", "--anchors=8"]),
        ("step", ["--cases=oal", "--twin-eager"]),
        ("latents", ["--latents=4", "--steps=2", "--twin-eager"]),
    ],
)
def test_suites_compare_with_torch(torch, suite, flags, tmp_path):
    pytest.importorskip({"scores": "pytorch_ood", "outliers": "faiss"}.get(suite, "timm"))
    from benchmarks import run

    output = tmp_path / "results.json"
    run.run(["run", f"--suite={suite}", f"--output={output}", "--runs=1", *flags])
    rows = json.loads(output.read_text())
    assert {row["framework"] for row in rows} == {"jax", "torch"}
    theirs = [row for row in rows if row["framework"] == "torch"]
    assert all(row["ratios"] and row["versions"]["torch"] for row in theirs)
