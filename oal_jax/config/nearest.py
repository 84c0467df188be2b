"""Known names that an unknown key, flag or config is likely to mean."""

import difflib
from collections.abc import Collection, Sequence
from pathlib import Path

from oal_jax.config.schema import Config, flatten
from oal_jax.errors import UserError

# What other programs call the same thing.
_OTHER_KEYS = {
    "lr": "learning_rate",
    "wd": "weight_decay",
    "bs": "batch_size",
    "batch": "batch_size",
    "data_dir": "data.root",
    "data_path": "data.root",
    "data": "data.root",
    "dataset": "data.source",
    "image_dir": "data.root",
    "images": "data.root",
    "model": "student.architecture",
    "arch": "student.architecture",
    "score": "evaluation.scores",
    "num_workers": "data.workers",
}
_OTHER_FLAGS = dict.fromkeys(
    ("output_dir", "out_dir", "outdir", "logdir", "log_dir", "save_dir", "run_dir", "dir"),
    "workdir",
)
_MOST = 3  # names in a message


def unknown_key(path: str) -> str:
    """The line for a key that no config has: names the nearest ones."""
    names = [f"'{key}'" for key in nearest_keys(path)]
    return f"config key '{path}' is unknown; {_hint(names)}"


def unknown_flag(name: str, flags: Collection[str]) -> str:
    """The line for a flag that the command does not have. `flags` are those that it has."""
    plain = name.lower().replace("-", "_").removeprefix("config_").removeprefix("config.")
    keys = nearest_keys(plain)
    exact = [key for key in keys if f".{key}".endswith(f".{_OTHER_KEYS.get(plain, plain)}")]
    close = difflib.get_close_matches(plain, flags, n=1, cutoff=0.7)
    of_command = [_OTHER_FLAGS[plain]] if plain in _OTHER_FLAGS else [] if exact else close
    names = of_command or [f"config.{key}" for key in exact or keys]
    return f"unknown flag --{name}; {_hint([f'--{found}' for found in names])}"


def nearest_keys(path: str) -> list[str]:
    """Keys of a config by likelihood; none if no key is close.

    Args:
      path: such as "epochs", "trian.epochs" or "method".
    """
    keys = list(flatten(Config()))
    if below := [key for key in keys if key.startswith(f"{path}.")]:
        return below[:1]
    section, _, leaf = path.rpartition(".")
    leaf = _OTHER_KEYS.get(leaf, leaf)
    alike = [key for key in keys if f".{key}".endswith(f".{leaf}")]
    if not section:
        return sorted(alike, key=lambda key: not key.startswith("train."))[:_MOST] or _close(
            leaf, keys
        )
    if alike:
        return difflib.get_close_matches(path, alike, n=1, cutoff=0.0)
    return difflib.get_close_matches(path, keys, n=1, cutoff=0.6)


def _close(name: str, keys: Sequence[str]) -> list[str]:
    """A section that is close to a name, by its first key; else keys whose last part is."""
    sections = {key.partition(".")[0]: key for key in reversed(keys)}
    last = {key: key.rpartition(".")[2] for key in keys}
    match = difflib.get_close_matches(name, [*sections, *last.values()], n=1, cutoff=0.7)
    if match and match[0] in sections:
        return [sections[match[0]]]
    return [key for key in keys if last[key] in match][:_MOST]


def _hint(names: Sequence[str]) -> str:
    return f"nearest: {', '.join(names)}" if names else "--help lists what there is"


def packaged_configs() -> dict[str, Path]:
    """The config files that come with the package, by name."""
    package = Path(__file__).parents[1]
    # Beside the package in a checkout, inside it where it is installed.
    folders = (package / "configs", package.parent / "configs")
    folder = next((folder for folder in folders if (folder / "fashion.py").is_file()), None)
    files = sorted(folder.glob("*.py")) if folder else ()
    return {file.stem: file for file in files if not file.stem.startswith("_")}


def config_file(value: str) -> str:
    """The file of `--config`: the path of one, or the name of one that comes with the package.

    Raises:
      UserError: neither; names the nearest packaged ones.
    """
    if Path(value).is_file():
        return value
    packaged = packaged_configs()
    if value in packaged:
        return str(packaged[value])
    stem = Path(value).stem
    near = difflib.get_close_matches(stem, packaged, n=_MOST, cutoff=0.6) or packaged
    raise UserError(
        f"config file '{value}' does not exist, nor is it the name of a packaged config; nearest:"
        f" {', '.join(near)}"
    )
