"""Classifiers from files: against NumPy from the file's own tensors, round trips, every fault."""

import json
import pickle
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax.traverse_util import flatten_dict
from scipy.special import erf

import oal_jax
from oal_jax.errors import UserError
from oal_jax.models.resnet import ResNet
from oal_jax.models.vit import VisionTransformer
from oal_jax.models.wide_resnet import WideResNet
from oal_jax.pretrained import convert
from oal_jax.pretrained.classifiers import export_timm, load_classifier, save_timm

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def write(path, tensors, **metadata):
    path.write_bytes(safetensors.numpy.save(tensors, metadata or None))
    return path


def random_tensors(shapes, seed=0):
    """Tensors of PyTorch's names with no zeros and ones in them; variances stay positive."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, shape in shapes.items():
        values = rng.normal(size=shape).astype(np.float32)
        if name.endswith("num_batches_tracked"):
            tensors[name] = np.array(7, np.int64)
        elif len(shape) > 1 and "token" not in name and "pos" not in name:
            tensors[name] = values / np.float32(np.sqrt(np.prod(shape[1:])))
        elif name.endswith("running_var") or (name.endswith("weight") and len(shape) == 1):
            tensors[name] = np.exp(0.3 * values)
        else:
            tensors[name] = 0.3 * values
    return {name: np.asarray(value, order="C") for name, value in tensors.items()}


def conv_bn(shapes, conv, bn, out, of, kernel):
    shapes[f"{conv}.weight"] = (out, of, kernel, kernel)
    for leaf in ("weight", "bias", "running_mean", "running_var"):
        shapes[f"{bn}.{leaf}"] = (out,)
    shapes[f"{bn}.num_batches_tracked"] = ()


def resnet_tensors(depth=18, width=2, kernel=3, classes=10, channels=3, shortcut="downsample"):
    """A ResNet's tensors by the published names, written out here without our own code."""
    shapes, of = {}, width
    conv_bn(shapes, "conv1", "bn1", width, channels, kernel)
    for i, blocks in enumerate({18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}[depth]):
        for j in range(blocks):
            name, middle = f"layer{i + 1}.{j}", width * 2**i
            out = middle * (4 if depth == 50 else 1)
            sizes = [(middle, of, 3), (out, middle, 3)]
            if depth == 50:
                sizes = [(middle, of, 1), (middle, middle, 3), (out, middle, 1)]
            for k, (o, c, size) in enumerate(sizes, 1):
                conv_bn(shapes, f"{name}.conv{k}", f"{name}.bn{k}", o, c, size)
            if of != out or (j == 0 and i > 0):
                conv_bn(shapes, f"{name}.{shortcut}.0", f"{name}.{shortcut}.1", out, of, 1)
            of = out
    shapes |= {"fc.weight": (classes, of), "fc.bias": (classes,)}
    return random_tensors(shapes)


def vit_tensors(width=8, depth=2, patch=4, grid=2, hidden=16, classes=3, channels=3):
    """A ViT's tensors by timm's names, written out here without our own code."""
    shapes = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, grid * grid + 1, width),
        "patch_embed.proj.weight": (width, channels, patch, patch),
        "patch_embed.proj.bias": (width,),
    }
    for i in range(depth):
        for name, out, of in (
            ("attn.qkv", 3 * width, width),
            ("attn.proj", width, width),
            ("mlp.fc1", hidden, width),
            ("mlp.fc2", width, hidden),
        ):
            shapes[f"blocks.{i}.{name}.weight"] = (out, of)
            shapes[f"blocks.{i}.{name}.bias"] = (out,)
        for name in ("norm1", "norm2"):
            shapes |= {f"blocks.{i}.{name}.{leaf}": (width,) for leaf in ("weight", "bias")}
    shapes |= {"norm.weight": (width,), "norm.bias": (width,)}
    shapes |= {"head.weight": (classes, width), "head.bias": (classes,)}
    return random_tensors(shapes)


