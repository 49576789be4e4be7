"""squawq push: checks a quantized folder, writes its card, and uploads it by huggingface_hub's resumable upload.

Nothing is sent before the folder is a whole checkpoint of known files and the Hub has accepted token and repository.
Retries, parts and deduplication are huggingface_hub's. Nothing on the Hub is ever deleted.
"""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from squawq.errors import CheckpointError, ConfigError, OutputError, SquawqError
from squawq.format.files import has_file, is_temporary, open_file, read_bytes, read_json
from squawq.format.reader import Checkpoint
from squawq.format.shards import INDEX
from squawq.inspection import missing
from squawq.publish.card import README, Origin, check_gemm, check_id, is_ours, outdated, write_card
from squawq.quantization.job import JOB, PART
from squawq.report.files import PAGE, REPORT

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

OWN = ("config.json", "quant_config.json", README, REPORT, PAGE, INDEX)
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
WEIGHTS = (".safetensors", ".bin", ".gguf", ".pt", ".pth", ".h5", ".msgpack", ".onnx")
IGNORED = (".cache", ".git", ".gitattributes", ".gitignore", ".DS_Store")  # left here, as huggingface_hub leaves them


@dataclass(frozen=True)
class Upload:
    """What a push did: where it is, how many files and bytes it has."""

    url: str
    files: int
    bytes: int


