"""The forms of the twin: one recipe as the official code runs it, and as fast as PyTorch can."""

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from oal_jax.config import Config, sees_images
from oal_jax.errors import UserError


class Form(NamedTuple):
    """How the job is run. What is computed is for the config to say, but for the last two.

    Attributes:
      compile: torch.compile, and convolutions with the channels last.
      dtype: of products and convolutions (autocast); losses are float32.
      per_image: augmentation an image at a time, in the workers of a DataLoader.
      club: "pairs" makes a (B, B, d) tensor of CLUB's negative term, "linear" does not.
      knn: a key of `outliers.DISTANCES`.
      samples_per_call: latents sampled at once, all with one outlier; 0: latents.chunk, one each.
      decode: every latent is decoded to pixels, which nothing reads.
      augmented_features: outliers start from features of augmented images.
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
    # As the official code does it.
    "reference": Form(),
    # The same recipe without what is needless.
    "tuned": _TUNED,
    # For configs that cache the teacher's views: with our ways to compute less.
    "shortcuts": _TUNED._replace(knn="products", augmented_features=False),
}


def make(name: str, *, eager: bool = False, dtype: str = "float32") -> Form:
    """The form of a name; `dtype` is for the fast forms, `eager` leaves the compiler out."""
    form = FORMS[name]
    if form.compile:
        form = form._replace(dtype=getattr(torch, dtype))
    return form._replace(compile=form.compile and not eager)


def check(config: Config) -> None:
    """Raise `UserError` for a config that the twin has no code for."""
    method, student = config.method, config.student
    if method.name != "oal" or method.micl not in ("energy", "reference") or method.um:
        raise UserError(
            f"the PyTorch twin does OAL with micl energy or reference, not method.name="
            f"{method.name}, method.micl={method.micl}, method.um={method.um}"
        )
    if sees_images(config) and config.outliers.images == "decoded":
        raise UserError(
            "the PyTorch twin's outlier images are those of a set, not outliers.images="
            f"{config.outliers.images}"
        )
    if student.architecture != "resnet" or student.depth not in (18, 34) or not student.affine_bn:
        raise UserError("the PyTorch twin's student is a ResNet-18 or ResNet-34 with affine norms")


def prepare(form: Form, device: torch.device) -> None:
    """The settings of the process: PyTorch's own for float32 products, or XLA's on a GPU."""
    torch.backends.cudnn.benchmark = True
    fast = form.compile and device.type == "cuda"
    torch.set_float32_matmul_precision("high" if fast else "highest")


def compiled(form: Form, function: Any) -> Any:
    """A module or function as the form runs it; a module's convolutions get channels last."""
    if not form.compile:
        return function
    if isinstance(function, torch.nn.Module):
        function.to(memory_format=torch.channels_last)
    return torch.compile(function, dynamic=False)


def images_as(form: Form, images: torch.Tensor) -> torch.Tensor:
    """A batch (B, c, h, w) in the memory layout of the form."""
    if form.compile:
        return images.contiguous(memory_format=torch.channels_last)
    return images.contiguous()


@contextlib.contextmanager
def inference(form: Form, device: torch.device) -> Iterator[None]:
    """Where no gradient is needed."""
    with torch.inference_mode() if form.compile else torch.no_grad(), autocast(form, device):
        yield


def autocast(form: Form, device: torch.device) -> torch.autocast:
    """Products and convolutions in the form's type."""
    return torch.autocast(device.type, form.dtype, enabled=form.dtype != torch.float32)


def synchronise(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()