def numpy_vit(t, images, heads, mean, std):
    """(logits, features) in float64, from the tensors of a file."""
    t = {name: value.astype(np.float64) for name, value in t.items()}
    layer = lambda x, n: x @ t[f"{n}.weight"].T + t.get(f"{n}.bias", 0.0)

    def norm(x, n):
        centred = x - x.mean(-1, keepdims=True)
        x = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
        return x * t[f"{n}.weight"] + t[f"{n}.bias"]

    x = (images.astype(np.float64) - mean) / std
    kernel = t["patch_embed.proj.weight"]
    patch, count = kernel.shape[-1], len(images)
    tokens = [
        np.einsum("bhwc,dchw->bd", x[:, i : i + patch, j : j + patch], kernel)
        for i in range(0, x.shape[1], patch)
        for j in range(0, x.shape[2], patch)
    ]
    tokens = np.stack(tokens, 1) + t["patch_embed.proj.bias"]
    first = int("cls_token" in t)
    if first:
        tokens = np.concatenate([np.repeat(t["cls_token"], count, 0), tokens], 1)
    x = tokens + t["pos_embed"]
    width, depth = x.shape[-1], len({n.split(".")[1] for n in t if n.startswith("blocks.")})
    size = width // heads
    for i in range(depth):
        block = f"blocks.{i}"
        qkv = layer(norm(x, f"{block}.norm1"), f"{block}.attn.qkv")
        mixed = []
        for head in range(heads):
            q, k, v = (qkv[..., s * width + head * size :][..., :size] for s in range(3))
            weights = np.exp(q @ k.transpose(0, 2, 1) / np.sqrt(size))
            mixed.append(weights / weights.sum(-1, keepdims=True) @ v)
        h = layer(np.concatenate(mixed, -1), f"{block}.attn.proj")
        x = x + h * t.get(f"{block}.ls1.gamma", 1.0)
        h = layer(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1")
        h = layer(h * (1 + erf(h / np.sqrt(2))) / 2, f"{block}.mlp.fc2")
        x = x + h * t.get(f"{block}.ls2.gamma", 1.0)
    if "fc_norm.weight" in t:
        features = norm(x[:, first:].mean(1), "fc_norm")
    else:
        features = norm(x, "norm")
        features = features[:, 0] if first else features.mean(1)
    return layer(features, "head"), features


def numpy_resnet(t, images, mean, std):
    """(logits, features) in float64, from the tensors of a file."""

    def conv(x, name, stride):
        kernel = t[f"{name}.weight"].astype(np.float64)
        pad = kernel.shape[-1] // 2
        x = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
        windows = np.lib.stride_tricks.sliding_window_view(x, kernel.shape[2:], (1, 2))
        return np.einsum("bhwcij,dcij->bhwd", windows[:, ::stride, ::stride], kernel)

    def bn(x, name):
        x = (x - t[f"{name}.running_mean"]) / np.sqrt(t[f"{name}.running_var"] + 1e-5)
        return x * t[f"{name}.weight"] + t[f"{name}.bias"]

    relu = lambda x: np.maximum(x, 0)
    imagenet = t["conv1.weight"].shape[-1] == 7
    x = relu(bn(conv((images - mean) / std, "conv1", 2 if imagenet else 1), "bn1"))
    if imagenet:
        x = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-np.inf)
        x = np.lib.stride_tricks.sliding_window_view(x, (3, 3), (1, 2))[:, ::2, ::2].max((-2, -1))
    names = sorted({".".join(n.split(".")[:2]) for n in t if n.startswith("layer")})
    for name in names:
        stride = 2 if name.endswith(".0") and name != "layer1.0" else 1
        count = 3 if f"{name}.conv3.weight" in t else 2
        strides = (1, stride, 1) if count == 3 else (stride, 1)
        h = x
        for i, step in enumerate(strides, 1):
            h = bn(conv(h, f"{name}.conv{i}", step), f"{name}.bn{i}")
            h = relu(h) if i < count else h
        for kind in ("downsample", "shortcut"):
            if f"{name}.{kind}.0.weight" in t:
                x = bn(conv(x, f"{name}.{kind}.0", stride), f"{name}.{kind}.1")
        x = relu(x + h)
    features = x.mean((1, 2))
    return features @ t["fc.weight"].T + t["fc.bias"], features


def images_of(classifier, count=2, seed=1, size=None):
    h, w, c = classifier.config.image_shape
    shape = (count, size or h, size or w, c)
    return np.random.default_rng(seed).uniform(size=shape).astype(np.float32)


