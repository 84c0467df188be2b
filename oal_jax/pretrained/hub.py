"""Models on the Hugging Face hub: the directory of one, fetched where the cache lacks it.

The local cache is looked at first, and nothing is asked of the network when all is there
(`HF_HOME`, `HF_HUB_CACHE`, `HF_HUB_OFFLINE`, `HF_ENDPOINT` and `HF_TOKEN` mean what they mean to
huggingface_hub).
"""

import errno
import re
from pathlib import Path

from oal_jax.config.hub_names import HubModel, parse
from oal_jax.errors import UserError

_SECONDS = 30  # that the hub has to answer what files a model has


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
