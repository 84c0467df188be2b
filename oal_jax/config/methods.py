"""Options of the training methods: one class a method, and which of them a method reads."""

from dataclasses import dataclass, field

from oal_jax.config.options import option


@dataclass
class Distillation:
    """Distillation from the teacher: methods kd, oal and pixel."""

    logit_weight: float = option(4.0, "weight of KL(teacher logits || student logits)")
    feature_weight: float = option(
        8.0, "weight of KL(feature projector(teacher features) || student features)"
    )
    projector_rate: float = option(0.1, "learning rate of the feature projector (DT)")


@dataclass
class Oal:
    """Method oal: distillation and a contrastive term against outliers."""

    objective: str = option(
        "energy",
        "contrastive term: energy (the default), club (CLUB as the official code has it) or"
        " club_alternate (CLUB as published)",
        choices=("energy", "club", "club_alternate"),
    )
    energy_weight: float = option(0.1, "weight of the energy loss on outliers")
    energy_rate: float = option(0.1, "learning rate of the energy loss's scale and offset")
    ramp_start: float = option(
        0.19, "fraction of the training at which the energy loss begins", at_least=0, at_most=1
    )
    ramp_end: float = option(
        0.31, "fraction of the training at which it has its full weight", at_least=0, at_most=1
    )
    latent_projector_weight: float = option(
        0.05, "weight of the latent projector's regression of student features on ID pairs"
    )
    latent_projector_rate: float = option(0.02, "learning rate of the latent projector (A)")
    knn_club_weight: float = option(0.1, "weight of CLUB on feature outliers")
    latent_club_weight: float = option(0.2, "weight of CLUB on latents")
    club_rate: float = option(1e-4, "learning rate of the CLUB networks")


@dataclass
class Pixel:
    """Method pixel: distillation and outlier exposure on decoded latents."""

    weight: float = option(0.5, "weight of outlier exposure on the decoded latents")


@dataclass
class UnleashingMask:
    """Unleashing Mask: methods um and umap, and any other with method.unleash=True."""

    constraint: float = option(
        -1.0, "ID loss that the training holds, 0 or more, in nats; -1: estimated from train.start"
    )
    beta: float = option(
        1.0, "weight of the cross-entropy before the constraint is subtracted", above=0
    )
    n_masks: int = option(
        3, "random masks whose losses are averaged for the estimate; the paper: 1", above=0
    )
    mask_density: float = option(
        0.965, "share of each tensor's weights that such a mask leaves", above=0, at_most=1
    )


@dataclass
class Umap:
    """Method umap: a trained mask beside the options of um."""

    mask_density: float = option(
        0.8, "share of each tensor's weights that the trained mask leaves", above=0, at_most=1
    )
    freeze: bool = option(True, "train the mask alone; the weights stay those of train.start")


@dataclass
class LogitNorm:
    """Method logitnorm: cross-entropy on normalised logits."""

    temperature: float = option(0.04, "temperature of the logits of unit length", above=0)


@dataclass
class OutlierExposure:
    """Method oe: outlier exposure."""

    weight: float = option(0.5, "weight of the uniform cross-entropy on outlier images")
    shared_statistics: bool = option(
        False, "take batch statistics over ID and outlier images together, as published"
    )


@dataclass
class Energy:
    """Method energy: energy fine-tuning, with E = -logsumexp(logits)."""

    weight: float = option(0.1, "weight of the squared hinges")
    margin_in: float = option(
        -7.0, "E that ID images are pushed below, in units of the logits; published for CIFAR: -25"
    )
    margin_out: float = option(
        -3.0, "E that outlier images are pushed above; published for CIFAR: -7"
    )
    shared_statistics: bool = option(
        False, "take batch statistics over ID and outlier images together, as published"
    )


