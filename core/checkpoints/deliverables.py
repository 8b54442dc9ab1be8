"""What a project has delivered, what a delivery is called, and the whole way from checkpoint to verified model as one job."""

import io
import shutil
import zipfile
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from core.checkpoints.adapter import export_adapter
from core.checkpoints.companions import DESCRIPTION
from core.checkpoints.full import export_full
from core.checkpoints.gpu_blocks import CPU, CUDA
from core.checkpoints.inspect import CheckpointCard, inspect_checkpoint
from core.checkpoints.merge import merge_adapter
from core.checkpoints.planner import plan_delivery
from core.checkpoints.serving import SERVED_KINDS
from core.checkpoints.verify import verify_merge
from core.errors import DanluError, MachineError
from core.files import read_json, tree_size_bytes, within
from core.launchers.local import idle_gpu
from core.models.remote_code import require_allowed
from core.project import Project
from core.runs.directory import RunDirectory
from core.runs.job import Progress
from core.runs.launch import start_job

ONE_THREAD: Final = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
"""The merge has its own threads; a second pool in the linear algebra below them only gets in their way."""


@dataclass(frozen=True, slots=True)
class Deliverable:
    """One folder in huggingface/ or final_model/."""

    path: Path
    kind: str
    """`adapter`, `merged`, `full`, `gguf`, `fp8`, `awq` or `gptq`; `unknown` for a model that Danlu did not make."""
    run: str | None
    checkpoint: str | None
    dtype: str | None
    size_bytes: int
    created_at: float
    """Unix seconds."""
    verified: dict[str, Any] | None
    sources: tuple[str, ...] = ()
    """Names of the adapters that it was merged or combined from."""
    quantized: dict[str, Any] | None = None
    """How its weights became 4-bit, in figures."""

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def is_verified(self) -> bool:
        return bool(self.verified and self.verified.get("passed"))

    @property
    def is_model(self) -> bool:
        """Whether one can chat with it as it is: FP8 and 4-bit weights need a package that is not here."""
        return self.kind not in SERVED_KINDS and (self.path / "config.json").is_file()


def list_deliverables(project: Project) -> list[Deliverable]:
    """Newest first. Folders made by hand with XTuner are listed too; half-made ones (hidden) are not."""
    found = []
    for parent in (project.huggingface, project.final_model):
        folders = [path for path in parent.iterdir() if path.is_dir()] if parent.is_dir() else []
        candidates = [*folders, parent] if parent.is_dir() else []
        found += [_describe(path) for path in candidates if not path.name.startswith(".") and _holds_model(path)]
    return sorted(found, key=lambda item: item.created_at, reverse=True)


def delivery_name(project: Project, run_dir: Path, checkpoint: Path) -> str:
    """The guide's `iter_500`; with the run's name before it if another run has delivered that iteration."""
    name = checkpoint.name.removesuffix(".pth")
    for parent in (project.huggingface, project.final_model):
        if (parent / name).exists() and _describe(parent / name).run != run_dir.name:
            return f"{run_dir.name}_{name}"
    return name


def delivery_targets(project: Project, card: CheckpointCard, name: str, *, merge: bool) -> list[Path]:
    """Folders that a delivery will make. An adapter of this very checkpoint that is there already is used, not made again."""
    if not card.is_adapter:
        return [project.final_model / name]
    has_adapter = merge and _is_adapter_of(project.huggingface / name, card.name, card.path.parent.name)
    adapter = [] if has_adapter else [project.huggingface / name]
    return adapter + ([project.final_model / name] if merge else [])


