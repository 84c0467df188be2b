"""Classifiers from files against timm and torchvision: same files, same numbers, both ways."""

import jax
import numpy as np
import pytest
import safetensors.numpy
from flax.traverse_util import flatten_dict

from oal_jax.models.resnet import ResNet
from oal_jax.pretrained import convert
from oal_jax.pretrained.classifiers import load_classifier, save_timm

pytestmark = [
    pytest.mark.parity,
    # PyTorch and timm give warnings of their own.
    pytest.mark.filterwarnings("default"),
]

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def torch():
    module = pytest.importorskip("torch")
    module.set_grad_enabled(False)
    module.set_num_threads(2)
    return module


def randomised(torch, model):
    """The model with random biases, norms, running statistics and tokens."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point():
            continue
        noise = torch.randn(tensor.shape, generator=generator)
        if name.endswith("running_var") or (name.endswith("weight") and tensor.ndim == 1):
            tensor.copy_(torch.exp(0.2 * noise))
        elif tensor.ndim == 1 or name in ("cls_token", "pos_embed", "class_token"):
            tensor.copy_(0.1 * noise)
        elif name.endswith("gamma"):
            tensor.copy_(0.5 + 0.2 * noise)
    return model.eval()


def saved(model, path):
    tensors = {name: tensor.numpy().copy() for name, tensor in model.state_dict().items()}
    path.write_bytes(safetensors.numpy.save(tensors))
    return path


def images_of(size, channels=3):
    return np.random.default_rng(0).uniform(size=(2, size, size, channels)).astype(np.float32)


def prepared(torch, classifier, images):
    """PyTorch's inputs: normalised, channels first."""
    mean, std = (np.float32(values) for values in classifier.config[3:])
    return torch.from_numpy(((images - mean) / std).transpose(0, 3, 1, 2).copy())


def ours(classifier, images):
    logits, features = jax.jit(lambda forward, x: forward(x)[:2])(classifier.forward, images)
    return np.asarray(logits), np.asarray(features)


def assert_close(actual, expected):
    expected = expected.numpy()
    assert np.abs(expected).std() > 1e-3
    np.testing.assert_allclose(
        actual, expected, rtol=TOLERANCE, atol=TOLERANCE * np.abs(expected).max()
    )


def assert_comes_back(torch, classifier, model, path):
    """Another model of the same kind loads our file with strict=True, bit equal."""
    variables = classifier.variables
    save_timm(path, variables["params"], variables.get("batch_stats"), classifier.net)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for tensor in model.state_dict().values():
        tensor.zero_()
    tensors = safetensors.numpy.load_file(path)
    model.load_state_dict({n: torch.from_numpy(t) for n, t in tensors.items()}, strict=True)
    for name, tensor in model.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(tensor, before[name]), name


VITS = {
    "vit_tiny_patch16_224": {},
    "vit_base_patch16_224": {},
    "vit_base_patch16_224_miil": {"depth": 1},
    "vit_base_patch14_dinov2": {"depth": 1, "img_size": 224, "num_classes": 5},
    "vit_base_patch16_gap_224": {"depth": 1},
    "vit_tiny_patch16_384": {"depth": 1, "global_pool": "avg", "num_classes": 5},
}


@pytest.mark.parametrize("name", VITS)
def test_timm_s_vits(torch, tmp_path, name):
    timm = pytest.importorskip("timm")
    model = randomised(torch, timm.create_model(name, **VITS[name]))
    path = saved(model, tmp_path / "vit.safetensors")
    architecture = None if "depth" in VITS[name] else f"{name}.augreg_in21k"
    heads = model.blocks[0].attn.num_heads
    loaded = load_classifier(path, architecture, heads=heads if "gap" in name else None)
    assert loaded.net.heads == heads
    published = timm.get_pretrained_cfg(name)
    assert (loaded.config.mean, loaded.config.std) == (published.mean, published.std)
    images = images_of(loaded.config.image_shape[0])
    inputs = prepared(torch, loaded, images)
    logits, features = ours(loaded, images)
    assert_close(logits, model(inputs))
    assert_close(features, model.forward_head(model.forward_features(inputs), pre_logits=True))
    assert_comes_back(torch, loaded, model, tmp_path / "back.safetensors")