@dataclass
class Woods:
    """Method woods: half of the ID images lose their labels and join outliers in a wild mixture."""

    outlier_share: float = option(0.1, "share of outliers in the mixture", at_least=0, at_most=1)
    id_limit: float = option(
        0.05, "share of ID images that may count as OOD", at_least=0, at_most=1
    )
    ce_tolerance: float = option(
        2.0, "cross-entropy that is allowed, as a multiple of that of the start", above=0
    )
    multiplier_rate: float = option(1.0, "step of the multipliers; published search: 0.1, 1, 2")
    penalty_growth: float = option(
        1.5, "growth of the penalties; published search: 1.1, 1.5", above=0
    )
    energy_rate: float = option(0.1, "learning rate of the energy loss's scale and offset")
    shared_statistics: bool = option(
        False, "take batch statistics over ID and wild images together, as published"
    )


@dataclass
class Vos:
    """Method vos: virtual outliers from class Gaussians in feature space."""

    weight: float = option(0.1, "weight of the logistic loss that separates ID from outliers")
    energy_rate: float = option(
        0.1, "learning rate of the energy's scale, offset and class weights"
    )
    start: float = option(
        0.4, "fraction of the training at which the loss begins", at_least=0, at_most=1
    )
    refresh: int = option(1, "steps between two estimates of the Gaussians", above=0)
    queue_size: int = option(
        1000, "features stored per class; the loss waits until all queues are full", above=0
    )
    samples: int = option(10_000, "samples drawn per class and step", above=0)
    per_class: int = option(
        1, "the least likely samples of a class, which are its outliers", above=0
    )


@dataclass
class Npos:
    """Method npos: non-parametric outliers around the boundary points of each class."""

    weight: float = option(0.1, "weight of the logistic loss that separates ID from outliers")
    discriminator_rate: float = option(0.01, "learning rate of the network that separates them")
    contrastive_weight: float = option(0.0, "weight of the supervised contrastive loss")
    start: float = option(
        0.4, "fraction of the training at which the loss begins", at_least=0, at_most=1
    )
    refresh: int = option(1, "steps between two sets of outliers", above=0)
    queue_size: int = option(
        1000, "features stored per class; the loss waits until all queues are full", above=0
    )
    neighbour: int = option(300, "K of the k-NN distance", above=0)
    boundary_points: int = option(200, "features with the largest distance, per class", above=0)
    anchors: int = option(2, "boundary points that are perturbed, per class and step", above=0)
    sigma: float = option(0.1, "standard deviation of the Gaussian noise", at_least=0)
    candidates: int = option(600, "perturbed points per anchor", above=0)
    per_anchor: int = option(200, "the furthest of them, which are its outliers", above=0)


# Every method by name, and the sections of `Method` that it reads.
SECTIONS: dict[str, tuple[str, ...]] = {
    "ce": (),
    "kd": ("kd",),
    "oal": ("kd", "oal"),
    "pixel": ("kd", "pixel"),
    "um": ("um",),
    "umap": ("um", "umap"),
    "logitnorm": ("logitnorm",),
    "oe": ("oe",),
    "energy": ("energy",),
    "woods": ("woods",),
    "vos": ("vos",),
    "npos": ("npos",),
}
FINE_TUNINGS = ("um", "umap", "woods")  # methods that need a trained start


@dataclass
class Method:
    """What the student is trained with."""

    name: str = option(
        "oal",
        "training method; um, umap and woods need a trained start, oe and energy are better from"
        " one",
        choices=tuple(SECTIONS),
    )
    unleash: bool = option(
        False,
        "apply Unleashing Mask to the ID cross-entropy of any method: |beta CE - constraint|"
        " + constraint",
    )
    outlier_batch: int = option(0, "outliers per step; 0: as many as ID images", at_least=0)
    kd: Distillation = field(default_factory=Distillation)
    oal: Oal = field(default_factory=Oal)
    pixel: Pixel = field(default_factory=Pixel)
    um: UnleashingMask = field(default_factory=UnleashingMask)
    umap: Umap = field(default_factory=Umap)
    logitnorm: LogitNorm = field(default_factory=LogitNorm)
    oe: OutlierExposure = field(default_factory=OutlierExposure)
    energy: Energy = field(default_factory=Energy)
    woods: Woods = field(default_factory=Woods)
    vos: Vos = field(default_factory=Vos)
    npos: Npos = field(default_factory=Npos)