def assert_gives(classifier, images, expected):
    # Gram matrices take most of the time to compile.
    outputs = jax.jit(lambda f, x: f(x)._replace(grams=None))(classifier.forward, images)
    np.testing.assert_allclose(outputs.logits, expected[0], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(outputs.features, expected[1], rtol=1e-4, atol=1e-4)
    head = classifier.head
    np.testing.assert_allclose(
        np.asarray(outputs.features) @ head.kernel + head.bias, outputs.logits, atol=1e-4
    )
    return outputs


# What is loaded


@pytest.mark.parametrize(("patch", "channels"), [(4, 3), (2, 1)])
def test_vit_equals_numpy_from_timm_s_tensors(tmp_path, patch, channels):
    tensors = vit_tensors(patch=patch, channels=channels)
    path = write(tmp_path / "vit.safetensors", tensors)
    moments = None if channels == 3 else [0.4], None if channels == 3 else [0.2]
    made = load_classifier(path, mean=moments[0], std=moments[1], heads=2)
    assert made.config.architecture == f"vit_8x2_patch{patch}_{2 * patch}"
    assert made.config.image_shape == (2 * patch, 2 * patch, channels)
    mean, std = (0.5, 0.5) if channels == 3 else (0.4, 0.2)
    images = images_of(made)
    outputs = assert_gives(made, images, numpy_vit(tensors, images, 2, mean, std))
    # Maps: the embedded patches and both blocks, the class token not among them.
    assert [layer.shape for layer in outputs.layers] == [(2, 8)] * 3


VARIANTS = {
    "no qkv bias": "token",
    "layer scale": "token",
    "no class token": "norm_mean",
    "fc_norm": "mean_norm",
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_of_timm_s_vits(tmp_path, variant):
    tensors = vit_tensors()
    mean, std = 0.5, 0.5
    for name in list(tensors):
        if variant == "no qkv bias" and name.endswith("qkv.bias"):
            del tensors[name]
            mean, std = 0.0, 1.0
        if variant == "layer scale" and name.endswith("norm1.weight"):
            for i in (1, 2):
                gamma = np.linspace(0.5, 1.5 + i, 8, dtype=np.float32)
                tensors[name.replace("norm1.weight", f"ls{i}.gamma")] = gamma
            mean, std = IMAGENET
        if variant == "fc_norm" and name.startswith("norm."):
            tensors[f"fc_{name}"] = tensors.pop(name)
    if variant == "no class token":
        del tensors["cls_token"]
        tensors["pos_embed"] = np.ascontiguousarray(tensors["pos_embed"][:, 1:])
    made = load_classifier(write(tmp_path / "vit.safetensors", tensors), heads=2)
    assert made.net.pool == VARIANTS[variant]
    images = images_of(made)
    assert_gives(made, images, numpy_vit(tensors, images, 2, np.array(mean), np.array(std)))
    again = save_timm(tmp_path / "again.safetensors", made.variables["params"], None, made.net)
    assert_same(safetensors.numpy.load_file(again), tensors)


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        if not name.endswith("num_batches_tracked"):
            np.testing.assert_array_equal(actual[name], value, err_msg=name)


@pytest.mark.parametrize("published", [True, False])
def test_torchvision_s_names_of_a_vit(tmp_path, published):
    renames = [
        ("blocks.", "encoder.layers.encoder_layer_"),
        (".norm1", ".ln_1"),
        (".norm2", ".ln_2"),
        ("attn.qkv.", "self_attention.in_proj_"),
        ("attn.proj", "self_attention.out_proj"),
        ("mlp.fc1", "mlp.linear_1" if published else "mlp.0"),
        ("mlp.fc2", "mlp.linear_2" if published else "mlp.3"),
        ("cls_token", "class_token"),
        ("pos_embed", "encoder.pos_embedding"),
        ("patch_embed.proj", "conv_proj"),
    ]
    tensors, renamed = vit_tensors(), {}
    for name, value in tensors.items():
        for old, new in renames:
            name = name.replace(old, new)
        name = name.replace("head.", "heads.head.")
        renamed[f"encoder.ln{name[4:]}" if name.startswith("norm.") else name] = value
    made = load_classifier(write(tmp_path / "vit.safetensors", renamed), heads=2)
    images = images_of(made)
    mean, std = map(np.array, IMAGENET)
    assert_gives(made, images, numpy_vit(tensors, images, 2, mean, std))


def google_tensors(tensors, heads, root=""):
    """timm's tensors as Google's checkpoints have them, a name at a time."""
    width = tensors["pos_embed"].shape[-1]
    split = (heads, width // heads)
    made = {
        "cls": tensors["cls_token"],
        "Transformer/posembed_input/pos_embedding": tensors["pos_embed"],
        "embedding/kernel": tensors["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
        "embedding/bias": tensors["patch_embed.proj.bias"],
        "Transformer/encoder_norm/scale": tensors["norm.weight"],
        "Transformer/encoder_norm/bias": tensors["norm.bias"],
        "head/kernel": tensors["head.weight"].T,
        "head/bias": tensors["head.bias"],
    }
    for i in range(2):
        old, new = f"blocks.{i}", f"Transformer/encoderblock_{i}"
        for ours, theirs in (("norm1", "LayerNorm_0"), ("norm2", "LayerNorm_2")):
            made[f"{new}/{theirs}/scale"] = tensors[f"{old}.{ours}.weight"]
            made[f"{new}/{theirs}/bias"] = tensors[f"{old}.{ours}.bias"]
        for ours, theirs in (("fc1", "Dense_0"), ("fc2", "Dense_1")):
            made[f"{new}/MlpBlock_3/{theirs}/kernel"] = tensors[f"{old}.mlp.{ours}.weight"].T
            made[f"{new}/MlpBlock_3/{theirs}/bias"] = tensors[f"{old}.mlp.{ours}.bias"]
        attention = f"{new}/MultiHeadDotProductAttention_1"
        for j, part in enumerate(("query", "key", "value")):
            rows = slice(j * width, (j + 1) * width)
            kernel = tensors[f"{old}.attn.qkv.weight"][rows].T.reshape(width, *split)
            made[f"{attention}/{part}/kernel"] = kernel
            bias = tensors[f"{old}.attn.qkv.bias"][rows].reshape(split)
            made[f"{attention}/{part}/bias"] = bias
        made[f"{attention}/out/kernel"] = tensors[f"{old}.attn.proj.weight"].T.reshape(
            *split, width
        )
        made[f"{attention}/out/bias"] = tensors[f"{old}.attn.proj.bias"]
    return {f"{root}{name}": value for name, value in made.items()}


@pytest.mark.parametrize("root", ["", "opt/target/"])
def test_google_s_npz_has_its_heads_in_its_shapes(tmp_path, root):
    tensors = vit_tensors()
    state = {"opt/state/step": np.array(3)} if root else {}
    path = tmp_path / "vit.npz"
    np.savez(path, **google_tensors(tensors, 4, root), **state)
    made = load_classifier(path)
    assert made.net.heads == 4
    images = images_of(made)
    assert_gives(made, images, numpy_vit(tensors, images, 4, 0.5, 0.5))


def test_google_s_pre_logits_go_with_the_head(tmp_path):
    tensors = google_tensors(vit_tensors(), 2)
    tensors |= {"pre_logits/kernel": np.eye(8, dtype=np.float32), "pre_logits/bias": np.zeros(8)}
    np.savez(tmp_path / "vit.npz", **tensors)
    with pytest.raises(UserError, match="left over pre_logits/kernel, pre_logits/bias$"):
        load_classifier(tmp_path / "vit.npz")
    made = load_classifier(tmp_path / "vit.npz", num_classes=5, new_head=jax.random.key(0))
    assert made.config.num_classes == 5 and made.head.kernel.shape == (8, 5)
    np.testing.assert_array_equal(made.variables["params"]["norm"]["bias"], tensors[
        "Transformer/encoder_norm/bias"])  # fmt: skip


@pytest.mark.parametrize(
    ("depth", "kernel", "shortcut", "size", "name"),
    [
        (18, 7, "downsample", 32, "resnet18_224x224"),
        (18, 3, "shortcut", 16, "resnet18_32x32"),
    ],
)
def test_resnet_equals_numpy_from_the_file_s_tensors(tmp_path, depth, kernel, shortcut, size, name):
    tensors = resnet_tensors(depth, kernel=kernel, shortcut=shortcut)
    made = load_classifier(write(tmp_path / "net.safetensors", tensors))
    mean, std = IMAGENET
    if kernel == 3:
        mean, std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    assert made.config[0] == name and made.config[3:] == (mean, std)
    images = images_of(made, size=size)
    expected = numpy_resnet(tensors, images.astype(np.float64), np.array(mean), np.array(std))
    outputs = assert_gives(made, images, expected)
    assert len(outputs.layers) == 5 and outputs.regions.shape[1] == 6


@pytest.mark.parametrize("depth", [18, 34, 50])
def test_depth_is_counted(tmp_path, depth):
    made = load_classifier(write(tmp_path / "net.safetensors", resnet_tensors(depth)))
    assert made.net.depth == depth and made.config.num_classes == 10


@pytest.mark.parametrize(
    ("classes", "mean"), [(10, 0.4914), (100, 0.5071)], ids=["cifar10", "cifar100"]
)
def test_cifar_s_constants_go_by_the_classes(tmp_path, classes, mean):
    path = write(tmp_path / "net.safetensors", resnet_tensors(classes=classes))
    assert load_classifier(path).config.mean[0] == mean
    other = load_classifier(path, mean=[0.1], std=[0.2])
    assert other.net.mean == (0.1,) and other.net.std == (0.2,)


def test_timm_s_card_beside_the_file_says_the_normalisation(tmp_path):
    path = write(tmp_path / "model.safetensors", vit_tensors())
    card = {"architecture": "vit_tiny", "pretrained_cfg": {"mean": [0.1] * 3, "std": [0.2] * 3}}
    (tmp_path / "config.json").write_text(json.dumps(card))
    made = load_classifier(path, heads=1)
    assert made.config.mean == (0.1,) * 3 and made.net.std == (0.2,) * 3
    assert load_classifier(path, heads=1, mean=[0.3], std=[0.4]).config.mean == (0.3,)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="can't be read"):
        load_classifier(path, heads=1)


@pytest.mark.parametrize(("width", "depth", "heads"), [(192, 12, 3), (1280, 32, 16), (128, 1, 2)])
def test_heads_are_those_of_the_known_sizes(tmp_path, width, depth, heads):
    from oal_jax.pretrained import vit
    from oal_jax.pretrained.tensor_files import TensorFile

    tensors = vit_tensors(width, 1, hidden=4)
    of_block = {n: v for n, v in tensors.items() if n.startswith("blocks.0.")}
    for i in range(1, depth):
        tensors |= {n.replace("blocks.0.", f"blocks.{i}."): v for n, v in of_block.items()}
    assert vit.infer(TensorFile(tmp_path, tensors, {}), None)["heads"] == heads


@pytest.mark.parametrize("hidden", [16, 11, 13, 33])
def test_hidden_width_is_exact(tmp_path, hidden):
    made = load_classifier(
        write(tmp_path / "vit.safetensors", vit_tensors(width=12, hidden=hidden)), heads=2
    )
    assert made.variables["params"]["blocks_0"]["mlp_fc1"]["bias"].shape == (hidden,)


def test_half_precision_is_cast(tmp_path):
    tensors = vit_tensors()
    halved = {n: v.astype(jnp.bfloat16 if "norm" in n else np.float16) for n, v in tensors.items()}
    made = load_classifier(write(tmp_path / "vit.safetensors", halved), heads=2)
    leaves = jax.tree.leaves(made.variables)
    assert {leaf.dtype for leaf in leaves} == {np.dtype(np.float32)}
    np.testing.assert_array_equal(
        made.variables["params"]["norm"]["scale"], halved["norm.weight"].astype(np.float32)
    )


def test_position_embeddings_are_resized_and_a_plane_stays_a_plane(tmp_path):
    tensors = vit_tensors(grid=6)
    rows, columns = np.mgrid[:6, :6] + 0.5
    plane = np.stack([rows / 6, columns / 6] * 4, -1).reshape(1, 36, 8)
    tensors["pos_embed"] = np.concatenate([tensors["pos_embed"][:, :1], plane], 1, dtype=np.float32)
    path = write(tmp_path / "vit.safetensors", tensors)
    made = load_classifier(path, heads=2, image_size=48)
    assert made.config.image_shape == (48, 48, 3) and made.config.architecture.endswith("_48")
    resized = np.asarray(made.variables["params"]["pos_embed"])
    np.testing.assert_array_equal(resized[:, 0], tensors["pos_embed"][:, 0])
    rows, columns = np.mgrid[:12, :12] + 0.5
    expected = np.stack([rows / 12, columns / 12] * 4, -1)
    inner = np.s_[3:-3, 3:-3]  # at the border there is nothing to go on
    np.testing.assert_allclose(resized[0, 1:].reshape(12, 12, 8)[inner], expected[inner], atol=1e-5)
    assert jax.eval_shape(made.forward, images_of(made)).logits.shape == (2, 3)
    with pytest.raises(UserError, match="image_size 30 is not a multiple of its 4 px patch"):
        load_classifier(path, heads=2, image_size=30)


# Round trips


NETS = [
    ResNet(7, width=8, stem="cifar", mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6)),
    ResNet(7, width=8, stem="imagenet", mean=(0.2,), std=(0.3,)),
    ResNet(7, width=4, affine_bn=False),
    VisionTransformer(5, 7, 18, 2, 3, 2.5, mean=(0.2,), std=(0.3,)),
    VisionTransformer(5, 4, 8, 2, 2, 4.0, (0.2,), (0.3,), False, True, False, "norm_mean"),
]


@pytest.mark.parametrize("net", NETS, ids=lambda n: f"{type(n).__name__}{NETS.index(n)}")
def test_what_was_trained_here_comes_back_as_it_was(tmp_path, net):
    size = 28
    shapes = jax.eval_shape(lambda k: net.init(k, jnp.zeros((1, size, size, 1))), jax.random.key(0))
    if len(net.mean) == 3:
        shapes = jax.eval_shape(
            lambda k: net.init(k, jnp.zeros((1, size, size, 3))), jax.random.key(0)
        )
    rng = np.random.default_rng(0)
    variables = jax.tree.map(
        lambda leaf: rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32), shapes
    )
    path = tmp_path / "deep" / "net.safetensors"
    stats = variables.get("batch_stats")
    assert save_timm(path, variables["params"], stats, net, image_size=size) == path
    made = load_classifier(path)
    fields = {f: getattr(made.net, f) for f in ("mean", "std", "num_classes", "width", "depth")}
    assert fields == {f: getattr(net, f) for f in fields}
    assert made.config.image_shape[:2] == (size, size)
    actual, expected = flatten_dict(made.variables), flatten_dict(variables)
    for key in actual.keys() - expected.keys():  # batch normalisation without scale and offset
        assert not net.affine_bn and (actual.pop(key) == (key[-1] == "scale")).all()
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_array_equal(actual[key], value)
    with safetensors.safe_open(path, "numpy") as file:
        assert file.metadata()["format"] == "pt"


@pytest.mark.parametrize(
    "tensors", [resnet_tensors(), resnet_tensors(50), vit_tensors()], ids=["18", "50", "vit"]
)
def test_a_loaded_file_is_exported_with_the_same_names(tmp_path, tensors):
    made = load_classifier(write(tmp_path / "net.safetensors", tensors), heads=2)
    stats = made.variables.get("batch_stats")
    assert_same(export_timm(made.variables["params"], stats, made.net), tensors)


def test_what_timm_does_not_have_is_not_exported(tmp_path):
    with pytest.raises(UserError, match="no ResNet with stem 'small'"):
        export_timm({}, {}, ResNet(3, stem="small"))
    with pytest.raises(UserError, match="a WideResNet is no ResNet and no VisionTransformer"):
        export_timm({}, {}, WideResNet(3))
    with pytest.raises(UserError, match=r"give a name that ends in \.safetensors"):
        save_timm(tmp_path / "net.pt", {}, {}, ResNet(3))


# Heads, and use


def test_a_new_head_is_of_the_key_and_only_where_it_is_asked_for(tmp_path):
    tensors = resnet_tensors()
    path = write(tmp_path / "net.safetensors", tensors)
    with pytest.raises(UserError, match="a head of 10 classes, not 4; give new_head=KEY"):
        load_classifier(path, num_classes=4)
    first, again, other = (
        load_classifier(path, num_classes=4, new_head=jax.random.key(seed)) for seed in (0, 0, 1)
    )
    assert first.head.kernel.shape == (16, 4) and (first.head.bias == 0).all()
    np.testing.assert_array_equal(first.head.kernel, again.head.kernel)
    assert np.abs(first.head.kernel - other.head.kernel).max() > 0.01
    np.testing.assert_array_equal(
        first.variables["params"]["conv1"]["kernel"],
        tensors["conv1.weight"].transpose(2, 3, 1, 0),
    )
    del tensors["fc.weight"], tensors["fc.bias"]
    path = write(tmp_path / "net.safetensors", tensors)
    with pytest.raises(UserError, match="has no head; give num_classes and new_head=KEY"):
        load_classifier(path)
    with pytest.raises(UserError, match="has no head; give num_classes with new_head"):
        load_classifier(path, new_head=jax.random.key(0))
    with pytest.raises(UserError, match="normalisation of its 3-channel images is not known"):
        load_classifier(path, num_classes=4, new_head=jax.random.key(0))
    made = load_classifier(path, None, 4, [0.5], [0.5], new_head=jax.random.key(0))
    assert made.config.num_classes == 4


def test_forward_and_head_go_into_calibrate_as_they_are(tmp_path):
    tensors = vit_tensors(depth=1)
    made = load_classifier(write(tmp_path / "vit.safetensors", tensors), heads=2)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)
    labels = np.arange(40) % 3
    detector = oal_jax.calibrate(
        made.forward, (images, labels), (images[::2], labels[::2]), "vim", made.head
    )
    result = detector(images)
    expected, _ = numpy_vit(tensors, images / 255, 2, 0.5, 0.5)
    np.testing.assert_array_equal(result.label, expected.argmax(-1))
    assert np.isfinite(result.ood_score).all() and np.std(result.ood_score) > 0


