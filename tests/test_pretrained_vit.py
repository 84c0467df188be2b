"""Vision Transformers from files of timm, torchvision and Google, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from classifier_files import (
    IMAGENET,
    assert_gives,
    assert_same,
    google_tensors,
    images_of,
    numpy_vit,
    vit_tensors,
    write,
)

from oal_jax.errors import UserError
from oal_jax.pretrained import vit
from oal_jax.pretrained.classifiers import load_classifier, save_timm
from oal_jax.pretrained.tensor_files import TensorFile

VARIANTS = {
    "no qkv bias": "token",
    "layer scale": "token",
    "no class token": "norm_mean",
    "fc_norm": "mean_norm",
}


@pytest.mark.parametrize(("patch", "channels"), [(4, 3), (2, 1)])
def test_vit_equals_numpy_from_timm_s_tensors(tmp_path, patch, channels):
    tensors = vit_tensors(patch=patch, channels=channels)
    path = write(tmp_path / "vit.safetensors", tensors)
    moments = None if channels == 3 else [0.4], None if channels == 3 else [0.2]
    loaded = load_classifier(path, mean=moments[0], std=moments[1], heads=2)
    assert loaded.config.architecture == f"vit_8x2_patch{patch}_{2 * patch}"
    assert loaded.config.image_shape == (2 * patch, 2 * patch, channels)
    mean, std = (0.5, 0.5) if channels == 3 else (0.4, 0.2)
    images = images_of(loaded)
    maps = assert_gives(loaded, images, numpy_vit(tensors, images, 2, mean, std))
    # Maps: the embedded patches and both blocks, without the class token.
    assert [layer.shape for layer in maps] == [(2, 2, 2, 8)] * 3


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
    loaded = load_classifier(write(tmp_path / "vit.safetensors", tensors), heads=2)
    assert loaded.net.pool == VARIANTS[variant]
    images = images_of(loaded)
    assert_gives(loaded, images, numpy_vit(tensors, images, 2, np.array(mean), np.array(std)))
    again = save_timm(tmp_path / "again.safetensors", loaded.variables["params"], None, loaded.net)
    assert_same(safetensors.numpy.load_file(again), tensors)


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
    loaded = load_classifier(write(tmp_path / "vit.safetensors", renamed), heads=2)
    images = images_of(loaded)
    mean, std = map(np.array, IMAGENET)
    assert_gives(loaded, images, numpy_vit(tensors, images, 2, mean, std))


@pytest.mark.parametrize("root", ["", "opt/target/"])
def test_google_s_npz_has_its_heads_in_its_shapes(tmp_path, root):
    tensors = vit_tensors()
    state = {"opt/state/step": np.array(3)} if root else {}
    path = tmp_path / "vit.npz"
    np.savez(path, **google_tensors(tensors, 4, root), **state)
    loaded = load_classifier(path)
    assert loaded.net.heads == 4
    images = images_of(loaded)
    assert_gives(loaded, images, numpy_vit(tensors, images, 4, 0.5, 0.5))


def test_google_s_pre_logits_are_dropped_with_the_head(tmp_path):
    tensors = google_tensors(vit_tensors(), 2)
    tensors |= {"pre_logits/kernel": np.eye(8, dtype=np.float32), "pre_logits/bias": np.zeros(8)}
    np.savez(tmp_path / "vit.npz", **tensors)
    with pytest.raises(UserError, match="left over pre_logits/kernel, pre_logits/bias$"):
        load_classifier(tmp_path / "vit.npz")
    loaded = load_classifier(tmp_path / "vit.npz", num_classes=5, new_head=jax.random.key(0))
    assert loaded.config.num_classes == 5 and loaded.head[0].shape == (8, 5)
    np.testing.assert_array_equal(loaded.variables["params"]["norm"]["bias"], tensors[
        "Transformer/encoder_norm/bias"])  # fmt: skip


@pytest.mark.parametrize(("width", "depth", "heads"), [(192, 12, 3), (1280, 32, 16), (128, 1, 2)])
def test_heads_are_those_of_the_known_sizes(tmp_path, width, depth, heads):
    tensors = vit_tensors(width, 1, hidden=4)
    of_block = {n: v for n, v in tensors.items() if n.startswith("blocks.0.")}
    for i in range(1, depth):
        tensors |= {n.replace("blocks.0.", f"blocks.{i}."): v for n, v in of_block.items()}
    assert vit.infer(TensorFile(tmp_path, tensors, {}), None)["heads"] == heads


def test_hidden_width_is_exact(tmp_path):
    """The network multiplies by the ratio and rounds down."""
    for hidden in range(1, 60):
        tensors = vit_tensors(width=12, depth=1, hidden=hidden)
        ratio = vit.infer(TensorFile(tmp_path, tensors, {}), 2)["mlp_ratio"]
        assert int(12 * ratio) == hidden


def test_half_precision_is_cast(tmp_path):
    tensors = vit_tensors()
    halved = {n: v.astype(jnp.bfloat16 if "norm" in n else np.float16) for n, v in tensors.items()}
    loaded = load_classifier(write(tmp_path / "vit.safetensors", halved), heads=2)
    leaves = jax.tree.leaves(loaded.variables)
    assert {leaf.dtype for leaf in leaves} == {np.dtype(np.float32)}
    np.testing.assert_array_equal(
        loaded.variables["params"]["norm"]["scale"], halved["norm.weight"].astype(np.float32)
    )


def test_position_embeddings_are_resized_and_a_plane_stays_a_plane(tmp_path):
    tensors = vit_tensors(grid=6)
    rows, columns = np.mgrid[:6, :6] + 0.5
    plane = np.stack([rows / 6, columns / 6] * 4, -1).reshape(1, 36, 8)
    tensors["pos_embed"] = np.concatenate([tensors["pos_embed"][:, :1], plane], 1, dtype=np.float32)
    path = write(tmp_path / "vit.safetensors", tensors)
    loaded = load_classifier(path, heads=2, image_size=48)
    assert loaded.config.image_shape == (48, 48, 3) and loaded.config.architecture.endswith("_48")
    resized = np.asarray(loaded.variables["params"]["pos_embed"])
    np.testing.assert_array_equal(resized[:, 0], tensors["pos_embed"][:, 0])
    rows, columns = np.mgrid[:12, :12] + 0.5
    expected = np.stack([rows / 12, columns / 12] * 4, -1)
    inner = np.s_[3:-3, 3:-3]  # the border is extrapolated
    np.testing.assert_allclose(resized[0, 1:].reshape(12, 12, 8)[inner], expected[inner], atol=1e-5)
    assert jax.eval_shape(loaded.forward, images_of(loaded))[0].shape == (2, 3)
    with pytest.raises(UserError, match="image_size 30 .* 4 px"):
        load_classifier(path, heads=2, image_size=30)


@pytest.mark.parametrize(
    "name", ["pos_embed", "patch_embed.proj.weight", "blocks.0.mlp.fc1.weight"]
)
def test_tensors_that_determine_the_sizes_are_required(tmp_path, name):
    tensors = vit_tensors()
    del tensors[name]
    with pytest.raises(UserError, match=f"missing {name}"):
        load_classifier(write(tmp_path / "vit.safetensors", tensors))
    tensors = vit_tensors() | {name: np.zeros(3, np.float32)}
    with pytest.raises(UserError, match=rf"wrong shape {name} \(3,\)"):
        load_classifier(write(tmp_path / "vit.safetensors", tensors))
