"""What two hubs hold: the files of a model with sizes and hashes, and where to fetch them. Brings no weights.

Hugging Face (or a mirror with the same API) through huggingface_hub; ModelScope through its public HTTP API, which needs no
package: `/api/v1/models/<owner>/<name>/repo/files` lists, `…/repo?Revision=&FilePath=` serves, both as its own SDK uses them.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Final, Protocol
from urllib.parse import quote

from core.errors import DanluError, InputError, MachineError
from core.models.transfer import Link, RemoteFile, require_served

HUBS: Final = ("huggingface", "modelscope")
OFFICIAL: Final = {"huggingface": "https://huggingface.co", "modelscope": "https://modelscope.cn"}
MIRRORS: Final = ("https://hf-mirror.com",)
"""Known to speak Hugging Face's API."""
_REPO: Final = re.compile(r"[\w][\w.-]*/[\w][\w.-]*", re.ASCII)
_TIMEOUT_SECONDS: Final = 20.0
_SIDE_SUFFIXES: Final = frozenset(
    {"", ".json", ".txt", ".model", ".py", ".jinja", ".tiktoken", ".md", ".vocab", ".spm"}
)
_WEIGHT_SUFFIXES: Final = (".safetensors", ".bin")


@dataclass(frozen=True, slots=True)
class Listing:
    """What one model of a hub consists of."""

    hub: str
    endpoint: str
    repo: str
    revision: str
    """The commit where the hub tells it, else the branch."""
    files: tuple[RemoteFile, ...]
    """Those worth having: one set of weights and everything beside it."""
    left_out_bytes: int
    """Weights in other formats."""

    @property
    def total_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)

    @property
    def name(self) -> str:
        """Folder name that suggests itself."""
        return self.repo.split("/")[-1]


class Hub(Protocol):
    """A place models come from."""

    endpoint: str

    def listing(self, repo: str, revision: str = "") -> Listing:
        """Raises InputError for a model that is not there, closed or of no use, MachineError if the hub cannot be reached."""
        ...

    def link(self, listing: Listing, file: RemoteFile) -> Link: ...


def open_hub(name: str, endpoint: str = "", environ: Mapping[str, str] | None = None) -> Hub:
    """The hub `name` at `endpoint`; empty: what HF_ENDPOINT says, else the official one. Raises InputError."""
    if name not in HUBS:
        raise InputError("models.unknown_hub", name=name, known=", ".join(HUBS))
    if not endpoint and name == "huggingface":
        endpoint = (os.environ if environ is None else environ).get("HF_ENDPOINT", "")
    endpoint = (endpoint or OFFICIAL[name]).rstrip("/")
    if not re.match(r"https?://[^/\s]+", endpoint):
        raise InputError("models.bad_endpoint", endpoint=endpoint)
    return HuggingFace(endpoint) if name == "huggingface" else ModelScope(endpoint)


class HuggingFace:
    """huggingface.co or a mirror. The person's token goes to huggingface.co only."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self._token: bool | None = None if endpoint == OFFICIAL["huggingface"] else False

    def listing(self, repo: str, revision: str = "") -> Listing:
        from huggingface_hub import HfApi

        _require_name(repo)
        api = HfApi(endpoint=self.endpoint, token=self._token, library_name="danlu")
        try:
            info = api.model_info(repo, revision=revision or None, files_metadata=True, timeout=_TIMEOUT_SECONDS)
        except (OSError, ValueError) as error:  # all of the library's errors and of requests' are one of these
            raise _hugging_face_error(error, repo, revision, self.endpoint) from error
        files = [_hugging_face_file(sibling) for sibling in info.siblings or []]
        return _chosen("huggingface", self.endpoint, repo, info.sha or revision or "main", files)

    def link(self, listing: Listing, file: RemoteFile) -> Link:
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

        url = hf_hub_url(listing.repo, file.path, revision=listing.revision, endpoint=self.endpoint)
        return Link(url, build_hf_headers(token=self._token, library_name="danlu"))


class ModelScope:
    """modelscope.cn: public models, without a token."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint

    def listing(self, repo: str, revision: str = "") -> Listing:
        import requests

        _require_name(repo)
        branch = revision or "master"
        url = f"{self.endpoint}/api/v1/models/{repo}/repo/files"
        try:
            parameters = {"Revision": branch, "Recursive": "True"}
            with requests.get(url, params=parameters, timeout=_TIMEOUT_SECONDS) as response:
                require_served(response, repo)
                answer = response.json()
        except DanluError:
            raise
        except (OSError, ValueError) as error:  # requests' errors are OSErrors, and no JSON is a ValueError
            raise MachineError("models.hub_unreachable", endpoint=self.endpoint, reason=str(error)[:200]) from error
        try:
            files = [_modelscope_file(entry) for entry in answer["Data"]["Files"] if entry.get("Type") != "tree"]
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            said = answer.get("Message") if isinstance(answer, dict) else None
            raise MachineError("models.hub_said", endpoint=self.endpoint, said=str(said or answer)[:200]) from error
        return _chosen("modelscope", self.endpoint, repo, branch, files)

    def link(self, listing: Listing, file: RemoteFile) -> Link:
        query = f"Revision={quote(listing.revision, safe='')}&FilePath={quote(file.path, safe='')}"
        return Link(f"{self.endpoint}/api/v1/models/{listing.repo}/repo?{query}", {})