def test_images_of_another_shape_are_refused(tmp_path):
    made = load_classifier(write(tmp_path / "vit.safetensors", vit_tensors()), heads=2)
    with pytest.raises(UserError, match=r"takes \(n, 8, 8, 3\); image_size resizes"):
        made.forward(np.zeros((2, 16, 16, 3), np.float32))
    made = load_classifier(write(tmp_path / "net.safetensors", resnet_tensors()))
    with pytest.raises(UserError, match=r"takes \(n, h, w, 3\)$"):
        made.forward(np.zeros((2, 16, 16, 1), np.float32))


# Faults


def test_tensors_that_do_not_fit_are_listed(tmp_path):
    path, tensors = tmp_path / "net.safetensors", resnet_tensors()
    tensors["fc.bias"] = tensors["fc.bias"][:3]
    tensors["extra.weight"] = np.zeros(3, np.float32)
    del tensors["layer2.1.bn1.running_var"]
    tensors["bn1.weight"] = np.zeros(2, np.int32)
    message = (
        "net.safetensors does not fit resnet18_32x32: missing layer2.1.bn1.running_var; left over"
        " extra.weight; wrong shape bn1.weight of type int32 instead of floats, fc.bias (3,)"
        " instead of (10,)"
    )
    with pytest.raises(UserError) as raised:
        load_classifier(write(path, tensors))
    assert str(raised.value).endswith(message)
    for i in range(9):
        tensors[f"more.{i}"] = np.zeros(1, np.float32)
    with pytest.raises(UserError, match=r"left over [^;]*more\.3, \.\.\. \(10 in all\);"):
        load_classifier(write(path, tensors))