def zip_folder(folder: Path) -> bytes:
    """The folder as a zip, for a download: stored, since weights do not compress."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            archive.write(file, f"{folder.name}/{file.relative_to(folder)}")
    return buffer.getvalue()


def start_delivery(
    project: Project,
    checkpoint: Path,
    *,
    base_model: str | None,
    dtype: str,
    merge: bool,
    verify: bool,
    device: str = CPU,
) -> RunDirectory:
    """Start `deliver` as a job (kind "merge", or "adapter" without merging). `device`: that the merge computes on.

    Raises InputError for a checkpoint outside of the project, MachineError `checkpoints.no_gpu`.
    """
    inside = within(checkpoint, project.root)
    arguments = {
        "project": str(project.root),
        "checkpoint": str(inside),
        "name": delivery_name(project, inside.parent, inside),
        "base_model": base_model,
        "dtype": dtype,
        "merge": merge,
        "verify": verify,
        "device": device,
    }
    return start_job(
        project,
        "core.checkpoints.deliverables:deliver",
        kind="merge" if merge else "adapter",
        title=f"{inside.parent.name} / {arguments['name']}",
        arguments=arguments,
        gpus=gpus_for(device),
        env=ONE_THREAD,
    )


def gpus_for(device: str) -> list[str]:
    """What a job that merges on `device` asks for: the GPU that is most idle, for which it waits if a run holds it."""
    if device != CUDA:
        return []
    gpu = idle_gpu()
    if gpu is None:
        raise MachineError("checkpoints.no_gpu")
    return [gpu]


def deliver(
    project: str,
    checkpoint: str,
    name: str,
    *,
    base_model: str | None = None,
    dtype: str = "keep",
    merge: bool = True,
    verify: bool = True,
    device: str = CPU,
    progress: Progress,
) -> dict[str, Any]:
    """Checkpoint → adapter in huggingface/`name` → merged model in final_model/`name` → verified.

    A full fine-tune goes to final_model/ at once.

    An adapter of this checkpoint that is there already is used. Returns {"adapter", "model", "verified"}. Raises what a plan names as its
    problem, before anything is written.
    """
    place = Project(Path(project))
    card = inspect_checkpoint(Path(checkpoint))
    if card.problem is not None:
        raise card.problem
    adapter = place.huggingface / name
    has_adapter = bool(card.is_adapter) and _is_adapter_of(adapter, card.name, Path(checkpoint).parent.name)
    if has_adapter and not merge:
        return {"adapter": str(adapter), "model": None, "verified": None}
    targets = delivery_targets(place, card, name, merge=merge)
    plan = plan_delivery(card, targets, base_model=base_model, dtype=dtype, merge=merge, verify=verify, device=device)
    if plan.problem is not None:
        raise plan.problem
    if not card.is_adapter:
        made = export_full(checkpoint, str(targets[0]), base_model=base_model, dtype=dtype, progress=progress)
        return {"adapter": None, "model": made["path"], "verified": None}
    if not has_adapter:
        export_adapter(checkpoint, str(adapter), base_model=base_model, dtype=dtype, progress=progress)
    if not merge:
        return {"adapter": str(adapter), "model": None, "verified": None}
    assert plan.base is not None  # or the plan would have a problem
    if verify:  # the answers of both models are compared, which runs the code that comes with them
        require_allowed(place, plan.base)
    merged = merge_adapter(
        str(plan.base), [str(adapter)], str(place.final_model / name), device=device, progress=progress
    )
    verified = verify_merge(merged["path"], progress=progress) if verify else None
    return {"adapter": str(adapter), "model": merged["path"], "verified": verified}


def discard(project: Project, path: Path) -> Path:
    """Move a deliverable to the project's trash; return where it lies now."""
    inside = within(path, project.huggingface, project.final_model)
    trash = (
        project.private / "trash" / f"{inside.parent.name}_{inside.name}_{datetime.now().astimezone():%Y%m%d_%H%M%S}"
    )
    trash.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(inside, trash)
    return trash


def _is_adapter_of(folder: Path, checkpoint: str, run: str) -> bool:
    if not (folder / DESCRIPTION).is_file():
        return False
    found = _describe(folder)
    return found.kind == "adapter" and found.checkpoint == checkpoint and found.run == run


def _holds_model(folder: Path) -> bool:
    names = ("adapter_config.json", "config.json", "Modelfile")
    return any((folder / name).is_file() for name in names)


def _describe(folder: Path) -> Deliverable:
    try:
        value = read_json(folder / DESCRIPTION)
    except DanluError:
        value = None
    if not isinstance(value, dict):
        value = {"kind": "adapter" if (folder / "adapter_config.json").is_file() else "unknown"}
    verified = value.get("verified")
    return Deliverable(
        path=folder,
        kind=str(value.get("kind", "unknown")),
        run=value.get("run"),
        checkpoint=value.get("checkpoint"),
        dtype=value.get("dtype"),
        size_bytes=tree_size_bytes(folder)
        if folder.name not in ("huggingface", "final_model")
        else sum(f.stat().st_size for f in folder.iterdir() if f.is_file()),
        created_at=folder.stat().st_mtime,
        verified=verified if isinstance(verified, dict) else None,
        sources=_source_names(value.get("adapters")),
        quantized=quantized if isinstance(quantized := value.get("quantized"), dict) else None,
    )


def _source_names(adapters: Any) -> tuple[str, ...]:
    entries = adapters if isinstance(adapters, list) else []
    return tuple(Path(str(entry["path"])).name for entry in entries if isinstance(entry, dict) and "path" in entry)
