"""Resolves a model: a folder as it is, a Hub id through huggingface_hub and its cache."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from squawq.errors import CheckpointError

SMALL = ["*.json", "*.jinja", "*.model", "*.txt", "LICENSE*", "NOTICE*", "USE_POLICY*"]
WEIGHTS = "*.safetensors"
OTHER_LAYOUTS = ["consolidated*", "original/*"]  # the same weights once more
_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def resolve(model: str | Path, revision: str | None = None) -> Path:
    """The local folder of `model`; revision: a branch, tag or commit of the Hub.

    Raises CheckpointError when it is neither a folder nor a Hub id that can be had.
    """
    if Path(model).is_dir():
        return Path(model)
    return fetch(hub_id(model), [WEIGHTS, *SMALL], revision)


def resolve_small(model: str | Path) -> Path:
    """The same without weights, for a tokenizer or a config."""
    return Path(model) if Path(model).is_dir() else fetch(hub_id(model), SMALL, None)


def hub_id(model: str | Path) -> str:
    """`model` as a Hub id. Raises CheckpointError when it cannot be one."""
    name = str(model)
    if Path(model).exists() or not _ID.fullmatch(name):
        raise CheckpointError(
            f"{name!r} is neither a model folder nor a Hub id such as 'meta-llama/Llama-3.1-8B-Instruct'"
        )
    return name


def fetch(name: str, patterns: list[str], revision: str | None) -> Path:
    """The folder in the cache that holds what fits the patterns. Raises CheckpointError when it cannot be had."""
    from huggingface_hub import snapshot_download

    with hub_errors(name):
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns, ignore_patterns=OTHER_LAYOUTS))


@contextmanager
def hub_errors(name: str) -> Iterator[None]:
    """Turns what huggingface_hub raises for a model into CheckpointError."""
    from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError is that of the httpx it uses
        HFValidationError,
        HTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        SafetensorsParsingError,
    )

    try:
        yield
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{name!r} is not on the Hub, or needs a login (hf auth login); no such folder here either"
        ) from error
    except HFValidationError as error:
        raise CheckpointError(f"{name!r} is not a Hub id: {error!s:.200}") from error
    except SafetensorsParsingError as error:
        raise CheckpointError(f"{name!r} has a damaged file of weights on the Hub: {error}") from error
    except (LocalEntryNotFoundError, HTTPError, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise CheckpointError(f"{name!r} is no folder here, and the Hub could not be asked: {reason}") from error


def hub_file(repo: str, name: str) -> Path:
    """One small file of a Hub model, through the cache. Raises CheckpointError when it cannot be had."""
    path = find_hub_file(repo, name)
    if path is None:
        raise CheckpointError(f"{repo!r} is no folder here, and on the Hub it has no {name}")
    return path


def find_hub_file(repo: str, name: str) -> Path | None:
    """The same; None where the repository is there and has no such file."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import RemoteEntryNotFoundError

    if not _ID.fullmatch(repo):
        raise CheckpointError(f"{repo!r} is neither a folder nor a file nor a Hub id such as 'owner/name'")
    with hub_errors(repo):
        try:
            return Path(hf_hub_download(repo, name))
        except RemoteEntryNotFoundError:
            return None