def push(
    folder: str | Path,
    repo: str,
    *,
    private: bool = False,
    revision: str = "main",
    token_file: str | Path | None = None,
    origin: Origin | None = None,
    force: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> Upload:
    """Upload `folder` to the model repository `repo`, which is made if it is not there.

    The token is that of `token_file`, else HF_TOKEN's or a login's. revision: a branch, made if need be. A card that is
    missing is written, one of squawq's is brought up to date (`write_card`), and one that a person wrote or changed is
    kept. force: write over a README.md, here or there, that squawq did not write or wrote of another model, and go on
    in a repository with other weights. say: hears what is done.
    Raises ConfigError, CheckpointError or OutputError before anything is sent, OutputError for an upload that failed.
    """
    folder, origin = Path(folder), origin or Origin()
    check_id(repo, "the repository")
    token = read_token(token_file)
    files = check_folder(folder)
    old = outdated(folder, repo)
    if old and not origin.given and not force:
        raise OutputError(
            f"{folder / README} {old}; remove it, or say --source and what else it had again, and it is written anew"
        )
    if origin.given or README not in files or is_ours(read_bytes(folder / README).decode(errors="replace")):
        write_card(folder, repo, origin, force=force, say=say)
        files = check_folder(folder)
    else:
        say(f"{folder / README}: kept as it is; it is not as squawq wrote it")
    size = sum((folder / name).stat().st_size for name in files)
    try:
        api = _login(token)
        _prepare(api, folder, files, repo, private, revision, force)
        say(f"{len(files)} files, {size / 1e6:,.1f} MB, to {repo}")
        patterns = [glob.escape(name) for name in files]
        message = f"Upload {repo.partition('/')[2]} with squawq"
        done = api.upload_folder(
            repo_id=repo, folder_path=folder, revision=revision, allow_patterns=patterns, commit_message=message
        )
    except SquawqError:
        raise
    except Exception as error:  # transport errors are httpx's, or another library's, by huggingface_hub's release
        raise OutputError(
            f"the upload to {repo} stopped: {_reason(error)}; run the same command again, it sends what is missing"
        ) from error
    return Upload(str(done.commit_url), len(files), size)


def read_token(file: str | Path | None) -> str | None:
    """A token from a file; None leaves it to huggingface_hub. Raises ConfigError, which never shows the content."""
    if file is None:
        return None
    try:
        token = Path(file).read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        raise ConfigError(f"the token file {str(file)!r} cannot be read: {type(error).__name__}") from error
    if not token.isascii() or not token.isprintable() or not token or " " in token:
        raise ConfigError(f"the token file {str(file)!r} must hold one token and nothing else")
    return token


def check_folder(folder: Path) -> list[str]:
    """The names of the files to send; reads headers, no weights.

    Raises a SquawqError for a folder that is not a whole AWQ checkpoint or holds anything else.
    """
    if folder.name.endswith(".partial") or (folder / JOB).exists():
        raise CheckpointError(f"{folder}: is not finished; run squawq quantize again and push what it makes")
    checkpoint = Checkpoint(folder)
    if checkpoint.config.quant is None:
        raise ConfigError(f"{folder}: is not quantized; squawq pushes AWQ folders")
    check_gemm(folder, checkpoint.config.quant_method, checkpoint.config.layout)
    if lost := missing(checkpoint):
        raise CheckpointError(f"{folder}: is incomplete: {len(lost)} tensors are missing, such as {lost[0]}")
    if not any(has_file(folder / name) for name in TOKENIZERS):
        raise CheckpointError(f"{folder}: has no tokenizer ({', '.join(TOKENIZERS)}); copy the source's into it")
    known = {*OWN, *(path.name for path in checkpoint.companions())}
    known |= {info.file.name for info in checkpoint.tensors.values()}
    found = (path.name for path in folder.iterdir())
    names = sorted(name for name in found if name not in IGNORED and not is_temporary(name))
    if stray := [name for name in names if name not in known or name.startswith(PART)]:
        raise OutputError(
            f"{folder}: holds files that are not part of the model: {', '.join(stray[:5])}; move it elsewhere"
        )
    for name in names:
        open_file(folder / name).close()  # raises
    return names


def _login(token: str | None) -> HfApi:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    api = HfApi(token=token, library_name="squawq")
    try:
        api.whoami()
    except LocalTokenNotFoundError as error:
        raise ConfigError("no token: set HF_TOKEN, give --token-file, or log in with `hf auth login`") from error
    except HfHubHTTPError as error:
        if error.response is not None and error.response.status_code in (401, 403):
            source = "that of --token-file" if token else "HF_TOKEN's, or the login's"
            raise ConfigError(f"the Hub refuses the token ({source}); it needs write access") from error
        raise
    return api


def _prepare(api: HfApi, folder: Path, files: list[str], repo: str, private: bool, revision: str, force: bool) -> None:
    """Make repository and branch where they are not there; raise OutputError for ones that the push would spoil."""
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.hf_api import RepoFile

    try:
        api.create_repo(repo, private=private or None, exist_ok=True)
    except HfHubHTTPError as error:
        if error.response is not None and error.response.status_code in (401, 403):
            raise ConfigError(f"the token may not write to {repo}: {_reason(error)}") from error
        raise
    if private and not api.repo_info(repo).private:
        raise OutputError(f"{repo} exists and is public; make it private on the Hub, or push without --private")
    if revision != "main":
        api.create_branch(repo, branch=revision, exist_ok=True)
    if force:
        return
    tree = api.list_repo_tree(repo, recursive=True, revision=revision)
    there = {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}
    weights = [name for name in there if name.endswith(WEIGHTS)]
    others = [name for name in weights if name not in files]
    if not others and not _same_source(api, folder, REPORT in there, repo, revision):
        others = [name for name in weights if not _is_there(folder / name, there[name])]
    if others:
        raise OutputError(f"{repo} has other weights ({others[0]}); choose another repository, or --force")
    if README in there:
        with _fetched(api, repo, README, revision) as path:
            there_too = read_bytes(path)
        if there_too != read_bytes(folder / README) and not is_ours(there_too.decode(errors="replace")):
            raise OutputError(
                f"{repo} has a README.md that squawq did not write; put it into {folder} to keep it, or --force"
            )


@contextmanager
def _fetched(api: HfApi, repo: str, name: str, revision: str) -> Iterator[Path]:
    """A small file of the repository, outside the Hub's cache, where it would look like a part of a model."""
    with TemporaryDirectory(prefix="squawq-push-") as folder:
        yield Path(api.hf_hub_download(repo, name, revision=revision, local_dir=folder))


def _is_there(path: Path, found: RepoFile) -> bool:
    """Whether the Hub has this file of weights, byte for byte."""
    if found.lfs is None or found.lfs.size != path.stat().st_size:
        return False
    with open_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == found.lfs.sha256


def _same_source(api: HfApi, folder: Path, reported: bool, repo: str, revision: str) -> bool:
    """Whether both reports name one 16-bit model: its weights may be quantized anew and put over the old."""
    if not reported or not has_file(folder / REPORT):
        return False
    with _fetched(api, repo, REPORT, revision) as path:
        ours, theirs = read_json(folder / REPORT), read_json(path)
    return _source(ours) is not None and _source(ours) == _source(theirs)


def _source(report: Mapping[str, Any]) -> object:
    job = report.get("job")
    return job.get("source") if isinstance(job, dict) else None


def _reason(error: Exception) -> str:
    """The first lines of an error, short."""
    return " ".join(str(error).split())[:300] or type(error).__name__
