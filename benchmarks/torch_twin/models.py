"""The networks in PyTorch with timm's and torchvision's names, and a reader of our weights."""

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

_STAGES = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}
_STEMS = {"imagenet": (7, 2, True), "cifar": (3, 1, False), "small": (3, 2, False)}

# Path in our files to the name in timm and torchvision.
_NAMES = (
    (re.compile(r"\bblocks_(\d+)"), r"blocks.\1"),
    (re.compile(r"\bmlp_fc"), "mlp.fc"),
    (re.compile(r"\bpatch_embed\b"), "patch_embed.proj"),
    (re.compile(r"\b(layer\d)_(\d+)"), r"\1.\2"),
    (re.compile(r"\bdownsample_conv\b"), "downsample.0"),
    (re.compile(r"\bdownsample_bn\b"), "downsample.1"),
    # The scale of a norm, but not of the energy loss.
    (re.compile(r"\b(kernel|(?<!\benergy\.)scale)$"), "weight"),
    (re.compile(r"\b(mean|var)$"), r"running_\1"),
)


def from_ours(tensors: Mapping[str, np.ndarray], patch: int = 0) -> dict[str, Tensor]:
    """The `state_dict` of a module from the tensors of one of our files.

    Args:
      tensors: path, joined by dots, to the array.
      patch: patch size of a Vision Transformer, whose dense patch layer becomes a convolution.
    """
    state = {}
    for path, array in tensors.items():
        name, array = path, np.asarray(array, np.float32)
        for pattern, replacement in _NAMES:
            name = pattern.sub(replacement, name)
        if name == "patch_embed.proj.weight":
            array = array.reshape(patch, patch, -1, array.shape[1])
        if path.endswith("kernel"):
            axes = (3, 2, 0, 1) if array.ndim == 4 else (1, 0)
            array = array.transpose(axes)
        state[name] = torch.from_numpy(np.array(array))
    return state


def load_ours(module: nn.Module, tensors: Mapping[str, np.ndarray], patch: int = 0) -> None:
    """Load all tensors of one of our files into a module. Raises if the names differ."""
    counters = {n: t for n, t in module.state_dict().items() if n.endswith("num_batches_tracked")}
    module.load_state_dict(from_ours(tensors, patch) | counters)


class Normalise(nn.Module):
    """Images (B, c, h, w) in [0, 1] to zero mean and unit variance, a channel or overall."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """(images - mean) / std."""
        return (images - self.mean) / self.std


class Teacher(nn.Module):
    """timm's Vision Transformer, from images in [0, 1] to (logits, normalised class token)."""

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        classes: int,
        moments: tuple[Sequence[float], Sequence[float]],
        *,
        patch: int,
        width: int,
        depth: int,
        heads: int,
        mlp_ratio: float,
    ) -> None:
        super().__init__()
        from timm.models.vision_transformer import VisionTransformer

        height, image_width, channels = image_shape
        self.normalise = Normalise(*moments)
        self.vit = VisionTransformer(
            img_size=(height, image_width),
            patch_size=patch,
            in_chans=channels,
            num_classes=classes,
            embed_dim=width,
            depth=depth,
            num_heads=heads,
            mlp_ratio=mlp_ratio,
        )

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and features, in float32 under any autocast."""
        features = self.vit.forward_features(self.normalise(images))
        features = self.vit.forward_head(features, pre_logits=True)
        return self.vit.head(features).float(), features.float()


class IdNorm(nn.BatchNorm2d):
    """BatchNorm whose statistics, also the running ones, come from the first `rows` images."""

    def __init__(self, channels: int, rows: int) -> None:
        super().__init__(channels)
        self.rows = rows

    def forward(self, x: Tensor) -> Tensor:
        """All images, normalised by the statistics of the first `rows`."""
        if not self.training:
            return super().forward(x)
        images = x[: self.rows].float()
        variance, mean = torch.var_mean(images, (0, 2, 3), correction=0)
        with torch.no_grad():
            count = images.numel() // images.shape[1]
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        shift = self.bias - mean * scale
        return (x * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)).to(x.dtype)


Norm = Callable[[int], nn.Module]  # number of channels to a layer


class _Block(nn.Module):
    """Residual block of two 3 x 3 convolutions."""

    def __init__(self, before: int, channels: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, channels, 3, stride, 1, bias=False)
        self.bn1 = norm(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = norm(channels)
        self.downsample = None
        if stride > 1 or before != channels:
            shortcut = nn.Conv2d(before, channels, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, norm(channels))

    def forward(self, x: Tensor) -> Tensor:
        h = functional.relu(self.bn1(self.conv1(x)))
        h = self.bn2(self.conv2(h))
        return functional.relu(h + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    """The student, from images in [0, 1] to (logits, global average of the last map).

    A training batch is `id_rows` ID images, then outliers (see `IdNorm`). 0: ID images only.
    """

    def __init__(
        self,
        channels: int,
        classes: int,
        moments: tuple[Sequence[float], Sequence[float]],
        *,
        depth: int,
        width: int,
        stem: str,
        id_rows: int = 0,
    ) -> None:
        super().__init__()
        norm = partial(IdNorm, rows=id_rows) if id_rows else nn.BatchNorm2d
        kernel, stride, pool = _STEMS[stem]
        self.normalise, self.pool = Normalise(*moments), pool
        self.conv1 = nn.Conv2d(channels, width, kernel, stride, kernel // 2, bias=False)
        self.bn1 = norm(width)
        before = width
        for i, count in enumerate(_STAGES[depth]):
            blocks = []
            for j in range(count):
                blocks.append(_Block(before, width * 2**i, 2 if i and not j else 1, norm))
                before = width * 2**i
            self.add_module(f"layer{i + 1}", nn.Sequential(*blocks))
        self.feature_width = before
        self.fc = nn.Linear(before, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and features, in float32 under any autocast."""
        x = functional.relu(self.bn1(self.conv1(self.normalise(images))))
        if self.pool:
            x = functional.max_pool2d(x, 3, 2, 1)
        for i in range(4):
            x = self.get_submodule(f"layer{i + 1}")(x)
        features = x.mean((2, 3))
        return self.fc(features).float(), features.float()


