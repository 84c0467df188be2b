"""Full-size classifiers against stored logits and features of timm and torchvision.

Weights are drawn by NumPy from the tensors' names. The golden file holds names and shapes of
PyTorch's tensors, its logits and its features. `-m parity` compares the file with PyTorch;
`python tests/test_golden_classifiers.py` writes it.
"""

import json
import math
import zlib
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy
from safetensors import safe_open

from oal_jax.pretrained.classifiers import load_classifier

GOLDEN = Path(__file__).parent / "golden" / "classifiers.safetensors"
TOLERANCE = 1e-4
LIBRARIES = {
    "vit_tiny_patch16_224": "timm",
    "vit_base_patch16_224": "timm",
    "resnet18": "torchvision",
    "resnet50": "torchvision",
}
HALF = (0.5, 0.5, 0.5)  # mean and standard deviation of the images


def draw(name, shape):
    """Random values that depend on the name alone; activations keep their scale."""
    noise = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape, np.float32)
    if name.endswith("running_var") or (name.endswith("weight") and len(shape) == 1):
        return np.exp(0.2 * noise)
    if len(shape) == 1 or name in ("cls_token", "pos_embed"):
        return 0.1 * noise
    return noise / np.float32(math.sqrt(math.prod(shape[1:])))


def tensors_of(shapes):
    tensors = {name: draw(name, tuple(shape)) for name, shape in shapes.items() if shape}
    counters = {name: np.zeros((), np.int64) for name, shape in shapes.items() if not shape}
    return tensors | counters


def images():
    return np.random.default_rng(0).uniform(size=(2, 224, 224, 3)).astype(np.float32)


def of_pytorch(name):
    """Names and shapes of PyTorch's tensors, its logits and its features."""
    torch = pytest.importorskip("torch")
    module = pytest.importorskip(LIBRARIES[name])
    create = module.create_model if LIBRARIES[name] == "timm" else module.models.get_model
    model = create(name).eval()
    shapes = {key: list(tensor.shape) for key, tensor in model.state_dict().items()}
    state = {key: torch.from_numpy(np.array(t)) for key, t in tensors_of(shapes).items()}
    model.load_state_dict(state, strict=True)
    features = []
    head = model.head if hasattr(model, "head") else model.fc
    head.register_forward_pre_hook(lambda _, args: features.append(args[0]))
    with torch.no_grad():
        logits = model(torch.from_numpy((2 * images() - 1).transpose(0, 3, 1, 2).copy()))
    return shapes, logits.numpy(), features[0].numpy().copy()  # whole rows, not a view


def assert_close(actual, expected):
    assert np.abs(expected).std() > 1e-3
    atol = TOLERANCE * np.abs(expected).max()
    np.testing.assert_allclose(actual, expected, rtol=TOLERANCE, atol=atol)


def stored(name):
    with safe_open(GOLDEN, framework="numpy") as file:
        shapes = json.loads(file.metadata()[name])
        return shapes, file.get_tensor(f"{name}.logits"), file.get_tensor(f"{name}.features")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=pytest.mark.slow if "base" in n or "50" in n else ())
        for n in LIBRARIES
    ],
)
def test_logits_and_features_are_those_of_pytorch(tmp_path, name):
    shapes, logits, features = stored(name)
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors.numpy.save(tensors_of(shapes)))
    classifier = load_classifier(path, mean=HALF, std=HALF)
    run = jax.jit(lambda forward, x: forward(x)[:2])
    for values, expected in zip(run(classifier.forward, images()), (logits, features), strict=True):
        assert_close(values, expected)


@pytest.mark.parity
@pytest.mark.filterwarnings("default")  # PyTorch and timm give warnings of their own
@pytest.mark.parametrize("name", LIBRARIES)
def test_the_file_holds_the_numbers_of_pytorch(name):
    (shapes, *values), (old_shapes, *old) = of_pytorch(name), stored(name)
    assert shapes == old_shapes
    for value, before in zip(values, old, strict=True):
        assert_close(value, before)


if __name__ == "__main__":
    tensors, metadata = {}, {}
    for name in LIBRARIES:
        shapes, logits, features = of_pytorch(name)
        tensors |= {f"{name}.logits": logits, f"{name}.features": features}
        metadata[name] = json.dumps(shapes)
    GOLDEN.write_bytes(safetensors.numpy.save(tensors, metadata=metadata))
