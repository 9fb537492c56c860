"""ModelScope and Hugging Face through their own clients; a mirror never sees a token.

Both clients are imported inside the functions: neither is needed for a folder or the demo.
"""

from __future__ import annotations

import errno
import os
import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from . import snapshot
from .errors import (
    DownloadError,
    Gemma2StreamError,
    ModelAccessError,
    ModelNotFoundError,
)
from .snapshot import File

if TYPE_CHECKING:
    from modelscope_hub import HubConfig

# Whole strings: two URL parsers can disagree about which part of a hostile URL is the host.
_OWN = frozenset(
    {
        "https://huggingface.co",
        "https://modelscope.cn",
        "https://www.modelscope.cn",
        "https://modelscope.ai",
        "https://www.modelscope.ai",
    }
)


def may_send_token(endpoint: str) -> bool:
    """Tell a hub's own host from a mirror."""
    return endpoint.rstrip("/").lower() in _OWN


class Hub(ABC):
    """One model at one revision on one hub."""

    title: ClassVar[str]
    page: ClassVar[str]
    login: ClassVar[str]
    variable: ClassVar[str]
    other: ClassVar[str]

    model: str
    revision: str
    endpoint: str
    cache: Path
    token: str | None = None
    """What the caller gave; without one, the client looks for a token itself."""

    weights = True
    """Whether they are wanted too."""

    failures: tuple[type[Exception], ...]
    """What the client raises when a hub, a network or a disk lets it down."""

    @abstractmethod
    def __init__(
        self, model: str, revision: str | None, cache_dir: str | os.PathLike[str] | None
    ) -> None: ...

    @property
    def offline(self) -> bool:
        return False

    @abstractmethod
    def cached(self) -> Path | None:
        """Find the local folder without a request, complete or not."""

    @abstractmethod
    def download(self) -> Path:
        """Fetch what is missing, verify it, and seal the folder."""

    @abstractmethod
    def explain(self, error: Exception) -> Gemma2StreamError:
        """Say what a failure of the client means to the user."""

    def _choose(self, listing: Iterable[File]) -> list[File]:
        files = snapshot.wanted(self.model, listing, weights=self.weights)
        size = sum(file.size or 0 for file in files) / 1e9
        sys.stderr.write(
            f"gemma2_stream: {self.model} ({size:.2f} GB) from {self._place} to {self.cache}\n"
        )
        return files

    @property
    def _place(self) -> str:
        """The endpoint without the user and password that it may carry."""
        return re.sub(r"//.*@", "//", self.endpoint)

    @property
    def _permission(self) -> str:
        if may_send_token(self.endpoint):
            return self.login
        return f"unset {self.variable}, because a token is never sent to a mirror, and {self.login}"

    def _not_found(self, what: str) -> ModelNotFoundError:
        return ModelNotFoundError(
            f"{self.title} ({self._place}) shows no {what}. Check the spelling, or try the other "
            f"hub with source={self.other!r}; if it is private, {self._permission}."
        )

    def _refused(self) -> ModelAccessError:
        return ModelAccessError(
            f"{self.title} ({self._place}) refuses {self.model!r}: accept its licence at "
            f"{self.page.format(self.model)}, then {self._permission}."
        )

    def _broken(self, error: BaseException) -> DownloadError:
        reason = f"{type(error).__name__}: check the network and the endpoint {self._place}"
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            reason = f"the disk that holds {str(self.cache)!r} is full: make room"
        elif isinstance(error, OSError) and error.filename is not None:
            reason = f"{error.strerror}: {error.filename!r}"
        folder = self.cached()
        whole = folder is not None and not snapshot.missing(folder, weights=self.weights)
        return DownloadError(
            f"The download of {self.model!r} from {self.title} broke off ({reason}). What arrived "
            "is kept: run the same command again and it goes on from there."
            + (" A complete copy is here already: local_files_only=True uses it." if whole else "")
        )


