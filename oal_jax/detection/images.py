"""Images in memory, as a caller has them, to the arrays that models take."""

from collections.abc import Sequence
from numbers import Number
from typing import Any

import jax.numpy as jnp
import numpy as np
from PIL import Image

from oal_jax.data.decoding import Decoding, Unreadable, resize_and_crop
from oal_jax.errors import UserError

# A resize may overshoot. Half a grey level away from [0, 1] is still the same of 256 levels.
_OVERSHOOT = 0.5 / 255
_PILLOW_MODES = ("L", "RGB", "RGBA")


def to_array(images: Any) -> np.ndarray:
    """One array of an array of any library, a Pillow image, or a list of these.

    Raises:
      UserError: images of several shapes or types, a Pillow image whose values are no grey levels,
        or what is no array.
    """
    if isinstance(images, list | tuple) and not all(isinstance(x, Number) for x in images):
        arrays = [to_array(image) for image in images]
        for what in ("shape", "dtype"):
            kinds = list(dict.fromkeys(str(getattr(array, what)) for array in arrays))
            if len(kinds) > 1:
                raise UserError(
                    f"the list has images of more than one {what}: {', '.join(kinds[:3])}; bring"
                    " them to one before"
                )
        return np.stack(arrays)
    if hasattr(images, "getbands") and images.mode not in _PILLOW_MODES:
        raise UserError(
            f"a Pillow image has mode {images.mode}; convert it before: image.convert('RGB'), or"
            " 'L' for grey"
        )
    try:
        array = np.asarray(images)
    except Exception as error:  # a tensor on a GPU, or one with a gradient: types of their own
        raise UserError(f"images of type {type(images).__name__} are no array ({error})") from None
    if array.dtype.kind in "OUSM":
        raise UserError(
            f"images are {(array.dtype.kind == 'U' and 'strings') or type(images).__name__}, not"
            " arrays; score_files takes the names of files"
        )
    return array


def to_shape(
    images: Any, image_shape: Sequence[int], decoding: Decoding | None
) -> tuple[np.ndarray, bool]:
    """Images of any size as `check_images` gives them, and whether it is a single one.

    An image of another size is resized and cropped as one of a file is; an image of `image_shape`
    stays as it is.

    Args:
      images: what `to_array` takes; in a list, sizes may differ.
      image_shape: (height, width, channels).
      decoding: None: other sizes are refused.

    Raises:
      UserError: another number of channels or type, NaN pixels, or floats out of range.
    """
    channels, several = image_shape[2], isinstance(images, list | tuple)
    if several and not all(isinstance(x, Number) for x in images):
        arrays = [_fit(to_array(image), image_shape, decoding) for image in images]
        return check_images(arrays, image_shape), False
    array = to_array(images)
    single = (array.ndim == 3 and array.shape[2] == channels) or (array.ndim == 2 and channels == 1)
    if single:
        return check_images(_fit(array, image_shape, decoding)[None], image_shape), True
    with_axis = array[..., None] if array.ndim == 3 and channels == 1 else array
    resizable = with_axis.ndim == 4 and with_axis.shape[3] == channels and with_axis.size
    if resizable and with_axis.shape[1:3] != tuple(image_shape[:2]):
        array = np.stack([_fit(image, image_shape, decoding) for image in with_axis])
    return check_images(array, image_shape), False


def _fit(image: np.ndarray, image_shape: Sequence[int], decoding: Decoding | None) -> np.ndarray:
    """One image, resized and cropped unless it has the shape; what can't be is left as it is."""
    channels = image_shape[2]
    image = image[..., None] if image.ndim == 2 and channels == 1 else image
    right = image.ndim == 3 and image.shape[2] == channels and image.size
    if channels == 4 and image.dtype != np.uint8:  # opacity weighs the colours of a resize
        return image
    if decoding is None or not right or image.shape == tuple(image_shape):
        return image
    if image.dtype == np.uint8:
        planes = image[..., 0] if channels == 1 else image
        pixels = _resized(planes, decoding)
        return pixels[..., None] if channels == 1 else pixels
    if not jnp.issubdtype(image.dtype, jnp.floating):
        return image
    planes = np.moveaxis(np.float32(image), 2, 0)
    return np.stack([_resized(plane, decoding) for plane in planes], axis=-1)


def _resized(pixels: np.ndarray, decoding: Decoding) -> np.ndarray:
    try:
        return np.asarray(resize_and_crop(Image.fromarray(pixels), decoding))
    except Unreadable as error:
        raise UserError(f"an image is {error}") from None


def check_images(images: Any, image_shape: Sequence[int] | None = None) -> np.ndarray:
    """Images as uint8 or float32 in [0, 1], of shape (n, *image_shape).

    Grey images may lack the axis of the channels. Floats up to half a grey level outside of [0, 1],
    as a resize makes them, are clipped.

    Raises:
      UserError: another shape or type, NaN pixels, or floats out of range.
    """
    images = _with_axes(to_array(images), image_shape)
    if images.dtype == np.uint8:
        return images
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise UserError(f"images are {images.dtype}; give uint8, or floats in [0, 1]")
    images = images.astype(np.float32)
    if not images.size:
        return images
    low, high = images.min(), images.max()
    if np.isnan(low):
        bad = np.isnan(images).any(axis=(1, 2, 3))
        raise UserError(
            f"float images must lie in [0, 1], have nan in {int(bad.sum())} of {len(images)}"
            f" images, the first at index {int(bad.argmax())}"
        )
    if low < -_OVERSHOOT or high > 1 + _OVERSHOOT:
        raise UserError(
            f"float images must lie in [0, 1], have {low:.4g} to {high:.4g}; divide by 255, or"
            " normalise inside of the model's function"
        )
    return np.clip(images, 0, 1) if low < 0 or high > 1 else images


def _with_axes(images: np.ndarray, image_shape: Sequence[int] | None) -> np.ndarray:
    """The images with an axis for the channels; UserError for another shape."""
    shape = tuple(image_shape) if image_shape else ("height", "width", "channels")
    if image_shape and images.shape == (0,):
        return images.reshape(0, *image_shape)
    if images.ndim == 3 and (images.shape[1:] == shape[:2] if image_shape else _is_grey(images)):
        images = images[..., None]
    if images.ndim == 4 and (not image_shape or images.shape[1:] == shape):
        return images
    hint = ""
    if images.ndim == 4 and image_shape and images.shape[1:] == (shape[2], *shape[:2]):
        hint = "; move the channels last: images.transpose(0, 2, 3, 1)"
    elif images.ndim == 3 and (not image_shape or images.shape == shape):
        hint = "; for a single image: images[None]"
    expected = ", ".join(map(str, ("n", *shape)))
    raise UserError(f"images have shape {images.shape}, not ({expected}){hint}")


def _is_grey(images: np.ndarray) -> bool:
    """Whether three axes are those of grey images, and not of a single image in colour."""
    return images.shape[2] not in (1, 3, 4) and images.shape[0] > 0
