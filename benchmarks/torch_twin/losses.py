"""OAL's loss (arXiv 2406.16525) as one PyTorch module that holds all trained parameters."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.torch_twin.models import (
    FeatureProjector,
    GaussianPredictor,
    LatentProjector,
    ResNet,
)
from oal_jax.config import Config

Terms = dict[str, Tensor]
_CLUB_HIDDEN = {"outlier": (256,), "outlier_latent": (32, 16, 256)}


def kl_divergence(target: Tensor, logits: Tensor) -> Tensor:
    """Mean KL(softmax(target) || softmax(logits)) of a batch. Gradients reach the target too."""
    log_p, log_q = functional.log_softmax(target, dim=1), functional.log_softmax(logits, dim=1)
    return functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def club_pairs(mean: Tensor, log_variance: Tensor, y: Tensor) -> Tensor:
    """CLUB (arXiv 2006.12013, eq. 8), written with every pair of mean and y, (B, B, d)."""
    precision = torch.exp(-log_variance)
    positive = -((mean - y) ** 2) * precision / 2
    negative = -((mean[:, None] - y[None]) ** 2).mean(1) * precision / 2
    return (positive.sum(1) - negative.sum(1)).mean()


def club_linear(mean: Tensor, log_variance: Tensor, y: Tensor) -> Tensor:
    """`club_pairs` in O(B d): the squares multiplied out, with mean_j of y and of y^2."""
    precision = torch.exp(-log_variance)
    first, second = y - y.mean(0), y**2 - (y**2).mean(0)
    return (precision * (mean * first - second / 2)).sum(1).mean()


_CLUB = {"pairs": club_pairs, "linear": club_linear}


def separation(
    id_neg_energy: Tensor, outlier_neg_energy: Tensor, scale: Tensor, offset: Tensor
) -> Tensor:
    """Logistic loss between ID and outliers on logsumexp(logits), with slope softplus(scale)."""
    slope = functional.softplus(scale)
    id_loss = functional.softplus(-(slope * id_neg_energy + offset)).mean()
    return id_loss + functional.softplus(slope * outlier_neg_energy + offset).mean()


class Oal(nn.Module):
    """All trained parameters, and the loss of a batch.

    A batch holds `image` (B, c, h, w) in [0, 1], `label`, `teacher_logits`, `teacher_features`. The
    energy objective also reads `outlier` (B, T), or `outlier_latent` (B, C, h, w) with `latent` of
    the images, or `outlier_image` (m, c, h, w), whichever the config's outliers provide. The
    club objective reads `outlier` and a reduced `outlier_latent` (B, w).

    Args:
      config: the experiment.
      channels: channels of the images.
      classes: number of classes.
      moments: mean and standard deviation of the pixels.
      latent_shape: (C, h, w) of a latent, (w,) of a reduced one, or None without latents.
      club: "pairs" or "linear".
    """

    def __init__(
        self,
        config: Config,
        channels: int,
        classes: int,
        moments: tuple[Sequence[float], Sequence[float]],
        latent_shape: tuple[int, ...] | None,
        club: str = "linear",
    ) -> None:
        super().__init__()
        s, self.options = config.student, config.method
        sizes = {"depth": s.depth, "width": s.width, "stem": s.stem}
        id_rows = config.train.batch_size if config.outliers.image_share > 0 else 0
        self.student = ResNet(channels, classes, moments, **sizes, id_rows=id_rows)
        width, teacher_width = self.student.feature_width, config.teacher.width
        self.projector = FeatureProjector(teacher_width, width)
        self.uses_energy, self.club_form = config.method.oal.objective == "energy", club
        if self.uses_energy:
            zeros = {name: nn.Parameter(torch.zeros(())) for name in ("scale", "offset")}
            self.energy = nn.ParameterDict(zeros)
            if latent_shape:
                self.adapter = LatentProjector(latent_shape, width)
        else:
            inputs = {"outlier": teacher_width, "outlier_latent": latent_shape[0]}
            self.club = nn.ModuleDict(
                {n: GaussianPredictor(inputs[n], width, _CLUB_HIDDEN[n]) for n in inputs}
            )

    def forward(self, batch: Mapping[str, Tensor], weight: Tensor) -> tuple[Tensor, Terms]:
        """The loss and its terms. `weight` is the energy loss's weight at this step."""
        m = self.options
        mapped = self._mapped(batch) if self.uses_energy else {}
        images, count = batch["image"], len(batch["label"])
        if "outlier_image" in batch:
            images = torch.cat([images, batch["outlier_image"]])
        logits, features = self.student(images)
        logits, outlier_logits, features = logits[:count], logits[count:], features[:count]
        teacher_features = batch["teacher_features"].float()
        if self.uses_energy:  # DT maps outliers, which are directions, so it learns from directions
            teacher_features = functional.normalize(teacher_features)
        target = self.projector(teacher_features, train=True)
        terms = {
            "ce": functional.cross_entropy(logits, batch["label"]),
            "kd_logits": kl_divergence(batch["teacher_logits"].float(), logits),
            "kd_features": kl_divergence(target, features),
        }
        loss = terms["ce"] + m.kd.logit_weight * terms["kd_logits"]
        loss = loss + m.kd.feature_weight * terms["kd_features"]
        if self.uses_energy:
            neg_energies = {
                name: torch.logsumexp(self.student.fc(f).float(), 1) for name, f in mapped.items()
            }
            if "outlier_image" in batch:
                neg_energies["image"] = torch.logsumexp(outlier_logits, 1)
            loss = loss + self._energy(batch, logits, features, neg_energies, weight, terms)
            return loss, terms
        weights = {"outlier": m.oal.knn_club_weight, "outlier_latent": m.oal.latent_club_weight}
        for name, factor in weights.items():
            mean, log_variance = self.club[name](batch[name])
            terms[f"club_{name}"] = _CLUB[self.club_form](mean, log_variance, features)
            loss = loss + factor * terms[f"club_{name}"]
        return loss, terms

    def _mapped(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Outliers in the student's feature space, by DT's statistics before this batch."""
        mapped = {}
        with torch.no_grad():
            if "outlier" in batch:
                mapped["feature"] = self.projector(
                    functional.normalize(batch["outlier"]), train=False
                )
            if "outlier_latent" in batch:
                mapped["latent"] = self.adapter(batch["outlier_latent"])
        return mapped

    def _energy(self, batch, logits, features, neg_energies, weight, terms: Terms) -> Tensor:
        """The weighted energy losses. Adds each to `terms`."""
        id_neg_energy = torch.logsumexp(logits, 1)
        scale, offset = self.energy["scale"], self.energy["offset"]
        total = torch.zeros((), device=logits.device)
        for name, neg_energy in neg_energies.items():
            terms[f"energy_{name}"] = separation(id_neg_energy, neg_energy, scale, offset)
            total = total + weight * terms[f"energy_{name}"]
        if not neg_energies:
            slope, offset = functional.softplus(scale.detach()), offset.detach()
            terms["energy_id"] = functional.softplus(-(slope * id_neg_energy + offset)).mean()
            total = total + weight * terms["energy_id"]
        if "latent" in batch:
            error = (self.adapter(batch["latent"].float()) - features.detach()) ** 2
            terms["latent_projector_error"] = error.sum(1).mean()
            weight = self.options.oal.latent_projector_weight
            total = total + weight * terms["latent_projector_error"]
        return total
