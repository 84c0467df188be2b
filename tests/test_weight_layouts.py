"""Files of weights: wrappers, Hugging Face's names, special tokens, normalisation."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from classifier_files import (
    IMAGENET,
    assert_gives,
    hugging_face_resnet,
    hugging_face_vit,
    images_of,
    numpy_resnet,
    numpy_vit,
    resnet_tensors,
    vit_tensors,
    write,
)

from oal_jax.errors import UserError
from oal_jax.pretrained.classifiers import load_classifier, save_timm
from oal_jax.pretrained.tensor_files import read

HALF = ((0.5,) * 3, (0.5,) * 3)


def token_vit(*names, positions=0, wide=False):
    """timm's tensors with more tokens; `positions` of them have position embeddings."""
    tensors, rng = vit_tensors(grid=4), np.random.default_rng(7)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
    for name in names:
        tensors[name] = normal(1, 1 if name == "dist_token" else 4, 8)
    tensors["pos_embed"] = normal(1, 16 + positions, 8)
    if "dist_token" in names:
        tensors |= {"head_dist.weight": normal(3, 8), "head_dist.bias": normal(3)}
    if wide:
        tensors["head.weight"] = normal(3, 16)
    return tensors


def with_layer_scale(tensors):
    scales = {f"blocks.{i}.ls{j}.gamma": np.full(8, 0.5 + i + j, np.float32)
              for i in (0, 1) for j in (1, 2)}  # fmt: skip
    return tensors | scales


