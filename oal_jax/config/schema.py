"""The dataclasses of a config: one field a line, each with what it means."""

import dataclasses
import difflib
from dataclasses import dataclass, field
from typing import Any

from oal_jax.config.methods import Adapt as Adapt
from oal_jax.config.methods import Exposure as Exposure
from oal_jax.config.methods import Method as Method
from oal_jax.config.methods import Virtual as Virtual
from oal_jax.config.methods import Wild as Wild
from oal_jax.config.outliers import Adapter as Adapter
from oal_jax.config.outliers import Crossing as Crossing
from oal_jax.config.outliers import Guide as Guide
from oal_jax.config.outliers import Knn as Knn
from oal_jax.config.outliers import Latents as Latents
from oal_jax.config.outliers import Outliers as Outliers
from oal_jax.config.outliers import Select as Select
from oal_jax.config.outliers import guided, selected
from oal_jax.errors import UserError


@dataclass
class Data:
    """What is in-distribution, and what the detector is tested on."""

    # "bundled": inside the package; "tfds": a prepared TFDS directory; "imglist": OpenOOD's own
    # directory; "folder": ROOT/SET/SPLIT/CLASS/image, for one's own sets (oal_jax/data/openood.py);
    # "generated": random patterns, for smoke runs.
    source: str = "bundled"
    root: str = ""  # directory of the sets; empty: TFDS's own default
    id_set: str = "fashion"  # its benchmark names the sets of the four groups below
    near: tuple[str, ...] = ()  # near-OOD sets; empty: those of the benchmark; ("none",): no sets
    far: tuple[str, ...] = ()  # far-OOD sets; likewise
    validation: tuple[str, ...] = ()  # OOD sets for choosing hyper-parameters; likewise
    csid: tuple[str, ...] = ()  # covariate-shifted ID sets; likewise
    # Of "tfds": what the ID set's train, validation and test splits are called, as TFDS writes it:
    # train[:-5000],train[-5000:],test; empty: these three names. Of another set: NAME@SPLIT.
    id_splits: tuple[str, ...] = ()
    # Classes that are taken out of the ID set, by name; their images become the near-OOD set
    # left_out (of the test split) and the validation OOD set val_left_out.
    leave_out: tuple[str, ...] = ()
    # Side in pixels; 0: 32 or 224 ("imglist"), as stored ("folder"), the ID set's ("tfds").
    image_size: int = 0
    on_corrupt: str = "error"  # of damaged images: "error", or "skip" them
    # Images are read whenever they are needed, by Grain, and not held in memory; not of "bundled".
    stream: bool = False
    workers: int = 0  # processes of a stream that decode images; 0: threads of this one
    train_images: int = 0  # ID train images the student uses; 0: all of the split "train"
    shift: int = 2  # augmentation: random shift by up to this many pixels, zeros padded
    flip: bool = True  # augmentation: random horizontal flip


@dataclass
class Teacher:
    """The frozen Vision Transformer."""

    # A file of a ViT (timm, torchvision, Google) or a ResNet, .safetensors or .npz, that stands in
    # for the shipped weights; the sizes below are then read off it. "generated": one of random
    # weights and these sizes, for smoke runs.
    weights: str = ""
    # False: as the package, or the file, has the weights; True: trained anew, or fine-tuned.
    train: bool = False
    image_size: int = 0  # of weights: pixels a side that images are resized to; 0: the file's own
    patch: int = 4  # pixels
    width: int = 128  # of a token, and so of a feature
    depth: int = 4  # blocks
    heads: int = 4
    mlp_ratio: float = 2.0
    epochs: int = 12
    batch_size: int = 128
    learning_rate: float = 1e-3  # peak of a one-cycle schedule, AdamW; without weights
    weight_decay: float = 0.05
    body_rate: float = 1e-6  # of fine-tuning: Adam, a cosine down to 1e-4 of it
    head_rate: float = 1e-4  # of the head, likewise
    # Of training: weight of the cosines between features and the class words' token embeddings as
    # logits (DREAM-OOD); the generator's text width must be that of a feature.
    alignment: float = 0.0
    views: int = 4  # cached augmented views an image; 0: run the teacher anew in every step
    dtype: str = "float32"  # see student.dtype
    remat: bool = False  # see student.remat


