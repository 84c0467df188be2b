"""The dataclasses of a config: every field with its meaning, its choices and its range."""

import dataclasses
import warnings
from dataclasses import dataclass, field
from typing import Any

from oal_jax.config.methods import Method
from oal_jax.config.options import option
from oal_jax.config.outliers import Latents, Outliers

GENERATED = "generated"  # value of data.source, teacher.weights and generator.directory
PROCEDURAL, DECODED = "procedural", "decoded"  # values of outliers.images beside image sets
# The keys of `oal_jax.scores.SCORES`, here so that a config is checked before JAX starts.
SCORES = (
    *("energy", "msp", "max_logit", "temperature_scaling", "odin", "gen", "kl_matching"),
    *("openmax", "gradnorm", "react", "ash_p", "ash_b", "ash_s", "scale", "dice", "she"),
    *("knn", "nnguide", "fdbd", "vim", "residual", "neco", "mahalanobis", "relative_mahalanobis"),
    *("mahalanobis_ensemble", "mood", "mode", "gram"),
)
_DTYPES = ("float32", "bfloat16")


@dataclass
class Data:
    """What is in-distribution, and what the detector is tested on."""

    source: str = option(
        "bundled",
        "bundled: inside the package; tfds: a prepared TFDS directory; imglist: OpenOOD's own"
        " directory; own: one folder of yours, ROOT/CLASS/image; folder: several sets,"
        " ROOT/SET/SPLIT/CLASS/image; generated: random patterns, for smoke runs",
        choices=("bundled", "tfds", "imglist", "own", "folder", "generated"),
    )
    root: str = option("", "directory of the sets; empty: TFDS's own default")
    id_set: str = option("fashion", "ID set; its benchmark names the sets of the four groups below")
    near: tuple[str, ...] = option(
        (), "near-OOD sets; empty: those of the benchmark; none: no sets (also for the next three)"
    )
    far: tuple[str, ...] = option((), "far-OOD sets")
    validation: tuple[str, ...] = option((), "OOD sets for choosing hyper-parameters")
    csid: tuple[str, ...] = option((), "covariate-shifted ID sets")
    id_splits: tuple[str, ...] = option(
        (),
        "names of the ID set's training, validation and test splits in TFDS syntax, with"
        " source=tfds: train[:-5000],train[-5000:],test",
    )
    leave_out: tuple[str, ...] = option(
        (),
        "classes to take out of the ID set, by name; their test images become the near-OOD set"
        " left_out, their validation images the validation OOD set val_left_out",
    )
    image_size: int = option(
        0,
        "side in pixels; 0: by the images (own), 32 or 224 (imglist), as stored (folder), the ID"
        " set's (tfds)",
        at_least=0,
    )
    channels: int = option(
        0, "1 (gray) or 3 (colour); 0: the ID set's (tfds), 3 (image files)", choices=(0, 1, 3)
    )
    on_corrupt: str = option(
        "error", "what to do with damaged images: error, or skip them", choices=("error", "skip")
    )
    stream: bool = option(
        False, "read images whenever they are needed instead of holding them in memory"
    )
    workers: int = option(
        0, "processes of a stream that decode images; 0: threads of this one", at_least=0
    )
    train_images: int = option(0, "ID images that the student trains on; 0: all", at_least=0)
    shift: int = option(
        2, "augmentation: largest random shift in pixels, zeros padded", at_least=0, chosen=-1
    )
    flip: bool = option(True, "augmentation: random horizontal flip")


@dataclass
class Teacher:
    """The frozen classifier that is distilled."""

    weights: str = option(
        "",
        "file of a ViT (timm, torchvision, Google) or a ResNet, .safetensors or .npz, in place of"
        " the shipped weights; the sizes below are then read off it; generated: random weights of"
        " these sizes, for smoke runs",
    )
    train: bool = option(False, "train it, or fine-tune the weights of the file")
    architecture: str = option(
        "vit",
        "without weights: vit, or resnet (a ResNet-18 whose features have this width)",
        choices=("vit", "resnet"),
    )
    image_size: int = option(
        0, "side in pixels that images are resized to, with weights; 0: the file's own", at_least=0
    )
    patch: int = option(4, "side of a patch in pixels", above=0, chosen=0)
    width: int = option(128, "width of a token, and so of a feature", above=0)
    depth: int = option(4, "blocks", above=0)
    heads: int = option(4, "attention heads", above=0)
    mlp_ratio: float = option(2.0, "width of the MLP, as a multiple of the token's")
    epochs: int = option(12, "epochs of training or fine-tuning", above=0, chosen=0)
    batch_size: int = option(128, "batch size of training or fine-tuning", above=0, chosen=0)
    learning_rate: float = option(
        1e-3, "peak of the one-cycle schedule (AdamW), trained from scratch", above=0
    )
    weight_decay: float = option(0.05, "weight decay, trained from scratch")
    body_rate: float = option(
        1e-6, "fine-tuning: learning rate of the body (Adam, cosine)", above=0
    )
    head_rate: float = option(1e-4, "fine-tuning: learning rate of the head", above=0)
    views: int = option(
        4,
        "cached augmented views per image; 0: run the teacher in every step",
        at_least=0,
        chosen=-1,
    )
    dtype: str = option(
        "float32", "precision of its arithmetic (see student.dtype)", choices=_DTYPES
    )
    remat: bool = option(False, "recompute activations in the backward pass (see student.remat)")