LAYOUTS = {
    "DeiT distilled": (token_vit("dist_token", positions=2), None, IMAGENET),
    "DeiT-3": (token_vit(), None, HALF),
    "registers": (with_layer_scale(token_vit("reg_token")), None, IMAGENET),
    "registers with positions": (token_vit("reg_token", positions=5), None, HALF),
    "HF ViT": (vit_tensors(grid=4), "vit", HALF),
    "HF DeiT": (vit_tensors(grid=4), "deit", IMAGENET),
    "HF DeiT distilled": (token_vit("dist_token", positions=2), "deit", IMAGENET),
    "HF DINOv2": (with_layer_scale(token_vit(positions=1, wide=True)), "dinov2", IMAGENET),
    "HF DINOv2 with registers": (
        with_layer_scale(token_vit("reg_token", positions=1, wide=True)),
        "dinov2_with_registers",
        IMAGENET,
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_of_vits(tmp_path, name):
    tensors, model, (mean, std) = LAYOUTS[name]
    written = tensors if model is None else hugging_face_vit(tensors, model)
    path = write(tmp_path / "vit.safetensors", written)
    loaded = load_classifier(path, heads=2)
    assert loaded.config[3:] == (mean, std)
    images = images_of(loaded)
    expected = numpy_vit(tensors, images, 2, np.array(mean), np.array(std))
    maps = assert_gives(loaded, images, expected)
    assert [layer.shape for layer in maps] == [(2, 4, 4, 8)] * 3
    assert loaded.head[0].shape == (expected[1].shape[1], 3)
    new = load_classifier(path, heads=2, num_classes=5, new_head=jax.random.key(0))
    assert new.head[0].shape == (expected[1].shape[1], 5)


def test_registers_go_back_to_timm(tmp_path):
    tensors = LAYOUTS["registers"][0]
    loaded = load_classifier(write(tmp_path / "vit.safetensors", tensors), heads=2)
    again = save_timm(tmp_path / "again.safetensors", loaded.variables["params"], None, loaded.net)
    assert safetensors.numpy.load_file(again).keys() == tensors.keys()
    images = images_of(loaded)
    for one, two in zip(loaded.forward(images)[:2], load_classifier(again).forward(images)[:2],
                        strict=True):  # fmt: skip
        np.testing.assert_array_equal(one, two)
    smaller = load_classifier(again, image_size=8)
    assert smaller.variables["params"]["pos_embed"].shape == (1, 4, 8)
    distilled = write(tmp_path / "deit.safetensors", LAYOUTS["DeiT distilled"][0])
    loaded = load_classifier(distilled, heads=2)
    with pytest.raises(UserError, match="no head on the pool token_pair"):
        save_timm(tmp_path / "no.safetensors", loaded.variables["params"], None, loaded.net)


@pytest.mark.parametrize("depth", [18, pytest.param(50, marks=pytest.mark.slow)])
def test_hugging_face_s_resnet(tmp_path, depth):
    tensors = resnet_tensors(depth, kernel=7)
    path = write(tmp_path / "model.safetensors", hugging_face_resnet(tensors))
    loaded = load_classifier(path)
    images = images_of(loaded, size=32)
    mean, std = map(np.array, IMAGENET)
    assert_gives(loaded, images, numpy_resnet(tensors, images, mean, std))


def test_a_backbone_of_hugging_face_has_no_head(tmp_path):
    tensors = {n: v for n, v in hugging_face_vit(vit_tensors()).items() if "classifier" not in n}
    extra = {"pooler.dense.weight": np.zeros((8, 8)), "embeddings.mask_token": np.zeros((1, 1, 8))}
    bare = {name.removeprefix("vit."): value for name, value in tensors.items()} | extra
    path = write(tmp_path / "model.safetensors", bare)
    with pytest.raises(UserError, match="no head; give num_classes and new_head"):
        load_classifier(path, heads=2)
    key = jax.random.key(0)
    loaded = load_classifier(path, heads=2, num_classes=4, new_head=key)
    assert loaded.config.mean == HALF[0] and loaded.head[0].shape == (8, 4)


WRAPPERS = {
    "DataParallel": ("module.", {}),
    "compiled": ("_orig_mod.", {}),
    "Lightning, compiled": ("model._orig_mod.", {"criterion.weight": np.ones(10, np.float32)}),
    "averaged": ("module.", {"n_averaged": np.array(3)}),
    "EMA": ("ema.module.", {"initted": np.array(1), "step": np.array(9)}),
}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((name, "resnet") for name in WRAPPERS),
        ("compiled", "vit"),
        ("Lightning, compiled", "hugging face"),
    ],
)
def test_wrappers_are_removed_and_what_is_left_out_is_said(tmp_path, capsys, kind, name):
    prefix, others = WRAPPERS[name]
    tensors = resnet_tensors() if kind == "resnet" else vit_tensors()
    tensors = hugging_face_vit(tensors) if kind == "hugging face" else tensors
    options = {} if kind == "resnet" else {"heads": 2}
    plain = load_classifier(write(tmp_path / "plain.safetensors", tensors), **options)
    capsys.readouterr()
    wrapped = {f"{prefix}{n}": v for n, v in tensors.items()} | others
    loaded = load_classifier(write(tmp_path / "net.safetensors", wrapped), **options)
    jax.tree.map(np.testing.assert_array_equal, loaded.variables, plain.variables)
    said = [x for x in capsys.readouterr().err.splitlines() if "left out" in x]
    assert len(said) == bool(others) and all(name in said[0] for name in others)


def test_two_networks_are_named(tmp_path):
    both = {f"{p}.{n}": v for p in ("model", "ema_model") for n, v in resnet_tensors().items()}
    with pytest.raises(UserError, match=r"several networks, under 'ema_model\.', 'model\.'"):
        load_classifier(write(tmp_path / "net.safetensors", both))
    swin = {"patch_embed.proj.weight": np.ones((8, 3, 4, 4), np.float32)}
    swin |= {f"layers.{i}.blocks.0.norm1.weight": np.ones(8, np.float32) for i in range(4)}
    with pytest.raises(UserError, match=r"net\.safetensors: (missing|no ViT)"):
        load_classifier(write(tmp_path / "net.safetensors", swin))