@pytest.mark.parametrize(
    "name", ["pos_embed", "patch_embed.proj.weight", "blocks.0.mlp.fc1.weight"]
)
def test_without_a_tensor_that_tells_the_sizes_there_is_no_guess(tmp_path, name):
    tensors = vit_tensors()
    del tensors[name]
    with pytest.raises(UserError, match=f"missing {name}, without which"):
        load_classifier(write(tmp_path / "vit.safetensors", tensors))
    tensors = vit_tensors() | {name: np.zeros(3, np.float32)}
    with pytest.raises(UserError, match=rf"wrong shape {name} \(3,\)"):
        load_classifier(write(tmp_path / "vit.safetensors", tensors))


def test_other_networks_are_told_apart(tmp_path):
    path = tmp_path / "net.safetensors"

    def fails(tensors, message, **options):
        with pytest.raises(UserError, match=message):
            load_classifier(write(path, tensors), **options)

    fails({"features.0.weight": np.zeros(3)}, r"no ViT and no ResNet .* \(features\.0\.weight")
    fails(resnet_tensors(), "holds resnet18_32x32, not resnet34", architecture="resnet34")
    fails(resnet_tensors(), "holds resnet18_32x32, not resnet1$", architecture="resnet1")
    fails(resnet_tensors(kernel=5), "a stem of 5 x 5; known: 7 x 7 and 3 x 3")
    deep = resnet_tensors() | {"layer3.22.conv1.weight": np.zeros(3)}
    fails(deep, r"stages of \(2, 2, 23, 2\) basic blocks; known are ResNet-18")
    fails(
        vit_tensors(),
        "heads of a ViT of width 8 with class token are in no tensor's shape; give heads",
    )
    pooled = vit_tensors(64)
    del pooled["cls_token"]
    pooled["pos_embed"] = np.ascontiguousarray(pooled["pos_embed"][:, 1:])
    fails(pooled, "width 64 without class token are in no tensor's shape; give heads")
    fails(vit_tensors(), "3 heads do not share a width of 8 evenly", heads=3)
    odd = vit_tensors()
    odd["pos_embed"] = odd["pos_embed"][:, :4]
    fails(odd, r"pos_embed \(1, 4, 8\) is no square grid with a class token", heads=2)
    registers = vit_tensors() | {"reg_token": np.zeros((1, 4, 8), np.float32)}
    fails(registers, "does not fit vit_8x2_patch4_8: left over reg_token$", heads=2)
    no_head = {n: v for n, v in vit_tensors().items() if not n.startswith("head")}
    options = {"heads": 2, "num_classes": 3, "new_head": jax.random.key(0)}
    fails(no_head, "the normalisation of its 3-channel images is not known", **options)
    fails(vit_tensors(), "give both of mean and std", heads=2, mean=[0.5])
    fails(vit_tensors(), "are no normalisation", heads=2, mean=[0.5], std=[0.0])
    fails(vit_tensors(), "image_size must be 1 or more, got 0", heads=2, image_size=0)
    fails(vit_tensors(), "not known; give mean and std", heads=2, mean=[0.5] * 2, std=[0.5] * 2)
    path = write(path, resnet_tensors())
    for name in ("resnet18", "resnet18_32x32", "resnet18_32x32.openood"):
        assert load_classifier(path, name).config.architecture == "resnet18_32x32"


