"""What a project has to chat with: merged models, adapters on their base, base models. Reads folders, loads nothing."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.checkpoints.serving import SERVED_KINDS
from core.errors import DanluError
from core.files import read_json
from core.project import Project
from core.settings import Settings


@dataclass(frozen=True, slots=True)
class ChatModel:
    """One entry of the model picker."""

    kind: str
    """merged, full, adapter or base"""
    name: str
    path: Path
    """The folder whose weights are loaded; for an adapter its base model."""
    adapter: Path | None = None
    prompt_template: Mapping[str, Any] | None = None
    """As recorded in the deliverable; None: found from the model."""
    system: str = ""
    is_there: bool = True
    """False: an adapter whose base model is gone."""

    @property
    def id(self) -> str:
        return f"{self.kind}:{self.adapter or self.path}"


def find_chat_models(project: Project, settings: Settings) -> list[ChatModel]:
    """Merged models, then adapters, newest first in each; then base models by name."""
    merged = [model for model in _whole_models(project) if model.kind not in SERVED_KINDS]
    adapters = [_adapter(folder) for folder in _newest(project.huggingface)]
    shared = [settings.shared_models] if settings.shared_models else []
    bases = {
        folder.resolve(): ChatModel("base", folder.name if folder != project.model else project.name, folder)
        for root in (project.model, *shared)
        for folder in (root, *sorted(root.glob("*/")))
        if (folder / "config.json").is_file()
    }
    for model in adapters:  # a base lies wherever it was trained from
        if model is not None and model.is_there:
            bases.setdefault(model.path.resolve(), ChatModel("base", model.path.name, model.path))
    return [model for model in (*merged, *adapters, *bases.values()) if model is not None]


def find_served_models(project: Project) -> list[ChatModel]:
    """Models that were exported for another server: this app's own worker cannot load them. Newest first."""
    return [model for model in _whole_models(project) if model.kind in SERVED_KINDS]


def _whole_models(project: Project) -> list[ChatModel]:
    found = (_merged(folder) for folder in _newest(project.final_model))
    return [model for model in found if model is not None]


def _newest(root: Path) -> list[Path]:
    folders = [folder for folder in root.glob("*/") if folder.is_dir()]
    return sorted(folders, key=lambda folder: folder.stat().st_mtime, reverse=True)


def _merged(folder: Path) -> ChatModel | None:
    if not (folder / "config.json").is_file():
        return None
    facts = _facts(folder)
    return ChatModel(
        str(facts.get("kind") or "merged"),
        folder.name,
        folder,
        prompt_template=facts.get("prompt_template") or None,
        system=str(facts.get("system") or ""),
    )


def _adapter(folder: Path) -> ChatModel | None:
    settings = folder / "adapter_config.json"
    if not settings.is_file():
        return None
    facts = _facts(folder)
    base_model = facts.get("base_model")
    recorded = (
        (base_model.get("path") if isinstance(base_model, dict) else None)
        or _read(settings).get("base_model_name_or_path")
        or ""
    )
    base = Path(str(recorded))
    return ChatModel(
        "adapter",
        folder.name,
        base,
        adapter=folder,
        prompt_template=facts.get("prompt_template") or None,
        system=str(facts.get("system") or ""),
        is_there=bool(recorded) and (base / "config.json").is_file(),
    )


def _facts(folder: Path) -> dict[str, Any]:
    """The deliverable's danlu.json; empty for a folder that was made elsewhere."""
    return _read(folder / "danlu.json") if (folder / "danlu.json").is_file() else {}


def _read(file: Path) -> dict[str, Any]:
    try:
        value = read_json(file)
    except DanluError:
        return {}
    return value if isinstance(value, dict) else {}
