"""What a training draws its batches from: arrays in memory, or a stream of rows."""

import math
from typing import Any

import flax.struct
import jax
from jaxtyping import Array, Int, Int32, Key, Shaped, UInt8

from oal_jax.data import stream
from oal_jax.data.sources import ImageSet
from oal_jax.data.stream import Streamed
from oal_jax.training import loop

_LINE = 128  # elements side by side in a tile of a TPU's memory


@flax.struct.dataclass
class Lines:
    """Images or latents to draw from on the devices, each as whole lines; indexed as an array is.

    A TPU does not keep (n, h, w, c) one image after the other, as c would fill few of the 128
    places that a line has. To take rows it then makes a copy of the whole set that is so: of
    CIFAR-10's images at 224 pixels 7.5 GB. Lines it keeps, and takes, as they are.
    """

    lines: Shaped[Array, "n l 128"]
    row: tuple[int, int, int] = flax.struct.field(pytree_node=False)  # the shape (h, w, c) of one

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Shape (n, h, w, c) of the array that it represents."""
        return self.lines.shape[0], *self.row

    def __getitem__(self, rows: Int[Array, " b"]) -> Shaped[Array, "b h w c"]:
        """Inside jit: these rows, as the array has them."""
        return self.lines[rows].reshape(-1, *self.row)


def in_lines(array: Any) -> Any:
    """An array (n, h, w, c) as `Lines`, where its rows fill them; anything else as it is."""
    count, *row = array.shape
    if len(row) != 3 or math.prod(row) % _LINE:
        return array
    return Lines(array.reshape(count, -1, _LINE), tuple(row))


def arrays(data: ImageSet | Streamed) -> dict[str, Any]:
    """What the loop keeps on the devices of a set: all of it, or nothing where it is streamed."""
    if not isinstance(data, ImageSet):
        return {}
    return {"images": in_lines(data.images), "labels": data.labels}


def rows(data: ImageSet | Streamed, key: Key[Array, ""], plan: loop.Plan) -> loop.Rows | None:
    """The batches of a plan for `loop.fit`, those of the same set in memory; None where it is."""
    if isinstance(data, ImageSet):
        return None
    return stream.rows(
        data,
        lambda epoch: jax.device_get(loop.epoch_order(key, epoch, plan)),
        plan.steps_per_epoch,
        plan.steps,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )


def drawn(
    arrays: loop.Arrays, indices: Int[Array, " b"]
) -> tuple[UInt8[Array, "b h w c"], Int32[Array, " b"]]:
    """Images and labels of a batch, inside jit: rows of the arrays, or the ones it came with."""
    if "rows" in arrays:
        return arrays["rows"]["image"], arrays["rows"]["label"]
    return arrays["images"][indices], arrays["labels"][indices]