@dataclass
class Generator:
    """The small Stable Diffusion."""

    train: bool = False  # False: the weights that ship with the package; True: train them anew
    # Of a Stable Diffusion v1 or v2 to use instead of either: its diffusers directory, or
    # hub:ORG/NAME@COMMIT of the Hugging Face hub (the text width must be teacher.width).
    directory: str = ""
    # What prompts call the classes, in the order of the labels; empty: the data set's own names.
    # Brackets mark what an outlier takes the place of: "[kite] bird"; without, all of it.
    class_words: tuple[str, ...] = ()
    # In which latents are sampled, autoencoder apart: "float32", or "bfloat16" for accelerators.
    dtype: str = "float32"
    vae_epochs: int = 1
    vae_batch_size: int = 16  # small: the autoencoder needs many steps more than large batches
    diffusion_epochs: int = 8
    # Of training: share of the prompts in which the class word's token is the image's own feature
    # of the teacher. Such a generator has learned what it is given in place of the word.
    feature_share: float = 0.0
    batch_size: int = 128  # of the diffusion


@dataclass
class Student:
    """The classifier that is trained, and kept."""

    architecture: str = "resnet"  # resnet, densenet (DenseNet-BC), wide_resnet
    depth: int = 18  # resnet: 18, 34, 50; the others: 6 n + 4, such as 100 and 40
    # resnet: channels of the first stage; densenet: growth; wide_resnet: how many times as wide.
    width: int = 16
    stem: str = "small"  # of resnet: small (3 x 3, stride 2), cifar (3 x 3), imagenet (7 x 7, pool)
    affine_bn: bool = True  # batch normalisation with scale and offset
    dropout: float = 0.0  # after convolutions, in training; densenet and wide_resnet
    # Of convolutions, matrix products and activations: float32, or bfloat16 for accelerators.
    # Parameters, statistics, logits, features, losses and the optimizer are float32 in either.
    dtype: str = "float32"
    # True: the backward pass computes each block anew instead of keeping its activations. The same
    # numbers, less memory, about a third more time.
    remat: bool = False


@dataclass
class Train:
    """Optimizer, schedule and loop of the student."""

    # Directory of a finished run, or its train/student.safetensors: its student is the start.
    start: str = ""
    epochs: int = 6
    batch_size: int = 128  # over all devices
    # Microbatches that a batch passes in, one after another, for one update: the memory of one.
    # Batch statistics are theirs (training/state.py).
    accumulate: int = 1
    learning_rate: float = 0.1  # peak, of the student
    projector_rate: float = 0.1  # of DT
    adapter_rate: float = 0.02  # of the latent adapter
    club_rate: float = 1e-4  # of the CLUB networks
    energy_rate: float = 0.1  # of an energy loss's scale and offset
    discriminator_rate: float = 0.01  # of npos's network
    momentum: float = 0.9
    nesterov: bool = True
    schedule: str = "per_step"  # per_epoch: the rate stays the same all through an epoch
    weight_decay: float = 5e-4  # on every tensor, as the reference
    warmup: float = 0.15  # fraction of the steps of linear warm-up
    floor: float = 2e-6  # last multiplier of the cosine schedule
    clip: float = 1.0  # global norm of the gradient; 0: none
    # Decay of the moving average of weights and batch statistics that is evaluated and kept in
    # place of the last ones (training/state.py); 0: none.
    ema: float = 0.0
    log_every: int = 20  # steps
    checkpoint_every: int = 1  # epochs
    keep_checkpoints: int = 2  # newest ones on disk; 0: all


@dataclass
class Evaluation:
    """Which scores are computed."""

    # Keys of oal_jax.scores.SCORES, or "all"; the first is the headline and a detector's default.
    scores: tuple[str, ...] = ("energy", "msp", "max_logit", "gen", "knn", "vim", "mahalanobis")
    # Images that pass through a classifier at once. On CPU few of them, which stay in the cache: at
    # 500 the teacher takes a third more time an image. Accelerators want more.
    batch_size: int = 125
    keep_id: float = 0.95  # share of ID validation images that the threshold keeps
    # True: the parameters of each score that has a grid are chosen on the validation OOD sets.
    search: bool = False


@dataclass
class Mesh:
    """How the devices of all processes are laid out; changes no result but for rounding."""

    # Devices that share each large parameter; a divisor of those of a process. The others, all
    # devices divided by these, split the batches.
    model: int = 1


