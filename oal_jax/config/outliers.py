"""Options of outliers: in the teacher's feature space, as images, and as latents."""

from dataclasses import dataclass, field

from oal_jax.config.options import option


@dataclass
class Knn:
    """k-NN boundary sampling around each class in the teacher's feature space (after NPOS)."""

    features_per_class: int = option(
        500, "ID features that represent a class, the first in data order", above=0, chosen=0
    )
    neighbour: int = option(
        300,
        "K: the distance to the K-th nearest counts, the point itself being the first",
        above=0,
        chosen=0,
    )
    boundary_points: int = option(
        50, "points of a class with the largest such distance", above=0, chosen=0
    )
    anchors: int = option(50, "boundary points that are perturbed in a repeat", above=0, chosen=0)
    sigma: float = option(
        0.07, "standard deviation of the Gaussian noise, per coordinate", at_least=0
    )
    noise_rows: int = option(1500, "noise vectors per repeat, shared by its anchors", above=0)
    per_anchor: int = option(2, "perturbed points that each anchor contributes", above=0)
    repeats: int = option(10, "repeats of the sampling", above=0)


@dataclass
class Outliers:
    """Which outliers the method trains on."""

    source: str = option(
        "random",
        "outliers of method oal: knn (feature outliers around class boundaries); diffusion (these,"
        " and latents sampled from them); random (isotropic directions and N(0, 1) latents); none",
        choices=("knn", "diffusion", "random", "none"),
    )
    images: str = option(
        "procedural",
        "outlier images of the methods that see some: an image set (its split train); procedural:"
        " drawn shapes and textures; decoded: the sampled latents as images",
    )
    image_share: float = option(
        0.0,
        "outlier images per step of method oal, as a fraction of the ID batch; 0 disables them",
        at_least=0,
        at_most=1,
    )
    official_code: bool = option(
        False,
        "repeat two faults of the official code: the row mix-up of the k-NN selection, and the"
        " injection at the first piece of the class word alone (see reference_faults)",
    )
    knn: Knn = field(default_factory=Knn)


@dataclass
class Latents:
    """How outliers are sampled as latents of Stable Diffusion."""

    per_class: int = option(200, "latents per class", above=0)
    sampler: str = option(
        "dpm_solver_pp_2m",
        "sampler; the paper: pndm",
        choices=("pndm", "ddim", "dpm_solver_pp_2m"),
    )
    steps: int = option(20, "steps of the sampler", above=0)
    guidance: float = option(2.0, "scale of classifier-free guidance; 1: none")
    chunk: int = option(
        200,
        "latents of 8 x 8 sampled at once, or as many larger ones as have that area (3 of 64 x 64);"
        " bounds the memory",
        above=0,
    )
