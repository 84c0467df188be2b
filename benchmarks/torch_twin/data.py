"""Batches of augmented images, made on the device or one image at a time by a DataLoader."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from oal_jax.config import Data


def as_tensor(images: np.ndarray, device: torch.device) -> Tensor:
    """Host images uint8 (n, h, w, c) as a device tensor uint8 (n, c, h, w)."""
    return torch.from_numpy(images).to(device).permute(0, 3, 1, 2).contiguous()


def to_unit(images: Tensor) -> Tensor:
    """Bytes to float32 in [0, 1]."""
    return images.float() / 255


class Draws:
    """Random shifts and flips, fixed for each pair of view and image.

    Args:
      shape: number of views, number of images.
      data: the largest shift, and whether images are flipped.
      device: of the draws.
      random: generator on the host.
    """

    def __init__(
        self, shape: tuple[int, int], data: Data, device: torch.device, random: torch.Generator
    ) -> None:
        self.shift = data.shift
        moves = torch.randint(2 * data.shift + 1, (*shape, 2), generator=random)
        flips = torch.rand(shape, generator=random) < (0.5 if data.flip else 0)
        self.moves, self.flips = moves.to(device), flips.to(device)

    def augment(self, images: Tensor, indices: Tensor, views: Tensor) -> Tensor:
        """Views of images (b, c, h, w) uint8 with these indices, as float32 in [0, 1]."""
        (_, _, height, width), s = images.shape, self.shift
        padded = functional.pad(images, (s, s, s, s))
        across, down = (torch.arange(n, device=images.device) for n in (width, height))
        moves, flips = self.moves[views, indices], self.flips[views, indices]
        across = torch.where(flips[:, None], width - 1 - across, across)
        rows, columns = moves[:, :1] + down, moves[:, 1:] + across
        channels, padded_width = padded.shape[1], padded.shape[3]
        picked = padded.gather(2, rows[:, None, :, None].expand(-1, channels, -1, padded_width))
        picked = picked.gather(3, columns[:, None, None].expand(-1, channels, height, -1))
        return to_unit(picked)


class _Augmented(Dataset):
    """One randomly augmented image and its index at a time."""

    def __init__(self, images: np.ndarray, data: Data) -> None:
        self.images, self.data = as_tensor(images, torch.device("cpu")), data

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, s = self.images[index], self.data.shift
        if self.data.flip and torch.rand(()) < 0.5:
            image = image.flip(2)
        top, left = torch.randint(2 * s + 1, (2,)).tolist()
        padded = functional.pad(image, (s, s, s, s))
        crop = padded[:, top : top + image.shape[1], left : left + image.shape[2]]
        return to_unit(crop), index


def make_loader(images: np.ndarray, data: Data, size: int, workers: int) -> DataLoader:
    """Shuffled full batches (images, indices) on the host, made by worker processes."""
    return DataLoader(
        _Augmented(images, data), size, shuffle=True, drop_last=True, num_workers=workers
    )


def orders(count: int, size: int, random: torch.Generator) -> Iterator[Tensor]:
    """Indices of each full batch of one epoch."""
    order = torch.randperm(count, generator=random)
    return iter(order[: count // size * size].view(-1, size))