def test_position_embeddings_are_resized_as_timm_does(torch, tmp_path):
    timm = pytest.importorskip("timm")
    model = randomised(torch, timm.create_model("vit_tiny_patch16_224", depth=1))
    path = saved(model, tmp_path / "vit.safetensors")
    for size in (384, 96):
        loaded = load_classifier(path, image_size=size)
        expected = timm.layers.resample_abs_pos_embed(
            model.pos_embed, [size // 16] * 2, num_prefix_tokens=1
        )
        assert_close(np.asarray(loaded.variables["params"]["pos_embed"]), expected)


def test_torchvision_s_vit(torch, tmp_path):
    torchvision = pytest.importorskip("torchvision")
    model = torchvision.models.VisionTransformer(224, 16, 2, 3, 192, 768, num_classes=9)
    model = randomised(torch, model)
    torch.nn.init.normal_(model.heads.head.weight)  # zeros initially
    loaded = load_classifier(saved(model, tmp_path / "vit.safetensors"))
    images = images_of(224)
    assert_close(ours(loaded, images)[0], model(prepared(torch, loaded, images)))


@pytest.mark.parametrize(
    ("library", "name"),
    [
        ("torchvision", "resnet18"),
        ("torchvision", "resnet50"),
        ("timm", "resnet18"),
        ("timm", "resnet34"),
    ],
)
def test_resnets_of_torchvision_and_timm(torch, tmp_path, library, name):
    module = pytest.importorskip(library)
    model = module.create_model(name) if library == "timm" else module.models.get_model(name)
    model = randomised(torch, model)
    loaded = load_classifier(saved(model, tmp_path / "net.safetensors"), name)
    assert loaded.config.architecture == f"{name}_224x224"
    images = images_of(224)
    inputs, features = prepared(torch, loaded, images), []
    model.fc.register_forward_pre_hook(lambda _, args: features.append(args[0]))
    expected = model(inputs)
    logits, actual = ours(loaded, images)
    assert_close(logits, expected)
    assert_close(actual, features[0])
    assert_comes_back(torch, loaded, model, tmp_path / "back.safetensors")


def for_32_px(torch, model):
    """timm's or torchvision's ResNet with the stem for 32 px."""
    model.conv1 = torch.nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    model.maxpool = torch.nn.Identity()
    return model


def test_openood_s_checkpoint_by_the_converter(torch, tmp_path):
    timm = pytest.importorskip("timm")
    model = randomised(torch, for_32_px(torch, timm.create_model("resnet18", num_classes=10)))
    # OpenOOD's own names for the same network, saved from `DataParallel` in a training checkpoint.
    state = {
        "module." + name.replace("downsample", "shortcut"): tensor
        for name, tensor in model.state_dict().items()
    }
    checkpoint, path = tmp_path / "best.ckpt", tmp_path / "best.safetensors"
    torch.save({"epoch": 3, "state_dict": state}, checkpoint)
    argv = ["convert", "--input", str(checkpoint), "--output", str(path)]
    assert convert.guard(convert.run, argv) == 0
    loaded = load_classifier(path, "resnet18_32x32")
    images = images_of(32)
    assert_close(ours(loaded, images)[0], model(prepared(torch, loaded, images)))
    assert_comes_back(torch, loaded, model, tmp_path / "back.safetensors")


def test_converter_keeps_every_value_and_refuses_the_rest(torch, tmp_path, capsys):
    target = tmp_path / "out.safetensors"

    def run(content, *more):
        torch.save(content, tmp_path / "in.ckpt")
        argv = ["convert", "--input", str(tmp_path / "in.ckpt"), "--output", str(target), *more]
        code = convert.guard(convert.run, argv)
        return code, capsys.readouterr()

    half = torch.arange(6, dtype=torch.bfloat16).reshape(2, 3).T  # not contiguous
    code, printed = run({"net.a": half, "net.n": torch.tensor(3)})
    assert code == 0 and printed.out.startswith("2 tensors, ")
    written = safetensors.numpy.load_file(target)
    np.testing.assert_array_equal(written["net.a"], half.float().numpy())
    assert written["net.a"].dtype == np.float32 and written["net.n"] == 3
    target.unlink()
    for content, message in (
        ([1, 2], "is no state dict: it holds no tensors by name"),
        ({"a": 1}, "is no state dict"),
        ({"student": {"a": half}, "teacher": {"a": half}}, "under student, teacher; give one"),
        (torch.nn.Linear(2, 2), "holds more than tensors"),
    ):
        code, printed = run(content)
        assert code == 2 and message in printed.err and printed.err.count("\n") == 1
        assert not target.exists()
    assert run({"student": {"a": half}, "teacher": {"b": half}}, "--key", "teacher")[0] == 0
    assert list(safetensors.numpy.load_file(target)) == ["b"]
    assert run({"a": half}, "--key", "student")[0] == 2
    (tmp_path / "bad.ckpt").write_bytes(b"neither zip nor pickle")
    for name in ("bad.ckpt", "absent.ckpt"):
        argv = ["convert", "--input", str(tmp_path / name), "--output", str(target)]
        assert convert.guard(convert.run, argv) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_a_network_of_ours_runs_in_timm(torch, tmp_path):
    timm = pytest.importorskip("timm")
    net = ResNet(6, affine_bn=False, mean=(0.3,), std=(0.2,))
    images = images_of(32)
    shapes = jax.eval_shape(net.init, jax.random.key(0), images)
    rng = np.random.default_rng(0)
    variables = {
        kind: jax.tree.map(lambda leaf: rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32), tree)
        for kind, tree in shapes.items()
    }
    flat = flatten_dict(variables["params"])
    for path, leaf in flat.items():
        if path[-1] == "kernel":
            flat[path][...] = (leaf - 1) / np.sqrt(np.prod(leaf.shape[:-1]) / 12)
    path = save_timm(tmp_path / "ours.safetensors", variables["params"], variables["batch_stats"],
                     net)  # fmt: skip
    model = for_32_px(torch, timm.create_model("resnet18", num_classes=6)).eval()
    tensors = safetensors.numpy.load_file(path)
    model.load_state_dict({n: torch.from_numpy(t) for n, t in tensors.items()}, strict=True)
    logits, _ = jax.jit(net.apply)(variables, images)
    inputs = torch.from_numpy(((images - np.float32(0.3)) / np.float32(0.2)).transpose(0, 3, 1, 2))
    assert_close(np.asarray(logits), model(inputs.contiguous()))
