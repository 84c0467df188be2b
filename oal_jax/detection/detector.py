"""A classifier and a calibrated score: images to labels, confidences, ood_scores and verdicts.

`detection.load` makes one of a finished run, `detection.calibrate` of any classifier.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import jax
import numpy as np

from oal_jax.data.image_files import ImageFile
from oal_jax.detection import exported, saved
from oal_jax.detection.files import FileResult, of_folder, score
from oal_jax.detection.images import to_shape
from oal_jax.detection.parts import Parts, Result, run_detector
from oal_jax.errors import UserError


class Detector(Parts):
    """A callable: images to a `Result`. Make one with `load` or `calibrate`."""

    def save(self, directory: str | os.PathLike) -> None:
        """Write a directory that `oal_jax.load` reads, without the code of the model.

        The directory appears whole or not at all. It may replace a saved detector without
        other files beside it, nothing else.

        Raises:
          UserError: it can't be written, or JAX can't write the model as a program.
        """
        saved.write(Path(directory).expanduser(), self)

    def export(
        self,
        directory: str | os.PathLike,
        platforms: Sequence[str] = exported.PLATFORMS,
        onnx: bool = False,
    ) -> None:
        """Write a folder with a program that runs without oal_jax, and how to feed it image files.

        Args:
          directory: may replace an exported detector without other files beside it, nothing else.
          platforms: out of "cpu", "cuda", "tpu" and "rocm".
          onnx: also write `detector.onnx`; needs the extra `onnx`.

        Raises:
          UserError: it can't be written, or the model can't be written as a program.
        """
        exported.write(Path(directory).expanduser(), self, platforms, onnx)

    def score_files(self, files: ImageFile | Iterable[ImageFile]) -> list[FileResult]:
        """A row for each file, in order: the verdict, or why it can't be read.

        Args:
          files: a folder; one file: its path, its bytes, or open for reading; or several of these.

        Raises:
          UserError: no such folder, or a detector whose channels no image file has.
        """
        return list(self.iter_files(files))

    def iter_files(self, files: ImageFile | Iterable[ImageFile]) -> Iterator[FileResult]:
        """`score_files` as an iterator, whose memory does not grow with the number of files."""
        decoding = exported.decoding_of(self)
        if decoding is None:
            channels = self.image_shape[2]
            raise UserError(f"the model takes {channels} channels; image files have 1, 3 or 4")
        if isinstance(files, str | os.PathLike):
            files = Path(files).expanduser()
            if not files.is_file():
                return of_folder(self, decoding, files, self.batch_size)
        if isinstance(files, Path | bytes) or hasattr(files, "read"):
            files = [files]
        return score(self, decoding, files, self.batch_size)

    def __reduce__(self):
        raise UserError(
            "a Detector can't be pickled; write it with detector.save(DIR) and read it with"
            " oal_jax.load(DIR)"
        )

    def __call__(self, images) -> Result:
        """Labels, confidences, ood_scores and verdicts.

        Args:
          images: (n, h, w, c), or one image (h, w, c): uint8, or floats in [0, 1]. Grey images may
            lack the last axis. Lists of arrays or of Pillow images will do. Images of another size
            than `image_shape` are resized and cropped as files are.

        Raises:
          UserError: another number of channels or type, or floats out of range.
        """
        if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(images)):
            raise UserError(
                "a detector is called with arrays, and here it is inside of jit, vmap or grad; call"
                " detector.function(images) there"
            )
        images, single = to_shape(images, self.image_shape, exported.decoding_of(self))
        label, confidence, ood_score = run_detector(
            self.score, self.forward, self.state, images, self.batch_size, self.mesh
        )
        names = None if self.class_names is None else np.array(self.class_names)[label]
        # `~(<=)`, not `>`: a NaN is OOD.
        is_ood = ~(ood_score <= self.threshold)
        below = np.searchsorted(self.id_val_scores, ood_score)
        percentile = 100 * below / len(self.id_val_scores)
        result = Result(label, confidence, ood_score, is_ood, names, percentile)
        return Result(*(x if x is None else x[0] for x in result)) if single else result
