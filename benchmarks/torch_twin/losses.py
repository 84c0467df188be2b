"""OAL's loss (arXiv 2406.16525) as one PyTorch module, with all that trains."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.torch_twin.models import GaussianPredictor, LatentAdapter, Projector, ResNet
from oal_jax.config import Config, sees_images

Terms = dict[str, Tensor]
_CLUB_HIDDEN = {"outlier": (256,), "outlier_latent": (32, 16, 256)}


def kl_divergence(target: Tensor, logits: Tensor) -> Tensor:
    """Mean KL(softmax(target) || softmax(logits)) of a batch; the target has a gradient too."""
    log_p, log_q = functional.log_softmax(target, dim=1), functional.log_softmax(logits, dim=1)
    return functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def club_pairs(mean: Tensor, log_variance: Tensor, y: Tensor) -> Tensor:
    """CLUB (arXiv 2006.12013, eq. 8) as it stands there: every mean with every y, (B, B, d)."""
    precision = torch.exp(-log_variance)
    positive = -((mean - y) ** 2) * precision / 2
    negative = -((mean[:, None] - y[None]) ** 2).mean(1) * precision / 2
    return (positive.sum(1) - negative.sum(1)).mean()


def club_linear(mean: Tensor, log_variance: Tensor, y: Tensor) -> Tensor:
    """The same number in O(B d): the squares multiplied out, mean_j taken of y and y^2."""
    precision = torch.exp(-log_variance)
    first, second = y - y.mean(0), y**2 - (y**2).mean(0)
    return (precision * (mean * first - second / 2)).sum(1).mean()


_CLUB = {"pairs": club_pairs, "linear": club_linear}


def separation(id_energy: Tensor, outlier_energy: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """Logistic loss that tells ID from outliers by E = logsumexp(logits), of slope softplus."""
    slope = functional.softplus(scale)
    of_id = functional.softplus(-(slope * id_energy + offset)).mean()
    return of_id + functional.softplus(slope * outlier_energy + offset).mean()


class Oal(nn.Module):
    """All that trains, and the loss of a batch.

    A batch has `image` (B, c, h, w) in [0, 1], `label`, `teacher_logits`, `teacher_features`. With
    `micl` "energy" there are `outlier` (B, T) and `outlier_latent` (B, C, h, w) where the source
    gives them, and `latent` of the images with the latter; with a share of outlier images there is
    `outlier_image` (m, c, h, w). With "reference" there are `outlier` and the reduced
    `outlier_latent` (B, w).

    Args:
      config: the experiment.
      channels: of the images.
      classes: number of classes.
      moments: mean and standard deviation of the pixels.
      latent_shape: (C, h, w) of a latent, or (w,) of a reduced one; None without latents.
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
        s, self.weights = config.student, config.method
        sizes = {"depth": s.depth, "width": s.width, "stem": s.stem}
        id_rows = config.train.batch_size if sees_images(config) else 0
        self.student = ResNet(channels, classes, moments, **sizes, id_rows=id_rows)
        width, teacher_width = self.student.feature_width, config.teacher.width
        self.projector = Projector(teacher_width, width)
        self.by_energy, self.club_form = config.method.micl == "energy", club
        if self.by_energy:
            zeros = {name: nn.Parameter(torch.zeros(())) for name in ("scale", "offset")}
            self.energy = nn.ParameterDict(zeros)
            if latent_shape:
                self.adapter = LatentAdapter(latent_shape, width)
        else:
            inputs = {"outlier": teacher_width, "outlier_latent": latent_shape[0]}
            self.club = nn.ModuleDict(
                {n: GaussianPredictor(inputs[n], width, _CLUB_HIDDEN[n]) for n in inputs}
            )

    def forward(self, batch: Mapping[str, Tensor], weight: Tensor) -> tuple[Tensor, Terms]:
        """The loss and its terms; `weight` is that of the energy loss at this step."""
        m = self.weights
        mapped = self._mapped(batch) if self.by_energy else {}
        images, count = batch["image"], len(batch["label"])
        if "outlier_image" in batch:
            images = torch.cat([images, batch["outlier_image"]])
        logits, features = self.student(images)
        logits, of_outliers, features = logits[:count], logits[count:], features[:count]
        given = batch["teacher_features"].float()
        # Where outliers are mapped by DT they are directions, and so is what DT learns from.
        target = self.projector(
            functional.normalize(given) if self.by_energy else given, train=True
        )
        terms = {
            "ce": functional.cross_entropy(logits, batch["label"]),
            "kd_logits": kl_divergence(batch["teacher_logits"].float(), logits),
            "kd_features": kl_divergence(target, features),
        }
        loss = terms["ce"] + m.logit_kd * terms["kd_logits"] + m.feature_kd * terms["kd_features"]
        if self.by_energy:
            energies = {
                name: torch.logsumexp(self.student.fc(f).float(), 1) for name, f in mapped.items()
            }
            if "outlier_image" in batch:
                energies["image"] = torch.logsumexp(of_outliers, 1)
            return loss + self._energy(batch, logits, features, energies, weight, terms), terms
        for name, factor in (("outlier", m.knn_club), ("outlier_latent", m.latent_club)):
            mean, log_variance = self.club[name](batch[name])
            terms[f"club_{name}"] = _CLUB[self.club_form](mean, log_variance, features)
            loss = loss + factor * terms[f"club_{name}"]
        return loss, terms

    def _mapped(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Outliers in the student's feature space, before this batch moves DT's statistics."""
        mapped = {}
        with torch.no_grad():
            if "outlier" in batch:
                mapped["feature"] = self.projector(
                    functional.normalize(batch["outlier"]), train=False
                )
            if "outlier_latent" in batch:
                mapped["latent"] = self.adapter(batch["outlier_latent"])
        return mapped

    def _energy(self, batch, logits, features, energies, weight, terms: Terms) -> Tensor:
        id_energy = torch.logsumexp(logits, 1)
        scale, offset = self.energy["scale"], self.energy["offset"]
        total = torch.zeros((), device=logits.device)
        for name, outlier_energy in energies.items():
            terms[f"energy_{name}"] = separation(id_energy, outlier_energy, scale, offset)
            total = total + weight * terms[f"energy_{name}"]
        if not energies:
            slope = functional.softplus(scale.detach())
            terms["energy_id"] = functional.softplus(-(slope * id_energy + offset.detach())).mean()
            total = total + weight * terms["energy_id"]
        if "latent" in batch:
            error = (self.adapter(batch["latent"].float()) - features.detach()) ** 2
            terms["adapter_error"] = error.sum(1).mean()
            total = total + self.weights.adapter * terms["adapter_error"]
        return total
