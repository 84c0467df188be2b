"""Images in memory, as a caller has them, to the arrays that models take."""

from collections.abc import Sequence
from numbers import Number
from typing import Any

import jax.numpy as jnp
import numpy as np
from PIL import Image

from oal_jax.data.decoding import Decoding, Unreadable, convert, resize_and_crop
from oal_jax.errors import UserError

# A resize may overshoot. Half a grey level away from [0, 1] is still the same of 256 levels.
_OVERSHOOT = 0.5 / 255
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_CHANNELS = tuple(_MODES)


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
    if hasattr(images, "getbands") and images.mode not in _MODES.values():
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

    An image of other channels or another size becomes one of `image_shape` as one of a file does;
    an image of `image_shape` stays as it is.

    Args:
      images: what `to_array` takes; in a list, sizes and channels may differ.
      image_shape: (height, width, channels).
      decoding: None: other sizes and channels are refused.

    Raises:
      UserError: no images by the shape, another type, NaN pixels, or floats out of range.
    """
    shape = tuple(image_shape)
    if isinstance(images, list | tuple) and not all(isinstance(x, Number) for x in images):
        arrays = [_fit(to_array(image), shape, decoding) for image in images]
        return check_images(arrays, shape), False
    array = to_array(images)
    if array.shape == shape or (array.ndim == 2 and (decoding or shape[2] == 1)):
        return check_images(_fit(array, shape, decoding)[None], shape), True
    is_grey = array.ndim == 3 and shape[2] == 1  # images, without the axis of the channels
    if is_grey and (array.shape[1:] == shape[:2] or array.shape[2] not in _CHANNELS):
        array = array[..., None]
    if decoding is None or array.shape[1:] == shape or not array.size:
        return check_images(array, shape), False
    if array.ndim == 3 and array.shape[2] in _CHANNELS:
        return check_images(_fit(array, shape, decoding)[None], shape), True
    if array.ndim == 4 and array.shape[3] in _CHANNELS:
        array = np.stack([_fit(image, shape, decoding) for image in array])
    return check_images(array, shape), False


def _fit(image: np.ndarray, shape: tuple[int, ...], decoding: Decoding | None) -> np.ndarray:
    """One image, converted, resized and cropped unless it has the shape.

    Raises:
      UserError: no image by its shape, or of another type.
    """
    image = image[..., None] if image.ndim == 2 else image
    if decoding is None or image.shape == shape:
        return image
    if image.ndim != 3 or image.shape[2] not in _CHANNELS or not image.size:
        hint = ""
        if image.ndim == 3 and image.shape[0] in _CHANNELS:
            hint = "; move the channels last: image.transpose(1, 2, 0)"
        raise UserError(f"an image has shape {image.shape}, not (height, width, {shape[2]}){hint}")
    _check_type(image)
    image = _of_channels(image, shape[2])
    if image.shape == shape:
        return image
    if image.dtype == np.uint8:
        return _resized(image[..., 0] if shape[2] == 1 else image, decoding).reshape(shape)
    if shape[2] == 4:  # opacity weighs the colours of a resize
        raise UserError(f"a float image has shape {image.shape}, not {shape}; give uint8")
    return np.stack([_resized(plane, decoding) for plane in np.moveaxis(image, 2, 0)], axis=-1)


def _of_channels(image: np.ndarray, channels: int) -> np.ndarray:
    """A grey, RGB or RGBA image with other channels, as files are converted; floats as float32."""
    if image.dtype == np.uint8:
        picture = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)
        return np.asarray(convert(picture, _MODES[channels])).reshape(*image.shape[:2], channels)
    image = np.float32(image)
    if image.shape[2] == channels:
        return image
    colours, opacity = image[..., :3], image[..., 3:]
    if channels == 4:
        colours = np.broadcast_to(colours, (*image.shape[:2], 3))
        return np.concatenate([colours, np.ones_like(colours[..., :1])], axis=-1)
    colours = colours * opacity if image.shape[2] == 4 else colours
    if channels == 3:
        return np.broadcast_to(colours, (*image.shape[:2], 3))
    return colours @ np.float32([[0.299], [0.587], [0.114]])  # as Pillow weighs them


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
    _check_type(images)
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


def _check_type(images: np.ndarray) -> None:
    if images.dtype != np.uint8 and not jnp.issubdtype(images.dtype, jnp.floating):
        raise UserError(f"images are {images.dtype}; give uint8, or floats in [0, 1]")


def _with_axes(images: np.ndarray, image_shape: Sequence[int] | None) -> np.ndarray:
    """The images with an axis for the channels; UserError for another shape."""
    shape = tuple(image_shape) if image_shape else ("height", "width", "channels")
    if image_shape and images.shape == (0,):
        return images.reshape(0, *image_shape)
    exact = image_shape and shape[2] == 1 and images.shape[1:] == shape[:2]
    if images.ndim == 3 and (exact if image_shape else _is_grey(images)):
        images = images[..., None]
    if images.ndim == 4 and (not image_shape or images.shape[1:] == shape):
        return images
    hint = ""
    first, last = images.shape[1:2], images.shape[-1:]
    if images.ndim == 4 and image_shape and first[0] in _CHANNELS and last[0] not in _CHANNELS:
        hint = "; move the channels last: images.transpose(0, 2, 3, 1)"
    elif images.ndim == 3 and (not image_shape or images.shape == shape):
        hint = "; for a single image: images[None]"
    elif images.ndim == 3 and images.shape[0] in _CHANNELS:
        hint = (
            "; for one image with its channels first: images.transpose(1, 2, 0); for grey ones:"
            " images[..., None]"
        )
    elif images.ndim == 3:
        hint = "; for grey images: images[..., None]"
    elif images.ndim == 4 and image_shape and last[0] not in _CHANNELS:
        hint = f"; {last[0]} channels are not grey, RGB or RGBA"
    expected = ", ".join(map(str, ("n", *shape)))
    raise UserError(f"images have shape {images.shape}, not ({expected}){hint}")


def _is_grey(images: np.ndarray) -> bool:
    """Whether three axes are those of grey images, and not of a single image in colour."""
    return images.shape[2] not in (1, 3, 4) and images.shape[0] > 0