@dataclass
class Generator:
    """The Stable Diffusion that samples latents."""

    train: bool = option(False, "train it; False: the weights that ship with the package")
    directory: str = option(
        "",
        "a Stable Diffusion v1 or v2 in place of either: its diffusers directory, or"
        " hub:ORG/NAME@COMMIT of the Hugging Face hub; its text width must be teacher.width",
    )
    class_words: tuple[str, ...] = option(
        (),
        "words for the classes in the prompts, in the order of the labels; empty: the data set's"
        ' names; brackets mark what an outlier replaces: "[kite] bird"',
    )
    backend: str = option(
        "native",
        "modules: native, or diffusers, which are FlaxUNet2DConditionModel, FlaxAutoencoderKL and"
        " FlaxCLIPTextModel (extra diffusers)",
        choices=("native", "diffusers"),
    )
    dtype: str = option(
        "float32",
        "precision of the UNet and the text encoder; the autoencoder is always float32",
        choices=_DTYPES,
    )
    vae_epochs: int = option(1, "epochs of the autoencoder's training", above=0, chosen=0)
    vae_batch_size: int = option(
        16,
        "batch size of the autoencoder's training; it needs many small steps",
        above=0,
        chosen=0,
    )
    diffusion_epochs: int = option(8, "epochs of the diffusion's training", above=0, chosen=0)
    batch_size: int = option(128, "batch size of the diffusion's training", above=0, chosen=0)


@dataclass
class Student:
    """The classifier that is trained."""

    weights: str = option(
        "",
        "file of a ViT or ResNet (timm, torchvision, Hugging Face, Google) to start from; it gives"
        " the network, in place of the next four fields",
    )
    tune: str = option(
        "all",
        "with weights: head trains a linear head on the file's features, all the whole network",
        choices=("head", "all"),
        chosen="",
    )
    architecture: str = option(
        "resnet",
        "resnet, densenet (DenseNet-BC) or wide_resnet",
        choices=("resnet", "densenet", "wide_resnet"),
    )
    depth: int = option(18, "layers; resnet: 18, 34, 50; the others: 6 n + 4, such as 40 and 100")
    width: int = option(
        16,
        "resnet: channels of the first stage; densenet: growth; wide_resnet: widening factor",
        above=0,
        chosen=0,
    )
    stem: str = option(
        "small",
        "stem of a resnet: small (3 x 3, stride 2), cifar (3 x 3), imagenet (7 x 7, pool)",
        choices=("small", "cifar", "imagenet"),
        chosen="",
    )
    affine_bn: bool = option(True, "batch normalisation with scale and offset")
    dropout: float = option(
        0.0, "dropout after convolutions of densenet and wide_resnet", at_least=0, below=1
    )
    dtype: str = option(
        "float32",
        "precision of convolutions, matrix products and activations; parameters, statistics,"
        " logits, features, losses and the optimizer are always float32",
        choices=_DTYPES,
    )
    remat: bool = option(
        False,
        "recompute each block's activations in the backward pass: the same numbers with less"
        " memory, for about a third more time",
    )


@dataclass
class Train:
    """Optimizer, schedule and loop of the student."""

    start: str = option(
        "", "directory of a finished run, or its train/student.safetensors, to start from"
    )
    epochs: int = option(6, "epochs", above=0, chosen=0)
    batch_size: int = option(128, "batch size over all devices", above=0, chosen=0)
    accumulate: int = option(
        1, "microbatches per update, one after another: the memory of one", above=0
    )
    learning_rate: float = option(0.1, "peak learning rate of the student", above=0, chosen=0)
    momentum: float = option(0.9, "momentum of SGD", at_least=0, at_most=1)
    nesterov: bool = option(True, "Nesterov momentum")
    schedule: str = option(
        "per_step",
        "when the cosine schedule moves: per_step, or per_epoch",
        choices=("per_step", "per_epoch"),
    )
    weight_decay: float = option(5e-4, "weight decay, on every tensor", at_least=0)
    warmup: float = option(0.15, "fraction of the steps of linear warm-up", at_least=0, at_most=1)
    floor: float = option(2e-6, "last multiplier of the cosine schedule", at_least=0, at_most=1)
    clip: float = option(1.0, "largest global norm of the gradient; 0: no clipping", at_least=0)
    ema: float = option(
        0.0,
        "decay of the moving average of weights and batch statistics that is evaluated and saved;"
        " 0: none",
        at_least=0,
        below=1,
    )
    log_every: int = option(20, "steps between two lines of the log", above=0)
    checkpoint_every: int = option(
        1, "epochs between two checkpoints, each with a validation", above=0, chosen=0
    )
    keep_checkpoints: int = option(2, "newest checkpoints left on disk; 0: all", at_least=0)


