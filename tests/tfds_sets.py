"""TFDS sets in array_record format, written without TensorFlow."""

import io
import itertools
import json
from pathlib import Path

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image
from tensorflow_datasets.proto import tf_example_pb2

PACKAGE = "tensorflow_datasets.core.features"


def png(pixels: np.ndarray, mode: str | None = None) -> bytes:
    data = io.BytesIO()
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(data, "png")
    return data.getvalue()


def an_image(shape, dtype="uint8") -> dict:
    dimensions = [str(side or -1) for side in shape]
    return {
        "pythonClassName": f"{PACKAGE}.image_feature.Image",
        "image": {"dtype": dtype, "encodingFormat": "png", "shape": {"dimensions": dimensions}},
    }


def a_class(count: int) -> dict:
    name = f"{PACKAGE}.class_label_feature.ClassLabel"
    return {"pythonClassName": name, "classLabel": {"numClasses": str(count)}}


def write(root: Path, name: str, splits: dict, features: dict, shards: int = 1) -> Path:
    """A prepared set; a split is a list of {feature: bytes or int}."""
    folder = root / name / "1.0.0"
    folder.mkdir(parents=True)
    described = []
    for split, examples in splits.items():
        bounds = [len(examples) * i // shards for i in range(shards + 1)]
        parts = [examples[start:end] for start, end in itertools.pairwise(bounds)]
        for i, part in enumerate(parts):
            file = folder / f"{name.partition('/')[0]}-{split}.array_record-{i:05d}-of-{shards:05d}"
            writer = ArrayRecordWriter(str(file), "group_size:1")
            for values in part:
                example = tf_example_pb2.Example()
                for key, value in values.items():
                    if isinstance(value, bytes):
                        example.features.feature[key].bytes_list.value.append(value)
                    else:
                        example.features.feature[key].int64_list.value.append(value)
                writer.write(example.SerializeToString())
            writer.close()
        described.append(
            {
                "name": split,
                "numBytes": "1",
                "shardLengths": [str(len(part)) for part in parts],
                "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
            }
        )
    info = {"name": name.partition("/")[0], "version": "1.0.0", "fileFormat": "array_record"}
    info |= {"moduleName": "x", "splits": described}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    whole = {
        "pythonClassName": f"{PACKAGE}.features_dict.FeaturesDict",
        "featuresDict": {"features": features},
    }
    (folder / "features.json").write_text(json.dumps(whole))
    return folder
