"""The dataclasses of a config that say how outliers are made: in feature space, and as latents."""

from dataclasses import dataclass, field


@dataclass
class Knn:
    """Boundary sampling around each class in the teacher's feature space (after NPOS)."""

    features_per_class: int = 500  # ID features that stand for a class, first in data order
    neighbour: int = 300  # K: distance to the K-th nearest, the point itself counted
    boundary: int = 50  # points of a class with the largest such distance
    anchors: int = 50  # of these, how many are perturbed a repeat
    sigma: float = 0.07  # standard deviation of the Gaussian noise, a coordinate
    noise_rows: int = 1500  # noise vectors a repeat, shared by its anchors
    keep: int = 2  # perturbed points kept an anchor
    repeats: int = 10
    selection: str = "top"  # "top": the furthest of each anchor; "reference": the row mix-up
    scale_by_token: bool = True  # multiply by the norm of the class's token embedding
    # That is a row of the token table ("input_table"), or the mean over all positions of the text
    # encoder's last hidden states of the bare class name ("hidden_mean").
    token: str = "input_table"


@dataclass
class Crossing:
    """ID features moved over the teacher's decision boundary (after BOOD)."""

    # Of a class, those of its first outliers.knn.features_per_class features with the smallest
    # margin; so many outliers it has.
    points: int = 200
    step: float = 0.02  # length of a step, in norms of the feature that is moved
    steps_after: int = 2  # further steps once the prediction has changed
    # True: straight over the nearest boundary at once, which a linear head allows; then
    # steps_after times `step` beyond it.
    exact: bool = False


@dataclass
class Outliers:
    """Which outliers the method trains on."""

    # Of method.micl=energy: knn, diffusion (k-NN, and latents sampled from them), random (isotropic
    # directions, N(0, 1) latents), mixed (half and half), none; with random directions: latents
    # (sampled ones), latents_mixed (half sampled, half random), half_random (half as many random
    # ones: a control). The other methods that use outliers take the k-NN ones and their latents.
    source: str = "random"
    # Of the methods that see outlier images: an image set (its split "train"); "procedural": shapes
    # and textures, drawn as large as the ID images; "decoded": the sampled latents as images;
    # "decoded_random": N(0, 1) latents as images, a control; "decoded_half": half of each.
    images: str = "procedural"
    # Of method.micl=energy: so many of these images a step, as a share of the ID images, pass
    # through the student beside what `source` gives; 0: none.
    image_share: float = 0.0
    # k-NN outliers as a few numbers each, computed when they are drawn: where there are millions.
    lazy: bool = False
    # "knn": Gaussian noise around the edge of each class; "crossing": features moved over the
    # teacher's decision boundary. The feature outliers, and what the generator is conditioned on.
    boundary: str = "knn"
    knn: Knn = field(default_factory=Knn)
    crossing: Crossing = field(default_factory=Crossing)


@dataclass
class Adapter:
    """A_t: a small map from latents to the teacher's features, in place of decoder and teacher.

    It is trained where guidance or selection asks for it.
    """

    # "conv": convolutions, then an MLP on all positions; "residual": residual blocks with group
    # normalisation, then the mean over positions.
    architecture: str = "conv"
    hidden: int = 64  # channels of its widest convolutions
    images: int = 20_000  # ID images that it learns from, at equal distances; 0: all
    epochs: int = 12
    batch_size: int = 128
    learning_rate: float = 3e-3  # peak of a one-cycle schedule, AdamW
    # Latents get Gaussian noise of a standard deviation drawn from 0 to this, image by image: what
    # a sampler predicts before its end is not clean.
    noise: float = 0.5
    bank: int = 2000  # unit features of ID images that k-NN guidance measures distances to


@dataclass
class Guide:
    """Steering of the sampler, step by step, by a gradient at the predicted clean latent."""

    # "none"; "energy": lower logsumexp of the teacher's logits; "knn": further from ID features;
    # "both". Features and logits are those of the adapter A_t.
    by: str = "none"
    # Length of the push in norms of the predicted noise, as a change of the velocity.
    strength: float = 0.5
    start: float = 0.0  # fraction of the way from noise to clean at which it begins
    end: float = 1.0  # ... and at which it ends
    neighbour: int = 50  # of "knn": the mean distance to so many nearest of adapter.bank


@dataclass
class Select:
    """Which of the sampled latents are kept, by the adapter A_t; `per_class` of each class are."""

    oversample: float = 1.0  # times as many are sampled; 1: all are kept
    max_msp: float = 1.0  # largest softmax probability; 1: any
    # Latents with a higher logsumexp than this percentile of ID validation latents look ID; 100:
    # any.
    max_energy_percentile: float = 100.0
    # Of those left in a class the furthest from each other in feature space; else the first.
    diverse: bool = False


@dataclass
class Latents:
    """How outliers are sampled as latents."""

    # Latents a class, evenly; where the training reads none, as of source=random, `pictures`.
    per_class: int = 200
    # "outliers": sampled from noise under outliers; "class": under the class words alone;
    # "noised": latents of ID images plus `noise` times N(0, 1); "partial": latents of ID images,
    # noised to the time `partial` and denoised under outliers (SDEdit); "mixture": the same from
    # the middle between latents of two classes.
    kind: str = "outliers"
    noise: float = 1.0  # of "noised": standard deviation
    partial: float = 0.6  # of "partial", "mixture": fraction of the steps that is run, the last
    interpolation: str = "spherical"  # of "mixture"; or linear
    sampler: str = "dpm_solver_pp_2m"  # or pndm (as the paper), ddim
    steps: int = 20
    guidance: float = 2.0  # classifier-free guidance scale; 1: none
    injection: str = "all_pieces"  # or first_piece: only the first BPE piece, as the reference
    reduction: str = "channel_height_mean"  # of a latent, for the CLUB term
    # Latents of 8 x 8 sampled at once, or as many larger ones as have that area (3 of 64 x 64):
    # bounds the memory.
    chunk: int = 200
    # Latents a class that are decoded for the report (all, where a method trains on the images).
    pictures: int = 8
    guide: Guide = field(default_factory=Guide)
    select: Select = field(default_factory=Select)


def guided(latents: Latents) -> bool:
    """Whether the sampler is steered."""
    return latents.guide.by != "none"


def selected(latents: Latents) -> bool:
    """Whether some of the sampled latents are left out."""
    s = latents.select
    return s.max_msp < 1 or s.max_energy_percentile < 100 or s.diverse
