"""The models in the Hub's cache on this machine (HF_HUB_CACHE)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

PREFIX = "models--"


@dataclass(frozen=True)
class CachedModel:
    """A model in the cache.

    Attributes:
        folder: The snapshot of `main`, or of what was fetched last; None where there is none.
        problem: Why huggingface_hub cannot read the entry; else "".
    """

    name: str
    folder: Path | None
    problem: str = ""


def cached_models() -> list[CachedModel]:
    """The models in the cache by name. Damaged entries are among them."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        cache = scan_cache_dir()
    except CacheNotFound:
        return []
    found = []
    for repo in cache.repos:
        if repo.repo_type != "model":
            continue
        revisions = sorted(repo.revisions, key=lambda one: ("main" in one.refs, one.last_modified))
        if revisions:
            found.append(CachedModel(repo.repo_id, revisions[-1].snapshot_path))
        else:
            found.append(CachedModel(repo.repo_id, None, "nothing of it was downloaded"))
    read = {model.name for model in found}
    found += [CachedModel(name, None, "cannot be read") for name in cached_names() if name not in read]
    return sorted(found, key=lambda model: model.name)


def cached_names() -> list[str]:
    """Hub ids of the models in the cache, from the names of its folders alone."""
    from huggingface_hub.constants import HF_HUB_CACHE

    try:
        folders = sorted(path.name for path in Path(HF_HUB_CACHE).iterdir() if path.is_dir())
    except OSError:
        return []
    return [name.removeprefix(PREFIX).replace("--", "/", 1) for name in folders if name.startswith(PREFIX)]