class ModelScope(Hub):
    title = "ModelScope"
    page = "https://modelscope.cn/models/{}"
    login = "set MODELSCOPE_API_TOKEN or run `modelscope login`"
    variable = "MODELSCOPE_ENDPOINT"
    other = "huggingface"

    def __init__(
        self, model: str, revision: str | None, cache_dir: str | os.PathLike[str] | None
    ) -> None:
        from modelscope_hub import HubConfig, HubError

        config = HubConfig(token="")
        self.model, self.revision = model, revision or "master"
        self.endpoint = str(config.endpoint)
        self.cache = Path(cache_dir or config.cache_dir).expanduser().absolute()
        self.failures = (HubError, OSError, ValueError)

    def _config(self) -> HubConfig:
        """An empty token keeps the header, the cookie and the saved login away from a mirror."""
        from modelscope_hub import HubConfig

        token = self.token if may_send_token(self.endpoint) else ""
        return HubConfig(endpoint=self.endpoint, cache_dir=self.cache, token=token)

    def cached(self) -> Path | None:
        from modelscope_hub import CacheNotFound, HubApi

        try:
            return HubApi(self._config()).download_repo(
                self.model, "model", revision=self.revision, local_files_only=True
            )
        except CacheNotFound:
            return None

    def download(self) -> Path:
        from modelscope_hub import HubApi

        api = HubApi(self._config())
        listing = api.list_repo_files(self.model, "model", revision=self.revision)
        files = self._choose(File(f.path, f.size or None, f.sha256) for f in listing)
        if old := self.cached():
            snapshot.seal(old, self.revision, [], weights=self.weights)
        chosen = [{"Path": f.name, "Size": f.size, "Sha256": f.digest} for f in files]
        folder = api.download_repo(self.model, "model", revision=self.revision, file_list=chosen)
        snapshot.seal(folder, self.revision, files, weights=self.weights)
        return folder

    def explain(self, error: Exception) -> Gemma2StreamError:
        from modelscope_hub import errors as ms

        cause: BaseException = error
        if isinstance(error, ms.FileDownloadError):
            name, cause = next(iter(error.failed_files.items()))
            if isinstance(cause, ms.FileIntegrityError):
                return snapshot.damaged(name, cause.message)
        elif isinstance(error, ms.NotExistError):
            return self._not_found(f"model {self.model!r} with a revision {self.revision!r}")
        if isinstance(cause, (ms.AuthenticationError, ms.PermissionDeniedError)):
            return self._refused()
        return self._broken(cause)