CARDS = {
    "timm": ("config.json", {"pretrained_cfg": {"mean": [0.1] * 3, "std": [0.2] * 3}}),
    "Hugging Face": ("preprocessor_config.json", {"image_mean": [0.1] * 3, "image_std": [0.2] * 3}),
}


@pytest.mark.parametrize("name", CARDS)
def test_the_card_beside_a_file_of_any_name(tmp_path, name):
    path = write(tmp_path / "weights of mine.safetensors", vit_tensors())
    card, content = CARDS[name]
    (tmp_path / card).write_text(json.dumps(content), "utf-8-sig")
    assert load_classifier(path, heads=2).config[3:] == ((0.1,) * 3, (0.2,) * 3)
    assert load_classifier(path, heads=2, mean=0.3, std=[0.4] * 3).net.mean == (0.3,) * 3


def test_the_card_s_heads_architecture_and_activation(tmp_path):
    path = write(tmp_path / "net.safetensors", vit_tensors())
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"do_normalize": False}))
    card = tmp_path / "config.json"
    card.write_text(json.dumps({"num_attention_heads": 4, "hidden_act": "gelu"}))
    loaded = load_classifier(path)
    assert loaded.net.heads == 4 and loaded.config[3:] == ((0.0,) * 3, (1.0,) * 3)
    (tmp_path / "preprocessor_config.json").unlink()
    card.write_text(json.dumps({"architecture": "deit_tiny_patch16_224"}))
    assert load_classifier(path, heads=2).config[3:] == IMAGENET
    card.write_text(json.dumps({"num_attention_heads": 4, "hidden_act": "quick_gelu"}))
    with pytest.raises(UserError, match="quick_gelu"):
        load_classifier(path)
    card.write_text(json.dumps({"data": {"id_set": "fashion"}}))  # of a run
    assert load_classifier(path, heads=2).config[3:] == HALF


def test_what_an_architecture_is_normalised_by(tmp_path, capsys):
    path = write(tmp_path / "net.safetensors", vit_tensors())
    for name in ("deit", "deit_8x2_patch4_8", "deit3_8x2", "vit_8x2_patch4.mae", "vit_8x2.dino"):
        assert load_classifier(path, name, heads=2).config[3:] == IMAGENET
    assert not capsys.readouterr().err
    assert load_classifier(path, "vit_8x2_patch4_8.augreg_in21k", heads=2).config[3:] == HALF
    assert "mean and std 0.5 are assumed" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"holds vit_8x2_patch4_8, not deit_tiny"):
        load_classifier(path, "deit_tiny", heads=2)
    with pytest.raises(UserError, match=r"0 to 255; give mean=\[0.4851\], std=\[0.2275\]"):
        load_classifier(path, heads=2, mean=123.7, std=58)
    for mean in ("imagenet", ["a"] * 3, {"mean": 1}):
        with pytest.raises(UserError, match="no numbers per channel"):
            load_classifier(path, heads=2, mean=mean, std=0.5)


def test_tensors_of_other_number_types_are_named(tmp_path):
    tensors = vit_tensors()
    eight = {n: v.astype(jnp.float8_e4m3fn) for n, v in tensors.items() if n == "head.weight"}
    path = write(tmp_path / "net.safetensors", tensors | eight)
    with pytest.raises(UserError, match=r"8-bit.*head\.weight \(F8_E4M3\)"):
        read(path)


def test_pointers_of_git_lfs_are_named(tmp_path):
    from oal_jax.pretrained import convert

    text = "version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 9\n"
    for name in ("net.safetensors", "net.npz"):
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match=rf"{name} is a git-lfs pointer"):
            load_classifier(tmp_path / name)
    (tmp_path / "net.pth").write_text(text)
    with pytest.raises(UserError, match=r"net\.pth is a git-lfs pointer"):
        convert.convert(tmp_path / "net.pth", tmp_path / "out.safetensors")