def test_pickles_are_refused_whatever_they_are_called(tmp_path):
    command = "python -m oal_jax.pretrained.convert --input .* --output .*net.safetensors$"
    for name in ("net.ckpt", "net.pth", "net.bin"):
        with pytest.raises(UserError, match=command):
            load_classifier(tmp_path / name)  # never opened
    path = tmp_path / "net.safetensors"
    for start in (b"PK\x03\x04\x00\x00\x08\x08", pickle.dumps({"a": [1.5]}, protocol=2)):
        path.write_bytes(start + bytes(100))
        with pytest.raises(UserError, match=command):
            load_classifier(path)


def test_damaged_files_are_one_line(tmp_path):
    path = write(tmp_path / "net.safetensors", resnet_tensors())
    whole = path.read_bytes()
    for size in (0, 5, 300, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match="damaged, cut short or not safetensors"):
            load_classifier(path)
    write(path, resnet_tensors(), oal_jax="{")
    with pytest.raises(UserError, match="what is said of it can't be read"):
        load_classifier(path)
    archive = tmp_path / "vit.npz"
    np.savez(archive, **google_tensors(vit_tensors(), 2))
    whole = archive.read_bytes()
    for content in (b"", whole[:300], whole[:-30], b"text" * 9):
        archive.write_bytes(content)
        with pytest.raises(UserError, match="damaged, cut short or not npz"):
            load_classifier(archive)
    np.savez(archive, cls=np.array([{}], object))
    with pytest.raises(UserError, match="damaged, cut short or not npz .*allow_pickle"):
        load_classifier(archive)
    with pytest.raises(UserError, match=r"absent\.npz can't be read \(No such file"):
        load_classifier(tmp_path / "absent.npz")
    with pytest.raises(UserError, match=r"unknown ending '\.h5'; give a \.safetensors or \.npz"):
        load_classifier(tmp_path / "net.h5")


def test_converter_without_torch_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)
    argv = ["convert", "--input", "a.ckpt", "--output"]
    assert convert.guard(convert.run, [*argv, str(tmp_path / "a.safetensors")]) == 2
    assert capsys.readouterr().err.startswith(
        "oal_jax: converting a PyTorch checkpoint needs torch"
    )
    assert convert.guard(convert.run, [*argv, "a.pt"]) == 2
    assert "must end in .safetensors" in capsys.readouterr().err
    assert convert.guard(convert.run, argv[:1]) == 2
    assert capsys.readouterr().err.count("\n") == 1
