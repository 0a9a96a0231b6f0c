"""Files of hub repositories, in the local cache. No torch."""

from __future__ import annotations

import urllib.error
import urllib.request
from pathlib import Path

from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from align_cli.errors import UserError, first_line

HUB_TIMEOUT = 4.0
"""Seconds until the hub counts as unreachable."""


def reachable() -> bool:
    """Whether the hub answers, within seconds. False under HF_HUB_OFFLINE."""
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        with urllib.request.urlopen(
            urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=HUB_TIMEOUT
        ):
            return True
    except urllib.error.HTTPError:
        return True  # it answered
    except OSError:
        return False


def fetch(
    label: str, repo: str, file: str, *, online: bool, advice: str, revision: str | None = None
) -> Path | None:
    """One file of a hub repository in the local cache; None if the hub lacks it, or it is not cached.

    Args:
        label: how to call the repository in errors. advice: what else the user may pass, "pass a local ...".
        online: `reachable()`, asked once for many files; else only the cache is seen.
        revision: a commit, for files of one version.
    Raises:
        UserError: a licence to accept, no such repository, no such id, or the transfer failed.
    """
    try:
        return Path(hf_hub_download(repo, file, revision=revision, local_files_only=not online))
    except GatedRepoError as error:
        raise UserError(
            f"the hub model {label} asks for its licence to be accepted: do so on "
            f"huggingface.co/{repo}, then `hf auth login`; or {advice}"
        ) from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"the hub has no model {label} (or it is private); check the id, or pass a local folder"
        ) from error
    except HFValidationError as error:
        raise UserError(f"{repo!r} is no hub id: {first_line(error)}") from error
    except (EntryNotFoundError, LocalEntryNotFoundError):
        return None
    except OSError as error:
        raise UserError(f"cannot fetch {file} of {label} from the hub: {first_line(error)}") from error
