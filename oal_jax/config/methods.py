"""The dataclasses of a config that say what a method's loss is made of."""

from dataclasses import dataclass, field


@dataclass
class Exposure:
    """Of the methods that see outlier images: oe, energy, poem, doe."""

    weight: float = 0.5  # of oe: the uniform cross-entropy on outliers
    hinge: float = 0.1  # of energy, poem: weight of the squared hinges
    # E = -logsumexp(logits): ID is pushed below margin_in, outliers above margin_out. In units of
    # the logits: these suit the embedded set's small student; published for CIFAR: -25 and -7.
    margin_in: float = -7.0
    margin_out: float = -3.0
    shared_statistics: bool = False  # batch statistics of ID and outliers together, as published
    poem_ratio: int = 4  # candidates for each outlier that is trained on
    poem_buffer: int = 4096  # features kept, of ID and of outliers each
    poem_refresh: int = 20  # steps between two posteriors
    poem_covariance: float = 1.0  # 20: the official code's wider sampling
    doe: float = 1.0  # weight of outlier exposure in doe
    doe_start: float = 0.5  # fraction of the training before weights are perturbed
    doe_ascend: bool = True  # False: lower the regret, as the official code


@dataclass
class Virtual:
    """Of the methods that make outliers in feature space: vos, npos."""

    weight: float = 0.1  # of the logistic loss that tells them from ID
    start: float = 0.4  # fraction of the training at which it begins
    refresh: int = 1  # steps between two estimates
    queue: int = 1000  # features kept a class; the loss waits until all queues are full
    samples: int = 10_000  # of vos: drawn a class and step
    keep: int = 1  # of vos: the least likely of them
    neighbour: int = 300  # of npos, from here on: see outliers.knn
    boundary: int = 200
    anchors: int = 2
    sigma: float = 0.1
    candidates: int = 600
    npos_keep: int = 200
    contrastive: float = 0.0  # weight of the supervised contrastive loss


@dataclass
class Wild:
    """Of woods: half of the ID images lose their labels and join outliers in a wild mixture."""

    share: float = 0.1  # of outliers in the mixture
    id_limit: float = 0.05  # share of ID images that may count as OOD
    ce_tolerance: float = 2.0  # cross-entropy that is allowed, in times that of the start
    multiplier_rate: float = 1.0  # published search: 0.1, 1, 2
    penalty_growth: float = 1.5  # published search: 1.1, 1.5


@dataclass
class Adapt:
    """How the latent outliers of a step follow the student that is trained (micl=energy)."""

    of: int = 1  # of so many the one that the student finds most like ID is kept
    steps: int = 0  # of its energy's gradient, by which latents are moved before
    rate: float = 0.05  # length of a step in lengths of a latent; above 0: towards ID


@dataclass
class Method:
    """What the student is trained with."""

    # ce, kd, oal, pixel; logitnorm; vos, npos; from a trained start: um, umap, woods; better from
    # one: oe, energy, poem, doe.
    name: str = "oal"
    micl: str = "energy"  # of oal: energy (default), reference (CLUB as shipped), alternate
    logit_kd: float = 4.0  # weight of KL(teacher logits || student logits)
    feature_kd: float = 8.0  # weight of KL(DT(teacher features) || student features)
    knn_club: float = 0.1  # weight of CLUB on k-NN outliers
    latent_club: float = 0.2  # weight of CLUB on latents
    energy: float = 0.1  # weight of the energy loss on mapped outliers
    adapter: float = 0.05  # weight of the adapter's regression on ID pairs
    # Stage of a ResNet, 1 to 3, after which latent outliers enter it; 0: as pooled features, last.
    latent_stage: int = 0
    adapt: Adapt = field(default_factory=Adapt)
    ramp_start: float = 0.19  # fraction of training at which the energy loss begins
    ramp_end: float = 0.31  # ... and at which it has its full weight
    outlier_batch: int = 0  # outliers a step; 0: as many as ID images
    pixel: float = 0.5  # weight of outlier exposure on decoded latents
    # Unleashing Mask: of um, umap, and of any other method with um=True.
    um: bool = False  # the ID cross-entropy becomes |beta CE - constraint| + constraint
    constraint: float = -1.0  # 0 or more: given; -1: estimated from train.start's model
    beta: float = 1.0  # weight of the cross-entropy before the constraint is taken off
    n_masks: int = 3  # random masks whose losses are averaged for the estimate; the paper: 1
    estimate_keep: float = 0.965  # share of each tensor's weights that such a mask keeps
    mask_keep: float = 0.8  # of umap: the same of the trained mask
    freeze: bool = True  # of umap: the weights stay those of train.start, the mask alone trains
    logit_temperature: float = 0.04  # of logitnorm, on logits of length 1
    exposure: Exposure = field(default_factory=Exposure)
    virtual: Virtual = field(default_factory=Virtual)
    wild: Wild = field(default_factory=Wild)