def choose_files(files: list[RemoteFile]) -> list[RemoteFile]:
    """One set of weights (safetensors before .bin) from the top folder, and the small files beside it.

    Other formats of the same weights (GGUF, ONNX, TensorFlow, `original/`) and hidden files are left out.
    """
    weights = [file for file in files if "/" not in file.path and file.path.endswith(_WEIGHT_SUFFIXES)]
    safetensors = [file for file in weights if file.path.endswith(".safetensors")]
    whole = [file for file in safetensors if not file.path.startswith("consolidated")] or safetensors
    chosen = whole or [file for file in weights if file.path.startswith(("pytorch_model", "model"))]
    other_index = "pytorch_model.bin.index.json" if whole else "model.safetensors.index.json"
    side = [
        file
        for file in files
        if PurePosixPath(file.path).suffix.lower() in _SIDE_SUFFIXES
        and not any(part.startswith(".") for part in PurePosixPath(file.path).parts)
        and file.path != other_index
    ]
    return sorted([*side, *chosen], key=lambda file: (file.size_bytes, file.path))


def _chosen(hub: str, endpoint: str, repo: str, revision: str, files: list[RemoteFile]) -> Listing:
    """The listing with what is worth having. Raises InputError for names that lead out of a folder, or for no model."""
    for file in files:
        path = PurePosixPath(file.path)
        if path.is_absolute() or ".." in path.parts or "\\" in file.path or not path.parts:
            raise InputError("models.unsafe_name", name=file.path, repo=repo)
    chosen = choose_files(files)
    has_weights = any(file.path.endswith(_WEIGHT_SUFFIXES) for file in chosen)
    if not has_weights or not any(file.path == "config.json" for file in chosen):
        raise InputError("models.not_a_model", repo=repo)
    left_out = sum(file.size_bytes for file in files) - sum(file.size_bytes for file in chosen)
    return Listing(hub, endpoint, repo, revision, tuple(chosen), left_out)


def _require_name(repo: str) -> None:
    if not _REPO.fullmatch(repo):
        raise InputError("models.bad_repo", name=repo)


def _hugging_face_file(sibling: Any) -> RemoteFile:
    lfs = sibling.lfs
    digest = f"sha256:{lfs.sha256}" if lfs is not None else f"git:{sibling.blob_id}" if sibling.blob_id else None
    return RemoteFile(str(sibling.rfilename), int(sibling.size or 0), digest)


def _modelscope_file(entry: Any) -> RemoteFile:
    digest = f"sha256:{entry['Sha256']}" if entry.get("Sha256") else None
    return RemoteFile(str(entry["Path"]), int(entry["Size"]), digest)


def _hugging_face_error(error: Exception, repo: str, revision: str, endpoint: str) -> DanluError:
    from huggingface_hub.errors import (
        GatedRepoError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, GatedRepoError):
        return InputError("models.hub_gated", name=repo)
    if isinstance(error, RevisionNotFoundError):
        return InputError("models.hub_no_revision", name=repo, revision=revision)
    if isinstance(error, RepositoryNotFoundError):
        return InputError("models.hub_not_found", name=repo)
    if isinstance(error, OfflineModeIsEnabled):
        return MachineError("models.hub_offline")
    return MachineError("models.hub_unreachable", endpoint=endpoint, reason=str(error)[:200])
