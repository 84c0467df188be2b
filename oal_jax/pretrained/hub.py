"""Models on the Hugging Face hub, written `hub:ORG/NAME@COMMIT`.

The commit is part of the name, so that a config means the same weights tomorrow. The local cache is
looked at first, and nothing is asked of the network when all is there (`HF_HOME`, `HF_HUB_CACHE`,
`HF_HUB_OFFLINE`, `HF_ENDPOINT` and `HF_TOKEN` mean what they mean to huggingface_hub). Importing
this file imports nothing: names are checked before JAX starts.
"""

import errno
import re
from pathlib import Path
from typing import NamedTuple

from oal_jax.errors import UserError

PREFIX = "hub:"
_SECONDS = 30  # that the hub has to answer what files a model has
_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_COMMIT = re.compile(r"[0-9a-f]{40}")


class HubModel(NamedTuple):
    """A repository of models at a commit."""

    repository: str
    commit: str

    def __str__(self) -> str:
        return f"{PREFIX}{self.repository}@{self.commit}"


def parse(text: str) -> HubModel | None:
    """The model that `hub:ORG/NAME@COMMIT` names; None for a path.

    Raises:
        UserError: it begins with `hub:` and goes on otherwise. Branches and tags can move, so they
            are no commits.
    """
    if not text.startswith(PREFIX):
        return None
    repository, _, commit = text.removeprefix(PREFIX).partition("@")
    if not _NAME.fullmatch(repository) or not _COMMIT.fullmatch(commit):
        raise UserError(
            f"'{text}' is not {PREFIX}ORG/NAME@COMMIT, with the 40 hexadecimal digits of a commit"
            " (the hub shows them under Files, History)"
        )
    return HubModel(repository, commit)


def locate(text: str) -> Path:
    """The directory that a path or a `hub:` name means, fetched if need be; see `fetch`."""
    model = parse(text)
    return fetch(model) if model else Path(text).expanduser()


def fetch(model: HubModel) -> Path:
    """The directory of a model in diffusers' layout, from the cache or else from the hub.

    Only what `diffusers_directory` reads is fetched: configs, tokenizer and one safetensors (or
    msgpack) file a component, whatever variants, pickles and single-file checkpoints are beside.

    Raises:
        UserError: neither the cache nor the hub has it; it isn't in diffusers' layout.
    """
    import huggingface_hub as hub
    from huggingface_hub import errors

    from oal_jax.pretrained import diffusers_directory

    cached = _cached(model)
    if cached is not None:
        return cached
    try:
        info = hub.HfApi().model_info(model.repository, revision=model.commit, timeout=_SECONDS)
        names = [file.rfilename for file in info.siblings or ()]
        wanted = diffusers_directory.needed(names, str(model))
        path = hub.snapshot_download(model.repository, revision=model.commit, allow_patterns=wanted)
    except errors.OfflineModeIsEnabled:
        raise UserError(
            f"{model} is not in the cache {hub.constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE is set;"
            " unset it, or give generator.directory a directory"
        ) from None
    except errors.GatedRepoError:
        raise UserError(
            f"{model} wants its licence accepted: do so on {hub.constants.ENDPOINT}/"
            f"{model.repository}, then set HF_TOKEN or run 'hf auth login'"
        ) from None
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError):
        raise UserError(
            f"{model}: {hub.constants.ENDPOINT} has no such repository or commit, or it is private"
            " and HF_TOKEN is not set"
        ) from None
    except OSError as error:  # what requests raises, too, and an answer that is an error
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"{model} is not in the cache {hub.constants.HF_HUB_CACHE}, and"
            f" {hub.constants.ENDPOINT} can't be reached ({_reason(error)}); fetch it where it can"
            " and copy the cache, or give generator.directory a directory"
        ) from None
    return Path(path)


def _cached(model: HubModel) -> Path | None:
    """The snapshot in the cache, if all of it is there: a download can have been interrupted."""
    import huggingface_hub as hub
    from huggingface_hub import errors

    from oal_jax.pretrained import diffusers_directory

    try:
        found = hub.snapshot_download(
            model.repository, revision=model.commit, local_files_only=True
        )
        diffusers_directory.files(Path(found))
    except (errors.LocalEntryNotFoundError, UserError):
        return None
    return Path(found)


def _reason(error: OSError) -> str:
    """What is at the bottom of an error that wraps others."""
    response = getattr(error, "response", None)
    if response is not None:
        return f"HTTP {response.status_code}"
    cause = re.search(r"\[Errno -?\d+\] ([^'\")]+)", str(error))
    return cause[1] if cause else type(error).__name__
