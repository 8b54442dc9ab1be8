"""Pushes a deliverable to ModelScope through its own library (`modelscope-hub`), which is not among Danlu's requirements. File after
file, each in a commit of its own, the small files last.

As with Hugging Face the token comes from the environment (MODELSCOPE_API_TOKEN, or what `modelscope-hub login` stored) and goes nowhere
else.
"""

import contextlib
import importlib.util
import os
from pathlib import Path
from typing import Any, Final

from core.checkpoints.upload import check_repository, content_to_send, files_to_send, without
from core.errors import InputError, MachineError
from core.messages import message
from core.runs.job import Progress

PACKAGE: Final = "modelscope-hub"
TOKEN: Final = "MODELSCOPE_API_TOKEN"  # noqa: S105 - a variable's name


def is_installed() -> bool:
    return importlib.util.find_spec("modelscope_hub") is not None


def has_token() -> bool:
    """Whether a token is in the environment or was stored by the library; says nothing about what it may do."""
    home = Path(os.environ.get("MODELSCOPE_HOME") or Path.home() / ".modelscope")
    return bool(os.environ.get(TOKEN)) or (home / "credentials" / "git_token").is_file()


def upload_to_modelscope(
    folder: str, repository: str, *, is_private: bool = True, base_model: str | None = None, progress: Progress
) -> dict[str, Any]:
    """Push `folder` to the model `repository` (made if it is not there). A job function. `base_model`: name on the hub, for an adapter.

    Returns {"url", "files", "size_bytes"}. Raises InputError `checkpoints.no_modelscope_token`, `checkpoints.bad_repository`,
    `checkpoints.upload_refused`; MachineError `checkpoints.no_modelscope`, `checkpoints.upload_failed`.
    """
    name = check_repository(repository)
    if not is_installed():
        raise MachineError("checkpoints.no_modelscope", package=PACKAGE)
    from modelscope_hub import HubApi, HubConfig
    from modelscope_hub.errors import AuthenticationError, HubError, PermissionDeniedError

    config = HubConfig()
    if not config.token:
        raise InputError("checkpoints.no_modelscope_token")
    try:
        made = _push(HubApi(config), Path(folder), name, progress, is_private=is_private, base_model=base_model)
    except (AuthenticationError, PermissionDeniedError) as error:
        raise InputError("checkpoints.upload_refused", name=name, status=error.status_code or 401) from None
    except (HubError, OSError, ValueError, RuntimeError) as error:
        raise MachineError("checkpoints.upload_failed", name=name, reason=without(config.token, str(error))) from None
    return {"url": f"{config.endpoint}/models/{name}", **made}


def _push(
    api: Any, folder: Path, name: str, progress: Progress, *, is_private: bool, base_model: str | None
) -> dict[str, Any]:
    from modelscope_hub.errors import AlreadyExistsError

    sizes = {file: file.stat().st_size for file in files_to_send(folder)}
    total, done = sum(sizes.values()), 0
    progress.update(0, total, message("checkpoints.progress.upload"), unit="bytes")
    with contextlib.suppress(AlreadyExistsError):  # not left to the upload, which would make a public one
        api.create_repo(name, "model", visibility="private" if is_private else "public")
    for file, size in sorted(sizes.items(), key=lambda item: -item[1]):
        place = file.relative_to(folder).as_posix()
        content = content_to_send(folder, file, base_model)
        api.upload_file(name, "model", content, place, commit_message=f"Add {place}", disable_tqdm=True)
        done += size
        progress.update(done, total, message("checkpoints.progress.upload"), unit="bytes")
    return {"files": len(sizes), "size_bytes": total}