@dataclass
class Evaluation:
    """Which scores are computed."""

    scores: tuple[str, ...] = option(
        ("energy", "msp", "knn", "vim", "mahalanobis", "relative_mahalanobis"),
        "scores, or all; the best one on the validation OOD sets is the headline and a detector's"
        " default",
        choices=SCORES,
    )
    batch_size: int = option(
        125, "images per forward pass; few stay in a CPU's cache, accelerators want more", above=0
    )
    keep_id: float = option(
        0.95, "share of ID validation images below the threshold", above=0, below=1
    )
    search: bool = option(
        False, "choose the parameters of each score that has a grid on the validation OOD sets"
    )


@dataclass
class Mesh:
    """How the devices of all processes are laid out; changes results by rounding only."""

    model: int = option(
        1,
        "devices that share each large parameter, a divisor of those of a process; the others split"
        " the batches",
        above=0,
    )


@dataclass
class Config:
    """One experiment."""

    seed: int = option(0, "seed of all random draws")
    smoke: bool = option(False, "shrink every stage to seconds")
    data: Data = field(default_factory=Data)
    teacher: Teacher = field(default_factory=Teacher)
    generator: Generator = field(default_factory=Generator)
    outliers: Outliers = field(default_factory=Outliers)
    latents: Latents = field(default_factory=Latents)
    method: Method = field(default_factory=Method)
    student: Student = field(default_factory=Student)
    train: Train = field(default_factory=Train)
    evaluation: Evaluation = field(default_factory=Evaluation)
    mesh: Mesh = field(default_factory=Mesh)


def expand(config: Config) -> Config:
    """The config with one score an entry in `evaluation.scores`, given "energy,knn" or "all"."""
    names = getattr(config.evaluation, "scores", None)
    if not isinstance(names, tuple | list) or not all(isinstance(name, str) for name in names):
        return config  # for `validate` to complain about
    parts = [part.strip() for name in names for part in name.split(",")]
    scores = tuple(n for name in parts for n in (SCORES if name == "all" else (name,)))
    evaluation = dataclasses.replace(config.evaluation, scores=tuple(dict.fromkeys(scores)))
    return dataclasses.replace(config, evaluation=evaluation)


def reference_faults(config: Config) -> Config:
    """The config with the faults of OAL's official code, for reproducing its results.

    The k-NN selection mixes up its rows, outliers are injected at the first piece of the class word
    alone, and CLUB pairs outliers and images at random, with q trained by the same minimisation
    (docs/methods.md).
    """
    oal = dataclasses.replace(config.method.oal, objective="club")
    return dataclasses.replace(
        config,
        outliers=dataclasses.replace(config.outliers, official_code=True),
        method=dataclasses.replace(config.method, oal=oal),
    )


def unleashed(config: Config) -> bool:
    """Whether the ID cross-entropy is Unleashing Mask's."""
    return config.method.unleash or config.method.name in ("um", "umap")


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Dataclass tree to {"a.b": value}; tuples become lists, as in JSON."""
    flat = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            flat |= flatten(value, f"{prefix}{f.name}.")
        else:
            flat[prefix + f.name] = list(value) if isinstance(value, tuple) else value
    return flat


def unflatten(flat: dict[str, Any]) -> Config:
    """The config of {"a.b": value}; fields that it does not name have their defaults.

    Keys that no config has any more, as in a run of an older version, are dropped with a warning
    each.
    """
    config = Config()
    for path, value in flat.items():
        *parents, name = path.split(".")
        node: Any = config
        for parent in parents:
            node = getattr(node, parent, None)
        default = getattr(node, name, None) if dataclasses.is_dataclass(node) else None
        if default is None or dataclasses.is_dataclass(default):
            warnings.warn(f"config key '{path}' of an older version is ignored", stacklevel=2)
            continue
        setattr(node, name, tuple(value) if isinstance(value, list) else value)
    return config
