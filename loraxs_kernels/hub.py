"""Adapters on Hugging Face's Hub, found there and put there.  huggingface_hub is imported when it is needed."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from . import card
from .files import named
from .naming import first_line

FILE = "adapter.safetensors"

Token = str | bool | None


def local_file(path: str | os.PathLike, revision: str | None = None, token: Token = None) -> Path:
    """The adapter file that is meant: the path itself, adapter.safetensors in a folder, or that file of a repository.

    What exists here goes before a repository of the same name.  A path that is none of these is returned as it is.

    Raises FileNotFoundError where the folder or the repository has no such file, ValueError where revision= is given
    for something here, ConnectionError where the Hub cannot be reached, ImportError without huggingface_hub.
    """
    here = named(path, "path", "an adapter")
    if not here.exists() and isinstance(path, str) and card.HUB_ID.fullmatch(path):
        return download(path, FILE, revision, token)
    if revision is not None:
        raise ValueError(f"revision: got {revision!r} for the local path {here}; only a repository on the Hub has one")
    if here.is_dir():
        if not (here / FILE).is_file():
            peft = (here / "adapter_config.json").is_file()
            remedy = "; it is an adapter of PEFT, for PeftModel.from_pretrained" if peft else ""
            raise FileNotFoundError(f"path: the folder {here} has no {FILE}{remedy}")
        return here / FILE
    return here


def download(
    repo: str, name: str, revision: str | None = None, token: Token = None, *, from_cache: bool = True
) -> Path:
    """One file of a model repository, from the Hub or, where that cannot be reached and it may be, from the cache.

    The first question is asked once and not, as huggingface_hub does, five times within half a minute.
    """
    hub = _huggingface_hub()
    with _explained(repo, name if from_cache else None, revision):
        try:
            hub.get_hf_file_metadata(hub.hf_hub_url(repo, name, revision=revision), token=token)
        except Exception as error:
            answer = getattr(error, "response", None)
            if not from_cache or isinstance(error, ValueError) or (answer is not None and answer.status_code < 500):
                raise
            try:
                return Path(hub.hf_hub_download(repo, name, revision=revision, local_files_only=True))
            except hub.errors.LocalEntryNotFoundError:
                raise error from None
        return Path(hub.hf_hub_download(repo, name, revision=revision, token=token))


def upload(
    repo: str,
    adapter: bytes,
    text: str,
    *,
    private: bool | None = None,
    token: Token = None,
    revision: str | None = None,
    message: str | None = None,
) -> str:
    """Put an adapter file and its card into a repository, which is made if need be, in one commit; its address.

    A card that was edited there stays as it is, with a warning.
    """
    hub = _huggingface_hub()
    api = hub.HfApi(token=token)
    files = {FILE: adapter, card.NAME: text.encode()}
    with _explained(repo, None, revision):
        repo = api.create_repo(repo, private=private, exist_ok=True).repo_id
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
        try:
            there = download(repo, card.NAME, revision, token, from_cache=False)  # which may hold it as it was
        except FileNotFoundError:
            there = None
        if there is not None and not card.is_as_written(there):
            warnings.warn(f"{repo}: its {card.NAME} was edited and stays as it is", stacklevel=3)
            del files[card.NAME]
        commit = [hub.CommitOperationAdd(name, data) for name, data in files.items()]
        message = message or "Upload a LoRA-XS adapter"
        return api.create_commit(repo, commit, commit_message=message, revision=revision).commit_url


def _huggingface_hub() -> ModuleType:
    try:
        import huggingface_hub.errors
    except ImportError as error:
        raise ImportError(
            "adapters on Hugging Face's Hub need the package huggingface_hub: pip install huggingface_hub"
        ) from error
    return huggingface_hub


@contextmanager
def _explained(repo: str, name: str | None, revision: str | None) -> Iterator[None]:
    """Turn errors of huggingface_hub into errors that say what is wrong and what to do."""
    errors, log_in = _huggingface_hub().errors, "log in (hf auth login) or pass token="
    not_here = "is not here, and " if name else ""  # for something that is to be loaded
    try:
        yield
    except errors.HFValidationError as error:
        raise ValueError(f"{repo!r} is not a name of a repository on the Hub: {first_line(error)}") from error
    except errors.GatedRepoError as error:
        raise PermissionError(f"{repo}: access on the Hub is gated; accept the terms there, and {log_in}") from error
    except errors.RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{repo}: {not_here}the Hub has no such repository, or a private one: {log_in}"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise FileNotFoundError(f"{repo}: the repository on the Hub has no revision {revision!r}") from error
    except errors.LocalEntryNotFoundError as error:  # the network has gone after the first question
        raise ConnectionError(f"{repo}: {not_here}the Hub cannot be reached") from error
    except errors.EntryNotFoundError as error:
        raise FileNotFoundError(f"{repo}: the repository on the Hub has no file {name}") from error
    except errors.OfflineModeIsEnabled as error:
        raise ConnectionError(f"{repo}: {not_here}HF_HUB_OFFLINE is set, so the Hub is not asked") from error
    except (FileNotFoundError, PermissionError, ConnectionError):  # as above, from `download`
        raise
    # An error of the library below: of httpx or, before huggingface_hub 1.0, of requests, whose errors are OSErrors.
    except (OSError, errors.HfHubHTTPError.__bases__[0]) as error:
        if getattr(getattr(error, "response", None), "status_code", None) in (401, 403):
            raise PermissionError(f"{repo}: the Hub refuses; {log_in}. The token must allow what you do") from error
        raise ConnectionError(f"{repo}: {not_here}the Hub cannot be reached ({first_line(error)})") from error
