"""Classifiers from files: round trips, heads, use in a detector, and files that do not fit."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from classifier_files import assert_same, numpy_vit, resnet_tensors, vit_tensors, write
from flax.traverse_util import flatten_dict

import oal_jax
from oal_jax.errors import UserError
from oal_jax.models.resnet import ResNet
from oal_jax.models.vit import VisionTransformer
from oal_jax.models.wide_resnet import WideResNet
from oal_jax.pretrained.classifiers import describe, export_timm, load_classifier, save_timm

NETS = [
    ResNet(7, width=8, stem="cifar", mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6)),
    ResNet(7, width=8, stem="imagenet", mean=(0.2,), std=(0.3,)),
    ResNet(7, width=4, affine_bn=False),
    VisionTransformer(5, 7, 18, 2, 3, 2.5, mean=(0.2,), std=(0.3,)),
    VisionTransformer(5, 4, 8, 2, 2, 4.0, (0.2,), (0.3,), False, True, False, "norm_mean"),
]


@pytest.mark.parametrize("net", NETS, ids=lambda n: f"{type(n).__name__}{NETS.index(n)}")
def test_a_saved_network_is_loaded_bit_equal(tmp_path, net):
    size = 28
    image = jnp.zeros((1, size, size, len(net.mean)))
    shapes = jax.eval_shape(lambda key: net.init(key, image), jax.random.key(0))
    rng = np.random.default_rng(0)
    variables = jax.tree.map(
        lambda leaf: rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32), shapes
    )
    path = tmp_path / "deep" / "net.safetensors"
    stats = variables.get("batch_stats")
    assert save_timm(path, variables["params"], stats, net, image_size=size) == path
    loaded = load_classifier(path)
    fields = {f: getattr(loaded.net, f) for f in ("mean", "std", "num_classes", "width", "depth")}
    assert fields == {f: getattr(net, f) for f in fields}
    assert loaded.config.image_shape[:2] == (size, size)
    actual, expected = flatten_dict(loaded.variables), flatten_dict(variables)
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
    loaded = load_classifier(write(tmp_path / "net.safetensors", tensors), heads=2)
    stats = loaded.variables.get("batch_stats")
    assert_same(export_timm(loaded.variables["params"], stats, loaded.net), tensors)


def test_what_timm_does_not_have_is_not_exported(tmp_path):
    with pytest.raises(UserError, match="no ResNet with stem 'small'"):
        export_timm({}, {}, ResNet(3, stem="small"))
    with pytest.raises(UserError, match="a WideResNet is no ResNet and no VisionTransformer"):
        export_timm({}, {}, WideResNet(3))
    with pytest.raises(UserError, match=r"give a name that ends in \.safetensors"):
        save_timm(tmp_path / "net.pt", {}, {}, ResNet(3))


def test_normalisation_of_timm_s_config_beside_the_file(tmp_path):
    path = write(tmp_path / "model.safetensors", vit_tensors())
    card = {"architecture": "vit_tiny", "pretrained_cfg": {"mean": [0.1] * 3, "std": [0.2] * 3}}
    (tmp_path / "config.json").write_text(json.dumps(card))
    loaded = load_classifier(path, heads=1)
    assert loaded.config.mean == (0.1,) * 3 and loaded.net.std == (0.2,) * 3
    assert load_classifier(path, heads=1, mean=[0.3], std=[0.4]).config.mean == (0.3,)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json"):
        load_classifier(path, heads=1)


def test_a_new_head_is_drawn_from_the_key_on_request_alone(tmp_path):
    tensors = resnet_tensors()
    path = write(tmp_path / "net.safetensors", tensors)
    with pytest.raises(UserError, match="10 classes, not 4; .*new_head"):
        load_classifier(path, num_classes=4)
    first, again, other = (
        load_classifier(path, num_classes=4, new_head=jax.random.key(seed)) for seed in (0, 0, 1)
    )
    assert first.head[0].shape == (16, 4) and (first.head[1] == 0).all()
    np.testing.assert_array_equal(first.head[0], again.head[0])
    assert np.abs(first.head[0] - other.head[0]).max() > 0.01
    np.testing.assert_array_equal(
        first.variables["params"]["conv1"]["kernel"],
        tensors["conv1.weight"].transpose(2, 3, 1, 0),
    )
    del tensors["fc.weight"], tensors["fc.bias"]
    path = write(tmp_path / "net.safetensors", tensors)
    with pytest.raises(UserError, match="no head; .*num_classes and new_head"):
        load_classifier(path)
    with pytest.raises(UserError, match="no head; .*num_classes"):
        load_classifier(path, new_head=jax.random.key(0))
    with pytest.raises(UserError, match="normalisation .*mean and std"):
        load_classifier(path, num_classes=4, new_head=jax.random.key(0))
    loaded = load_classifier(path, None, 4, [0.5], [0.5], new_head=jax.random.key(0))
    assert loaded.config.num_classes == 4


def test_forward_and_head_go_into_calibrate_as_they_are(tmp_path):
    tensors = vit_tensors(depth=1)
    loaded = load_classifier(write(tmp_path / "vit.safetensors", tensors), heads=2)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)
    labels = np.arange(40) % 3
    detector = oal_jax.calibrate(
        loaded.forward, (images, labels), (images[::2], labels[::2]), "vim", loaded.head
    )
    result = detector(images)
    expected, _ = numpy_vit(tensors, images / 255, 2, 0.5, 0.5)
    np.testing.assert_array_equal(result.label, expected.argmax(-1))
    assert np.isfinite(result.ood_score).all() and np.std(result.ood_score) > 0
    for model in (loaded, str(save_timm(tmp_path / "named.safetensors", loaded.variables["params"],
                                        None, loaded.net))):  # fmt: skip
        same = oal_jax.calibrate(model, (images, labels), (images[::2], labels[::2]), "vim")
        np.testing.assert_allclose(same.threshold, detector.threshold, rtol=1e-5)


def test_sizes_without_loading(tmp_path):
    sizes = describe(write(tmp_path / "vit.safetensors", vit_tensors(64, hidden=128)))
    expected = {"width": 64, "depth": 2, "num_classes": 3, "channels": 3}
    expected |= {"patch": 4, "heads": 1, "mlp_ratio": 2.0}
    assert sizes == expected | {"architecture": "vit_64x2_patch4_8", "image_size": 8}


def test_images_of_another_shape_are_refused(tmp_path):
    loaded = load_classifier(write(tmp_path / "vit.safetensors", vit_tensors()), heads=2)
    with pytest.raises(UserError, match=r"takes \(n, 8, 8, 3\); image_size resizes"):
        loaded.forward(np.zeros((2, 16, 16, 3), np.float32))
    loaded = load_classifier(write(tmp_path / "net.safetensors", resnet_tensors()))
    with pytest.raises(UserError, match=r"takes \(n, h, w, 3\)$"):
        loaded.forward(np.zeros((2, 16, 16, 1), np.float32))


def test_tensors_that_do_not_fit_are_listed(tmp_path):
    path, tensors = tmp_path / "net.safetensors", resnet_tensors()
    tensors["fc.bias"] = tensors["fc.bias"][:3]
    tensors["extra.weight"] = np.zeros(3, np.float32)
    del tensors["layer2.1.bn1.running_var"]
    tensors["bn1.weight"] = np.zeros(2, np.int32)
    message = (
        r"net\.safetensors .*missing layer2\.1\.bn1\.running_var; left over extra\.weight; wrong"
        r" shape bn1\.weight of type int32 .*, fc\.bias \(3,\) instead of \(10,\)$"
    )
    with pytest.raises(UserError, match=message):
        load_classifier(write(path, tensors))
    for i in range(9):
        tensors[f"more.{i}"] = np.zeros(1, np.float32)
    with pytest.raises(UserError, match=r"left over [^;]*more\.3, \.\.\. \(10 in all\);"):
        load_classifier(write(path, tensors))


def test_other_networks_are_refused(tmp_path):
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
    odd["pos_embed"] = odd["pos_embed"][:, :3]
    fails(odd, r"pos_embed \(1, 3, 8\) is no square grid with a class token", heads=2)
    no_head = {n: v for n, v in vit_tensors().items() if not n.startswith("head")}
    options = {"heads": 2, "num_classes": 3, "new_head": jax.random.key(0)}
    fails(no_head, "the normalisation of its 3-channel images is not known", **options)
    fails(vit_tensors(), "give both of mean and std", heads=2, mean=[0.5])
    fails(vit_tensors(), "are no normalisation", heads=2, mean=[0.5], std=[0.0])
    for size in (0, 8.0, (8, 8), "8"):
        fails(vit_tensors(), "image_size must be a whole number", heads=2, image_size=size)
    fails(vit_tensors(), "not known; give mean and std", heads=2, mean=[0.5] * 2, std=[0.5] * 2)
    path = write(path, resnet_tensors())
    for name in ("resnet18", "resnet18_32x32", "resnet18_32x32.openood"):
        assert load_classifier(path, name).config.architecture == "resnet18_32x32"
