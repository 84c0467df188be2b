"""Weight files of classifiers for the tests, and their networks in NumPy, written without ours."""

import re

import jax
import numpy as np
import safetensors.numpy
from scipy.special import erf

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def write(path, tensors, **metadata):
    path.write_bytes(safetensors.numpy.save(tensors, metadata or None))
    return path


def random_tensors(shapes, seed=0):
    """Random tensors of these names and shapes; variances are positive."""
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
    """A ResNet's tensors by the published names."""
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
    """A ViT's tensors by timm's names."""
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


def google_tensors(tensors, heads, root=""):
    """timm's tensors by the names and shapes of Google's checkpoints."""
    width = tensors["pos_embed"].shape[-1]
    split = (heads, width // heads)
    renamed = {
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
            renamed[f"{new}/{theirs}/scale"] = tensors[f"{old}.{ours}.weight"]
            renamed[f"{new}/{theirs}/bias"] = tensors[f"{old}.{ours}.bias"]
        for ours, theirs in (("fc1", "Dense_0"), ("fc2", "Dense_1")):
            renamed[f"{new}/MlpBlock_3/{theirs}/kernel"] = tensors[f"{old}.mlp.{ours}.weight"].T
            renamed[f"{new}/MlpBlock_3/{theirs}/bias"] = tensors[f"{old}.mlp.{ours}.bias"]
        attention = f"{new}/MultiHeadDotProductAttention_1"
        for j, part in enumerate(("query", "key", "value")):
            rows = slice(j * width, (j + 1) * width)
            kernel = tensors[f"{old}.attn.qkv.weight"][rows].T.reshape(width, *split)
            renamed[f"{attention}/{part}/kernel"] = kernel
            bias = tensors[f"{old}.attn.qkv.bias"][rows].reshape(split)
            renamed[f"{attention}/{part}/bias"] = bias
        renamed[f"{attention}/out/kernel"] = tensors[f"{old}.attn.proj.weight"].T.reshape(
            *split, width
        )
        renamed[f"{attention}/out/bias"] = tensors[f"{old}.attn.proj.bias"]
    return {f"{root}{name}": value for name, value in renamed.items()}


def hugging_face_vit(tensors, model="vit"):
    """timm's tensors by the names of Hugging Face's `...ForImageClassification`."""
    dinov2 = model.startswith("dinov2")
    renames = [
        (r"^cls_token", "embeddings.cls_token"),
        (r"^dist_token", "embeddings.distillation_token"),
        (r"^reg_token", "embeddings.register_tokens"),
        (r"^pos_embed", "embeddings.position_embeddings"),
        (r"^patch_embed\.proj", "embeddings.patch_embeddings.projection"),
        (r"^blocks", "encoder.layer"),
        (r"attn\.proj", "attention.output.dense"),
        *(() if dinov2 else [(r"mlp\.fc1", "intermediate.dense"), (r"mlp\.fc2", "output.dense")]),
        *(() if dinov2 else [(r"norm1", "layernorm_before"), (r"norm2", "layernorm_after")]),
        (r"ls(\d)\.gamma", r"layer_scale\1.lambda1"),
        (r"^norm", "layernorm"),
    ]
    renamed = {}
    for name, value in tensors.items():
        if name.startswith("head"):
            head = "distillation" if "dist" in name else "cls" if "dist_token" in tensors else ""
            renamed[f"{head}_classifier.{name.split('.')[1]}".lstrip("_")] = value
            continue
        for old, new in renames:
            name = re.sub(old, new, name)
        if "attn.qkv" in name:
            for part, array in zip(("query", "key", "value"), np.split(value, 3), strict=True):
                of = name.replace("attn.qkv", f"attention.attention.{part}")
                renamed[f"{model}.{of}"] = array
        else:
            renamed[f"{model}.{name}"] = value
    return renamed


def hugging_face_resnet(tensors):
    """torchvision's tensors by the names of Hugging Face's `ResNetForImageClassification`."""
    kinds = {"conv": "convolution", "bn": "normalization"}
    renamed = {}
    for name, value in tensors.items():
        name = re.sub(r"^(conv|bn)1\.", lambda m: f"embedder.embedder.{kinds[m[1]]}.", name)
        name = re.sub(
            r"^layer(\d)\.(\d+)\.",
            lambda m: f"encoder.stages.{int(m[1]) - 1}.layers.{m[2]}.",
            name,
        )
        name = re.sub(
            r"\.(conv|bn)(\d)\.", lambda m: f".layer.{int(m[2]) - 1}.{kinds[m[1]]}.", name
        )
        name = name.replace("downsample.0", "shortcut.convolution")
        name = name.replace("downsample.1", "shortcut.normalization")
        renamed["classifier.1" + name[2:] if name.startswith("fc.") else f"resnet.{name}"] = value
    return renamed


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
    names = [name for name in ("cls_token", "dist_token", "reg_token") if name in t]
    before = np.concatenate([np.zeros((1, 0, tokens.shape[-1])), *(t[name] for name in names)], 1)
    first = before.shape[1]
    # The last positions are those of the patches; those before, if any, of the first tokens.
    with_position = t["pos_embed"].shape[1] - tokens.shape[1]
    before[:, :with_position] += t["pos_embed"][:, :with_position]
    x = tokens + t["pos_embed"][:, with_position:]
    x = np.concatenate([np.repeat(before, count, 0), x], 1)
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
        x = norm(x, "norm")
        features = x[:, 0] if first else x.mean(1)
    if "head_dist.weight" in t:
        features = np.concatenate([x[:, 0], x[:, 1]], 1)
        return (layer(x[:, 0], "head") + layer(x[:, 1], "head_dist")) / 2, features
    if t["head.weight"].shape[1] == 2 * width:
        features = np.concatenate([x[:, 0], x[:, first:].mean(1)], 1)
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
    """Compares with (logits, features); returns the feature maps."""
    logits, features, maps = jax.jit(lambda forward, x: forward(x))(classifier.forward, images)
    np.testing.assert_allclose(logits, expected[0], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(features, expected[1], rtol=1e-4, atol=1e-4)
    kernel, bias = classifier.head
    np.testing.assert_allclose(np.asarray(features) @ kernel + bias, logits, atol=1e-4)
    return maps


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        if not name.endswith("num_batches_tracked"):
            np.testing.assert_array_equal(actual[name], value, err_msg=name)