class FeatureProjector(nn.Module):
    """DT, from teacher to student features: BatchNorm, Linear, ReLU, BatchNorm."""

    def __init__(self, teacher_width: int, width: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm1d(teacher_width)
        self.linear = nn.Linear(teacher_width, width)
        self.bn2 = nn.BatchNorm1d(width)

    def forward(self, x: Tensor, train: bool) -> Tensor:
        """Projected features. `train` normalises by the batch and updates running statistics."""

        def norm(layer: nn.BatchNorm1d, x: Tensor) -> Tensor:
            running = layer.running_mean, layer.running_var
            return functional.batch_norm(
                x.float(), *running, layer.weight, layer.bias, train, 0.1, 1e-5
            )

        return norm(self.bn2, functional.relu(self.linear(norm(self.bn1, x))))


class LatentProjector(nn.Module):
    """A, from latents (B, c, h, w) to student features: strided convolutions, two dense layers."""

    def __init__(self, latent_shape: tuple[int, int, int], width: int, hidden: int = 64) -> None:
        super().__init__()
        channels, side, _ = latent_shape
        self.conv1 = nn.Conv2d(channels, hidden // 2, 3, 1, 1, bias=False)
        self.conv2 = nn.Conv2d(hidden // 2, hidden, 3, 2, 1, bias=False)
        side = -(-side // 2)
        self.downs = []
        while side > 4:
            self.downs.append(f"down_{side}")
            self.add_module(self.downs[-1], nn.Conv2d(hidden, hidden, 3, 2, 1, bias=False))
            side = -(-side // 2)
        self.fc1 = nn.Linear(hidden * side * side, 2 * width)
        self.fc2 = nn.Linear(2 * width, width)

    def forward(self, latents: Tensor) -> Tensor:
        """Student features (B, width)."""
        x = latents
        for name in ("conv1", "conv2", *self.downs):
            x = functional.gelu(self.get_submodule(name)(x), approximate="tanh")
        x = functional.gelu(self.fc1(x.permute(0, 2, 3, 1).flatten(1)), approximate="tanh")
        return self.fc2(x).float()


class GaussianPredictor(nn.Module):
    """CLUB's q(y | x), a Gaussian with mean and tanh-bounded log-variance."""

    def __init__(self, inputs: int, width: int, mean_hidden: Sequence[int]) -> None:
        super().__init__()
        self.layers: dict[str, list[str]] = {}
        for part, hidden in (("mean", mean_hidden), ("log_variance", (256,))):
            sizes, self.layers[part] = [inputs, *hidden, width], []
            for i, (a, b) in enumerate(itertools.pairwise(sizes)):
                name = f"{part}_{'out' if i == len(hidden) else i}"
                self.add_module(name, nn.Linear(a, b))
                self.layers[part].append(name)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(mean, log-variance) of q(. | x)."""
        mean, log_variance = (self._mlp(part, x) for part in ("mean", "log_variance"))
        return mean.float(), torch.tanh(log_variance.float())

    def _mlp(self, part: str, x: Tensor) -> Tensor:
        *hidden, out = self.layers[part]
        for name in hidden:
            x = functional.relu(self.get_submodule(name)(x))
        return self.get_submodule(out)(x)
