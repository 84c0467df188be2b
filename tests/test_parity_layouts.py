"""Hugging Face's layouts, special tokens and wrapped checkpoints against transformers and timm."""

import jax
import numpy as np
import pytest
import safetensors.numpy

from oal_jax.pretrained import convert
from oal_jax.pretrained.classifiers import load_classifier

pytestmark = [
    pytest.mark.parity,
    # PyTorch, timm and transformers give warnings of their own.
    pytest.mark.filterwarnings("default"),
]

SMALL = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=3, image_size=64)
HUGGING_FACE = {
    "ViT": SMALL | {"intermediate_size": 96},
    "DeiT": SMALL | {"intermediate_size": 96},
    "Dinov2": SMALL | {"patch_size": 16},
    "Dinov2WithRegisters": SMALL | {"patch_size": 16},
    "ResNet": {
        "depths": [2, 2, 2, 2],
        "embedding_size": 16,
        "hidden_sizes": [16, 32, 64, 128],
        "layer_type": "basic",
    },
    "ResNet bottleneck": {
        "depths": [3, 4, 6, 3],
        "embedding_size": 16,
        "hidden_sizes": [64, 128, 256, 512],
    },
}
TIMM = {
    "deit_tiny_distilled_patch16_224": {"depth": 2},
    "deit3_small_patch16_224": {"depth": 2},
    "vit_small_patch14_reg4_dinov2": {"depth": 2, "img_size": 224, "num_classes": 5},
    "vit_medium_patch16_reg4_gap_256": {"depth": 1},
    "vit_base_patch16_224.mae": {"depth": 1, "num_classes": 5},
    "vit_tiny_patch16_224.augreg_in21k_ft_in1k": {"depth": 1},
}


@pytest.fixture(scope="module")
def torch():
    module = pytest.importorskip("torch")
    module.set_grad_enabled(False)
    module.set_num_threads(2)
    return module


def randomised(torch, model):
    """The model with every tensor drawn, so that no part is 0 or 1."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            noise = torch.randn(tensor.shape, generator=generator)
            is_scale = name.endswith(("running_var", "gamma", "lambda1"))
            if is_scale or (name.endswith("weight") and tensor.ndim == 1):
                tensor.copy_(torch.exp(0.2 * noise))
            else:
                tensor.copy_(noise / max(tensor[0].numel(), 10) ** 0.5)
    return model.eval()


def assert_gives(torch, path, model, **options):
    """The file's classifier gives the model's logits, on pixels that are normalised alike."""
    loaded = load_classifier(path, **options)
    side = loaded.config.image_shape[0]
    images = np.random.default_rng(0).uniform(size=(2, side, side, 3)).astype(np.float32)
    mean, std = (np.float32(values) for values in loaded.config[3:])
    pixels = torch.from_numpy(((images - mean) / std).transpose(0, 3, 1, 2).copy())
    expected = model(pixels)
    expected = getattr(expected, "logits", expected).numpy()
    logits, features, _ = jax.jit(lambda forward, x: forward(x))(loaded.forward, images)
    assert expected.std() > 1e-3
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    kernel, bias = loaded.head
    np.testing.assert_allclose(np.asarray(features) @ kernel + bias, logits, rtol=1e-3, atol=1e-3)
    return loaded


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_hugging_face(torch, tmp_path, name):
    transformers = pytest.importorskip("transformers")
    kind = name.split()[0]
    config = getattr(transformers, f"{kind}Config")(**HUGGING_FACE[name], num_labels=7)
    tail = "WithTeacher" if kind == "DeiT" else ""
    model = getattr(transformers, f"{kind}ForImageClassification{tail}")(config)
    randomised(torch, model).save_pretrained(tmp_path)
    loaded = assert_gives(torch, tmp_path / "model.safetensors", model)
    if kind not in ("ViT", "ResNet"):
        assert loaded.config.mean == (0.485, 0.456, 0.406)
    processor = transformers.ViTImageProcessor(image_mean=[0.1] * 3, image_std=[0.2] * 3)
    processor.save_pretrained(tmp_path)
    again = load_classifier(tmp_path / "model.safetensors")
    assert again.config[3:] == ((0.1,) * 3, (0.2,) * 3)


@pytest.mark.parametrize("name", TIMM)
def test_timm(torch, tmp_path, name):
    timm = pytest.importorskip("timm")
    model = randomised(torch, timm.create_model(name, **TIMM[name]))
    tensors = {key: tensor.numpy().copy() for key, tensor in model.state_dict().items()}
    path = tmp_path / "weights.safetensors"
    path.write_bytes(safetensors.numpy.save(tensors))
    heads = model.blocks[0].attn.num_heads
    loaded = assert_gives(torch, path, model, heads=heads)
    published = timm.get_pretrained_cfg(name)
    stated = load_classifier(path, mean=published.mean, std=published.std, heads=heads)
    asked = load_classifier(path, "vit.mae" if "mae" in name else None, heads=heads)
    assert asked.config[3:] == stated.config[3:], loaded.config


@pytest.mark.parametrize("name", ["averaged", "Lightning", "half"])
def test_checkpoints_by_the_converter(torch, tmp_path, capsys, name):
    torchvision = pytest.importorskip("torchvision")
    model = randomised(torch, torchvision.models.resnet18(num_classes=5))
    state = model.state_dict()
    if name == "averaged":
        content = torch.optim.swa_utils.AveragedModel(model).state_dict()
    elif name == "Lightning":
        wrapped = {f"model.{key}": tensor for key, tensor in state.items()}
        content = {"state_dict": wrapped | {"criterion.weight": torch.ones(5)}, "epoch": 3}
    else:
        content = {k: t.half() if t.is_floating_point() else t for k, t in state.items()}
        model.load_state_dict(content)
    torch.save(content, tmp_path / "net.pth")
    path = tmp_path / "net.safetensors"
    argv = ["convert", "--input", str(tmp_path / "net.pth"), "--output", str(path)]
    assert convert.guard(convert.run, argv) == 0
    left_out = {"averaged": "n_averaged", "Lightning": "criterion.weight"}.get(name)
    printed = capsys.readouterr().err
    assert left_out in printed if left_out else not printed
    assert_gives(torch, path, model)


def test_tensors_that_are_no_plain_numbers_are_named(torch, tmp_path, capsys):
    weights = {"conv1.weight": torch.ones(8, 3, 3, 3), "fc.weight": torch.ones(10, 64)}
    cases = {
        "fc.weight (float8_e4m3fn)": {k: v.to(torch.float8_e4m3fn) for k, v in weights.items()},
        "mask (sparse)": weights | {"mask": torch.eye(3).to_sparse()},
        "q (quantised)": weights
        | {"q": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)},
    }
    for message, content in cases.items():
        torch.save(content, tmp_path / "net.pth")
        argv = ["--input", str(tmp_path / "net.pth"), "--output", str(tmp_path / "n.safetensors")]
        assert convert.guard(convert.run, ["convert", *argv]) == 2
        printed = capsys.readouterr().err
        assert message in printed and printed.count("\n") == 1
