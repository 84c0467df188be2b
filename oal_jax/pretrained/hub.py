"""Directories of Hugging Face hub models, from the local cache or the network.

A model that is complete in the cache needs no network. `HF_HOME`, `HF_HUB_CACHE`, `HF_HUB_OFFLINE`,
`HF_ENDPOINT` and `HF_TOKEN` have their usual meaning.
"""

import errno
import re
from pathlib import Path

from oal_jax.config.hub_names import HubModel, parse
from oal_jax.errors import UserError

_TIMEOUT = 30  # seconds for the hub to list the files of a model


def locate(text: str) -> Path:
    """The directory of a path or of a `hub:` name; see `fetch`."""
    model = parse(text)
    return fetch(model) if model else Path(text).expanduser()


def fetch(model: HubModel) -> Path:
    """The directory of a model in diffusers' layout, from the cache or else from the hub.

    Only the files that `diffusers_directory` reads are fetched: configs, tokenizer and one
    safetensors (or msgpack) file per component. Variants, pickles and single-file checkpoints are
    not.

    Raises:
      UserError: neither the cache nor the hub has the model, or it isn't in diffusers' layout.
    """
    import huggingface_hub as hub
    from huggingface_hub import errors

    from oal_jax.pretrained import diffusers_directory

    cached = _cached(model)
    if cached is not None:
        return cached
    try:
        info = hub.HfApi().model_info(model.repository, revision=model.commit, timeout=_TIMEOUT)
        names = [file.rfilename for file in info.siblings or ()]
        files = diffusers_directory.needed(names, str(model))
        path = hub.snapshot_download(model.repository, revision=model.commit, allow_patterns=files)
    except errors.OfflineModeIsEnabled:
        raise UserError(
            f"{model} is not in the cache {hub.constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE is set;"
            " unset it, or give generator.directory a directory"
        ) from None
    except errors.GatedRepoError:
        raise UserError(
            f"{model} requires that its licence is accepted: do so on {hub.constants.ENDPOINT}/"
            f"{model.repository}, then set HF_TOKEN or run 'hf auth login'"
        ) from None
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError):
        raise UserError(
            f"{model}: {hub.constants.ENDPOINT} has no such repository or commit, or it is private"
            " and HF_TOKEN is not set"
        ) from None
    except (OSError, _http_error()) as error:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"{model} is not in the cache {hub.constants.HF_HUB_CACHE}, and"
            f" {hub.constants.ENDPOINT} can't be reached ({_reason(error)}); fetch it where it can"
            " and copy the cache, or give generator.directory a directory"
        ) from None
    return Path(path)


def _cached(model: HubModel) -> Path | None:
    """The snapshot in the cache if it is complete; an interrupted download is not."""
    import huggingface_hub as hub
    from huggingface_hub import errors

    from oal_jax.pretrained import diffusers_directory

    try:
        path = hub.snapshot_download(model.repository, revision=model.commit, local_files_only=True)
        diffusers_directory.files(Path(path))
    except (errors.LocalEntryNotFoundError, UserError):
        return None
    return Path(path)


def _http_error() -> type[Exception]:
    """The base of the errors of huggingface_hub's HTTP library, which changes with its version.

    Since version 1, a failed connection is no `OSError` but another of these.
    """
    from huggingface_hub.errors import HfHubHTTPError

    return HfHubHTTPError.__bases__[0]


def _reason(error: Exception) -> str:
    """The HTTP status or the system's message inside an error that wraps others."""
    response = getattr(error, "response", None)
    if response is not None:
        return f"HTTP {response.status_code}"
    cause = re.search(r"\[Errno -?\d+\] ([^'\")]+)", str(error))
    return cause[1] if cause else type(error).__name__
