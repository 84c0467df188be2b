"""Forms of the twin: the recipe as the official code runs it, and as fast as PyTorch can run it."""

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from oal_jax.config import Config
from oal_jax.errors import UserError


class Form(NamedTuple):
    """How the job runs. What it computes follows from the config, except where a field says more.

    Attributes:
      compile: use torch.compile and channels-last convolutions.
      dtype: autocast type of products and convolutions. Losses are float32.
      per_image: augment one image at a time in the workers of a DataLoader.
      club: "pairs" computes CLUB's negative term on a (B, B, d) tensor, "linear" without it.
      knn: a key of `outliers.DISTANCES`.
      samples_per_call: latents in a call, all with the same outlier. 0: `latents.chunk`, with an
        outlier each.
      decode: decode every latent to pixels, which nothing reads.
      augmented_features: compute the features of outliers from augmented images.
    """

    compile: bool = False
    dtype: torch.dtype = torch.float32
    per_image: bool = True
    club: str = "pairs"
    knn: str = "faiss"
    samples_per_call: int = 3
    decode: bool = True
    augmented_features: bool = True


_TUNED = Form(
    compile=True, per_image=False, club="linear", knn="matmul", samples_per_call=0, decode=False
)
FORMS = {
    "reference": Form(),  # as the official code
    "tuned": _TUNED,  # the same recipe without needless work
    "shortcuts": _TUNED._replace(knn="products", augmented_features=False),  # as ours
}


def make(name: str, *, eager: bool = False, dtype: str = "float32") -> Form:
    """The form of a name. `dtype` applies to compiled forms; `eager` turns the compiler off."""
    form = FORMS[name]
    if form.compile:
        form = form._replace(dtype=getattr(torch, dtype))
    return form._replace(compile=form.compile and not eager)


def check(config: Config) -> None:
    """Raise `UserError` for a config that the twin does not implement."""
    method, student = config.method, config.student
    objective = method.oal.objective
    if method.name != "oal" or objective == "club_alternate" or method.unleash:
        raise UserError(
            "the PyTorch twin implements OAL with the objectives energy and club, not method.name="
            f"{method.name}, method.oal.objective={objective}, method.unleash={method.unleash}"
        )
    if config.outliers.image_share > 0 and config.outliers.images == "decoded":
        raise UserError("the PyTorch twin has no outlier images from outliers.images=decoded")
    if student.architecture != "resnet" or student.depth not in (18, 34) or not student.affine_bn:
        raise UserError("the PyTorch twin's student is a ResNet-18 or ResNet-34 with affine norms")


def prepare(form: Form, device: torch.device) -> None:
    """Set the process's float32 precision: TF32 for compiled forms on a GPU, as XLA; else full."""
    torch.backends.cudnn.benchmark = True
    fast = form.compile and device.type == "cuda"
    torch.set_float32_matmul_precision("high" if fast else "highest")


def compiled(form: Form, function: Any) -> Any:
    """A module or function, compiled if the form says so, with channels-last convolutions."""
    if not form.compile:
        return function
    if isinstance(function, torch.nn.Module):
        function.to(memory_format=torch.channels_last)
    return torch.compile(function, dynamic=False)


def images_as(form: Form, images: torch.Tensor) -> torch.Tensor:
    """A batch (B, c, h, w) in the form's memory layout."""
    if form.compile:
        return images.contiguous(memory_format=torch.channels_last)
    return images.contiguous()


@contextlib.contextmanager
def inference(form: Form, device: torch.device) -> Iterator[None]:
    """A context without gradients, in the form's precision."""
    with torch.inference_mode() if form.compile else torch.no_grad(), autocast(form, device):
        yield


def autocast(form: Form, device: torch.device) -> torch.autocast:
    """A context with products and convolutions in the form's type."""
    return torch.autocast(device.type, form.dtype, enabled=form.dtype != torch.float32)


def synchronise(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()
