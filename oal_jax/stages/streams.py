"""What a training draws its batches from: arrays in memory, or a stream of rows."""

from typing import Any

import jax
from jaxtyping import Array, Int, Int32, Key, UInt8

from oal_jax.data import stream
from oal_jax.data.sources import ImageSet
from oal_jax.data.stream import Streamed
from oal_jax.training import loop


def arrays(data: ImageSet | Streamed) -> dict[str, Any]:
    """What the loop keeps on the devices of a set: all of it, or nothing where it is streamed."""
    return {"images": data.images, "labels": data.labels} if isinstance(data, ImageSet) else {}


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