@dataclass
class Config:
    """One experiment, whole."""

    seed: int = 0
    # Of all that comes before the student's training: teacher, generator, cached views, outliers
    # and latents, which runs of several seeds then share; -1: `seed`.
    stages_seed: int = -1
    smoke: bool = False  # shrink every stage to seconds
    data: Data = field(default_factory=Data)
    teacher: Teacher = field(default_factory=Teacher)
    generator: Generator = field(default_factory=Generator)
    outliers: Outliers = field(default_factory=Outliers)
    adapter: Adapter = field(default_factory=Adapter)
    latents: Latents = field(default_factory=Latents)
    method: Method = field(default_factory=Method)
    student: Student = field(default_factory=Student)
    train: Train = field(default_factory=Train)
    evaluation: Evaluation = field(default_factory=Evaluation)
    mesh: Mesh = field(default_factory=Mesh)


# The keys of `oal_jax.scores.SCORES`, here so that a config is checked before JAX starts.
SCORES = (
    *("energy", "msp", "max_logit", "temperature_scaling", "odin", "gen", "kl_matching"),
    *("openmax", "gradnorm", "react", "ash_p", "ash_b", "ash_s", "scale", "dice", "she"),
    *("knn", "nnguide", "fdbd", "vim", "residual", "neco", "mahalanobis", "relative_mahalanobis"),
    *("mahalanobis_ensemble", "mood", "mode", "gram"),
)
_TEACHER = ("teacher", "features")
_SAMPLED = ("generator", "outliers", "latents")
# Every method, and the stages before its training.
METHOD_STAGES = {
    **dict.fromkeys(("ce", "um", "umap", "logitnorm", "vos", "npos"), ()),
    **dict.fromkeys(("oe", "energy", "poem", "doe", "woods"), ()),
    "kd": _TEACHER,
    **dict.fromkeys(("oal", "pixel"), (*_TEACHER, *_SAMPLED)),
}
EXPOSED = ("oe", "energy", "poem", "doe", "woods")  # those that read outliers.images
GENERATED = "generated"  # value of data.source, teacher.weights and generator.directory
# Values of outliers.images: what is drawn, and, with what a recipe calls them, decoded latents.
PROCEDURAL = "procedural"
DECODED = {
    "decoded": "decoded latents",
    "decoded_random": "decoded random latents",
    "decoded_half": "half decoded latents",
}


def expand(config: Config) -> Config:
    """The config with one score an entry in `evaluation.scores`, given "energy,knn" or "all"."""
    names = getattr(config.evaluation, "scores", None)
    if not isinstance(names, tuple | list) or not all(isinstance(name, str) for name in names):
        return config  # for `validate` to complain of
    parts = [part.strip() for name in names for part in name.split(",")]
    scores = tuple(n for name in parts for n in (SCORES if name == "all" else (name,)))
    evaluation = dataclasses.replace(config.evaluation, scores=tuple(dict.fromkeys(scores)))
    return dataclasses.replace(config, evaluation=evaluation)


def stages_before(config: Config) -> tuple[str, ...]:
    """The stages that the method reads from, in order."""
    method = config.method
    stages = METHOD_STAGES[method.name]
    if method.name in EXPOSED and config.outliers.images in DECODED:
        stages = (*_TEACHER, *_SAMPLED)
    if "latents" in stages and (guided(config.latents) or selected(config.latents)):
        stages = (*stages[:-1], "adapter", "latents")
    if config.teacher.alignment and "teacher" in stages:
        stages = ("generator", *(stage for stage in stages if stage != "generator"))
    estimated = unleashed(config) and method.constraint < 0
    return (*stages, "estimate_loss") if estimated or method.name == "woods" else stages


def sees_images(config: Config) -> bool:
    """Whether the student is shown `outliers.images`."""
    m = config.method
    mapped = m.name == "oal" and m.micl == "energy"
    return m.name in EXPOSED or (mapped and config.outliers.image_share > 0)


def unleashed(config: Config) -> bool:
    """Whether the ID cross-entropy is Unleashing Mask's."""
    return config.method.um or config.method.name in ("um", "umap")


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
    """The config of {"a.b": value}; fields that it does not name keep their defaults."""
    config = Config()
    for path, value in flat.items():
        *parents, name = path.split(".")
        node = config
        for parent in parents:
            node = getattr(node, parent, None)
        if node is None or not hasattr(node, name):
            raise UserError(unknown_key(path))
        setattr(node, name, tuple(value) if isinstance(value, list) else value)
    return config


def unknown_key(path: str) -> str:
    """The line for a key that no config has: names the nearest one."""
    keys = list(flatten(Config()))
    below = [key for key in keys if key.startswith(f"{path}.")]
    near = below or difflib.get_close_matches(path, keys, n=1, cutoff=0.0)
    return f"config key '{path}' is unknown; nearest: '{near[0]}'"