class HuggingFace(Hub):
    title = "Hugging Face"
    page = "https://huggingface.co/{}"
    login = "set HF_TOKEN or run `hf auth login`"
    variable = "HF_ENDPOINT"
    other = "modelscope"

    def __init__(
        self, model: str, revision: str | None, cache_dir: str | os.PathLike[str] | None
    ) -> None:
        from huggingface_hub import constants, errors

        self.model, self.revision = model, revision or constants.DEFAULT_REVISION
        self.endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
        self.cache = Path(cache_dir or constants.HF_HUB_CACHE).expanduser().absolute()
        # httpx up to huggingface_hub 1, httpx2 from 2 on: the one that its own errors are made of.
        http = sys.modules[errors.HTTPError.__module__.partition(".")[0]]  # type: ignore[attr-defined]
        self.failures = (http.HTTPError, http.InvalidURL, OSError, ValueError)

    @property
    def offline(self) -> bool:
        from huggingface_hub import is_offline_mode

        names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")  # the client reads them once, at import
        now = any(os.environ.get(name, "").upper() in {"1", "ON", "YES", "TRUE"} for name in names)
        return now or is_offline_mode()

    @property
    def _token(self) -> str | bool | None:
        """None lets the client find a token, False forbids it."""
        return self.token if may_send_token(self.endpoint) else False

    def cached(self) -> Path | None:
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(
            self.model, "config.json", cache_dir=self.cache, revision=self.revision
        )
        return Path(found).parent if isinstance(found, str) else None

    def download(self) -> Path:
        from huggingface_hub import snapshot_download

        commit, files = self._list()
        for file in files:
            if re.fullmatch("[0-9a-f]{64}", file.digest or ""):
                self._fetch(file, commit)
        path = snapshot_download(
            self.model,
            revision=self.revision,
            cache_dir=self.cache,
            endpoint=self.endpoint,
            token=self._token,
            allow_patterns=[file.name for file in files],
        )
        folder = Path(path)
        if folder.name != commit:  # the branch has moved on meanwhile
            return self.download()
        self._verify(folder, files)
        snapshot.seal(folder, commit, files, weights=self.weights)
        return folder

    def _list(self) -> tuple[str, list[File]]:
        from huggingface_hub import HfApi, constants

        info = HfApi(endpoint=self.endpoint, token=self._token).model_info(
            self.model,
            revision=self.revision,
            files_metadata=True,
            timeout=constants.HF_HUB_ETAG_TIMEOUT,  # None would wait for ever
        )
        listing = (
            File(file.rfilename, file.size, file.lfs.sha256 if file.lfs else file.blob_id)
            for file in info.siblings or ()
        )
        return info.sha or "", self._choose(listing)

    def _verify(self, folder: Path, files: list[File]) -> None:
        """The client compares sizes only."""
        from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]

        size = sum(file.size or 0 for file in files)
        bar = tqdm(desc="Verifying", total=size, unit="B", unit_scale=True, disable=None)  # type: ignore[no-untyped-call]
        with bar:
            snapshot.verify(folder, files, bar.update)

    def _fetch(self, file: File, commit: str) -> None:
        """Put a large file where the client looks for it; alone, it keeps no broken transfer."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.file_download import http_get, repo_folder_name
        from huggingface_hub.utils import (  # type: ignore[attr-defined]
            WeakFileLock,
            build_hf_headers,
        )

        repo = repo_folder_name(repo_id=self.model, repo_type="model")
        blob = self.cache / repo / "blobs" / str(file.digest)
        lock = self.cache / ".locks" / repo / f"{file.digest}.lock"
        for folder in (blob.parent, lock.parent):
            folder.mkdir(parents=True, exist_ok=True)
        part = blob.with_name(f"{blob.name}.incomplete")
        url = hf_hub_url(self.model, file.name, revision=commit, endpoint=self.endpoint)
        headers = build_hf_headers(token=self._token) | {"Accept-Encoding": "identity"}
        with WeakFileLock(lock):
            if blob.exists():
                return
            with part.open("ab") as stream:
                if file.size is not None and stream.tell() > file.size:
                    stream.truncate(stream.seek(0))
                http_get(
                    url,
                    stream,
                    resume_size=stream.tell(),
                    headers=headers,
                    expected_size=file.size,
                    displayed_filename=file.name,
                )
            part.replace(blob)

    def explain(self, error: Exception) -> Gemma2StreamError:
        from huggingface_hub import errors as hf

        status = error.response.status_code if isinstance(error, hf.HfHubHTTPError) else None
        if isinstance(error, hf.RevisionNotFoundError):
            return self._not_found(f"revision {self.revision!r} of the model {self.model!r}")
        if isinstance(error, hf.GatedRepoError):
            return self._refused()
        if isinstance(error, (hf.RepositoryNotFoundError, hf.HFValidationError)) or status == 404:
            return self._not_found(f"model {self.model!r}")
        return self._refused() if status in (401, 403) else self._broken(error)

    def _refused(self) -> ModelAccessError:
        name = self.model.partition("/")[2]
        free = f" 'LLM-Research/{name}' on ModelScope needs no token." if "gemma-2" in name else ""
        return ModelAccessError(f"{super()._refused()}{free}")


HUBS: dict[str, type[Hub]] = {"modelscope": ModelScope, "huggingface": HuggingFace}
