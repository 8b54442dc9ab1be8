"""Jobs on something that was delivered: another format, a hub, a check. Each starts one supervised job and returns its run directory."""

from pathlib import Path
from typing import Final

from core.checkpoints.deliverables import ONE_THREAD, Deliverable
from core.checkpoints.gguf_export import KINDS
from core.checkpoints.upload import check_repository
from core.errors import ConflictError, InputError
from core.files import within
from core.models.remote_code import require_allowed
from core.project import Project
from core.runs.directory import RunDirectory
from core.runs.launch import start_job

UPLOADS: Final = {
    "huggingface": "core.checkpoints.upload:upload",
    "modelscope": "core.checkpoints.modelscope_upload:upload_to_modelscope",
}
"""Hub → the job function that pushes to it."""
_QUIET: Final = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}


def gguf_target(project: Project, model: Path, kind: str) -> Path:
    """`final_model/<model>-<kind>`."""
    return project.final_model / f"{model.name}-{kind}"


def start_gguf(project: Project, model: Path, kind: str) -> RunDirectory:
    """Write the model as GGUF beside it.

    Raises InputError `checkpoints.bad_dtype`, `files.outside`; ConflictError if it is there already.
    """
    if kind not in KINDS:
        raise InputError("checkpoints.bad_dtype", dtype=kind)
    target = gguf_target(project, model, kind)
    if target.exists():
        raise ConflictError("files.exists", path=str(target))
    arguments = {"model": str(_inside(project, model)), "target": str(target), "kind": kind}
    function = "core.checkpoints.gguf_export:export_gguf"
    return start_job(project, function, kind="gguf", title=target.name, arguments=arguments, env=ONE_THREAD)


def fp8_target(project: Project, model: Path) -> Path:
    """`final_model/<model>-fp8`."""
    return project.final_model / f"{model.name}-fp8"


def start_fp8(project: Project, model: Path) -> RunDirectory:
    """Write the model in FP8 beside it. Raises InputError `files.outside`; ConflictError if it is there already."""
    target = fp8_target(project, model)
    if target.exists():
        raise ConflictError("files.exists", path=str(target))
    arguments = {"model": str(_inside(project, model)), "target": str(target)}
    function = "core.checkpoints.fp8_export:export_fp8"
    return start_job(project, function, kind="fp8", title=target.name, arguments=arguments)


def start_verify(project: Project, model: Path) -> RunDirectory:
    """Check a merged model, by its answers where memory allows. Raises InputError if its own code is not allowed to run."""
    require_allowed(project, model)
    arguments = {"folder": str(_inside(project, model))}
    function = "core.checkpoints.verify:verify_merge"
    return start_job(project, function, kind="verify", title=model.name, arguments=arguments)


def start_upload(
    project: Project,
    item: Deliverable,
    repository: str,
    *,
    is_private: bool,
    base_model: str | None,
    hub: str = "huggingface",
) -> RunDirectory:
    """Push a deliverable to a `hub` of UPLOADS. Raises InputError `checkpoints.bad_repository`. The token is for the job to find."""
    name = check_repository(repository)
    arguments = {
        "folder": str(_inside(project, item.path)),
        "repository": name,
        "is_private": is_private,
        "base_model": base_model,
    }
    title = f"{item.name} → {name}"
    return start_job(project, UPLOADS[hub], kind="upload", title=title, arguments=arguments, env=_QUIET)


def _inside(project: Project, path: Path) -> Path:
    return within(path, project.huggingface, project.final_model)
