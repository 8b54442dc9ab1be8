"""Pushes a deliverable to the Hugging Face Hub (or a server that speaks its protocol, HF_ENDPOINT). One commit, file after file.

The token comes from the environment (HF_TOKEN, or what `hf auth login` stored) when the job runs: it is in no argument, file, log
or error of the project. Paths of this machine stay here: danlu.json is not sent, and adapter_config.json names the base model instead
of its folder.
"""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from core.checkpoints.adapter import CONFIG
from core.checkpoints.companions import DESCRIPTION
from core.errors import InputError, MachineError
from core.files import read_json
from core.messages import message
from core.runs.job import Progress

_NAME: Final = re.compile(r"[\w][\w.-]{0,95}/[\w][\w.-]{0,95}")
_REFUSED: Final = (401, 403)


def check_repository(name: str) -> str:
    """`owner/name` without spaces around it. Raises InputError `checkpoints.bad_repository`."""
    stripped = name.strip()
    if not _NAME.fullmatch(stripped) or ".." in stripped or "--" in stripped:
        raise InputError("checkpoints.bad_repository", name=stripped)
    return stripped


def has_token() -> bool:
    """Whether a token is to be found; says nothing about what it may do."""
    return bool(_token())


def upload(
    folder: str, repository: str, *, is_private: bool = True, base_model: str | None = None, progress: Progress
) -> dict[str, Any]:
    """Push `folder` to `repository` (made if it is not there). A job function. `base_model`: name on the hub, for an adapter.

    Returns {"url", "commit", "files", "size_bytes"}. Raises InputError `checkpoints.no_token`, `checkpoints.bad_repository`,
    `checkpoints.upload_refused`; MachineError `checkpoints.upload_failed`.
    """
    name, token = check_repository(repository), _token()
    if not token:
        raise InputError("checkpoints.no_token")
    import requests
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi(token=token, library_name="danlu")
    try:
        return _push(api, Path(folder), name, progress, is_private=is_private, base_model=base_model)
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        if status in _REFUSED:
            raise InputError("checkpoints.upload_refused", name=name, status=status) from None
        reason = without(token, error.server_message or str(error))
        raise MachineError("checkpoints.upload_failed", name=name, reason=reason) from None
    except (requests.RequestException, OSError, ValueError, RuntimeError) as error:
        raise MachineError("checkpoints.upload_failed", name=name, reason=without(token, str(error))) from None


def _push(
    api: Any, folder: Path, name: str, progress: Progress, *, is_private: bool, base_model: str | None
) -> dict[str, Any]:
    from huggingface_hub import CommitOperationAdd

    sizes = {file: file.stat().st_size for file in files_to_send(folder)}
    total, done = sum(sizes.values()), 0
    progress.update(0, total, message("checkpoints.progress.upload"), unit="bytes")
    made = api.create_repo(name, private=is_private, exist_ok=True)
    operations = []
    for file, size in sizes.items():
        content = content_to_send(folder, file, base_model)
        operation = CommitOperationAdd(file.relative_to(folder).as_posix(), content)
        operations.append(operation)
        # Large files go up one by one, so that the job can be cancelled between them; the commit makes all of them appear at once.
        api.preupload_lfs_files(made.repo_id, [operation], num_threads=1, free_memory=False)
        done += size
        progress.update(done, total, message("checkpoints.progress.upload"), unit="bytes")
    commit = api.create_commit(made.repo_id, operations, commit_message=f"Add {folder.name}")
    return {"url": str(made), "commit": commit.oid, "files": len(operations), "size_bytes": total}


def files_to_send(folder: Path) -> Iterator[Path]:
    """All but hidden files and danlu.json, which holds paths of this machine."""
    for file in sorted(folder.rglob("*")):
        parts = file.relative_to(folder).parts
        if file.is_file() and not any(part.startswith(".") for part in parts) and file.name != DESCRIPTION:
            yield file


def content_to_send(folder: Path, file: Path, base_model: str | None) -> str | bytes:
    """The file's path, or other content in its place: an adapter's config names its base model instead of a folder here."""
    if file.relative_to(folder).as_posix() != CONFIG:
        return str(file)
    config = read_json(file)
    base = str(config.get("base_model_name_or_path") or "")
    named = base_model or (Path(base).name if os.path.isabs(base) else base)  # noqa: PTH117 - a text, maybe a hub name
    return json.dumps({**config, "base_model_name_or_path": named}, ensure_ascii=False, indent=2).encode()


def _token() -> str | None:
    from huggingface_hub import get_token

    found: str | None = get_token()
    return found


def without(secret: str, text: str) -> str:
    """`text` with the secret made unreadable."""
    return text.replace(secret, "***")
