"""The configs of a project: listed, copied from XTuner, saved under a name. Never overwrites what it did not read."""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from core.config.source import ConfigSource
from core.config.tree import MAX_BYTES
from core.errors import ConflictError, DanluError, InputError
from core.files import free_path, read_json, write_json, write_text
from core.project import Project
from core.xtuner.catalogue import ConfigEntry, find

_NAME: Final = re.compile(r"[^\W_][\w.-]{0,120}", re.UNICODE)
_COPY_SUFFIX: Final = re.compile(r"_copy(_\d+)?$")


@dataclass(frozen=True, slots=True)
class ConfigFile:
    """A config of a project."""

    name: str
    """Stem of the file."""
    path: Path
    modified_at: float
    """Unix seconds."""


@dataclass(frozen=True, slots=True)
class Draft:
    """What a person has typed and not saved."""

    name: str
    text: str
    saved_text: str
    """The file as it was when editing began; saving checks that it still is."""
    broken_text: str | None = None
    """What was typed into the source and does not parse; `text` is the last good version."""


def list_configs(project: Project) -> list[ConfigFile]:
    """Configs in `project.config`, newest first."""
    files = [file for file in project.config.glob("*.py") if file.is_file() and not file.name.startswith((".", "_"))]
    found = [ConfigFile(file.stem, file, file.stat().st_mtime) for file in files]
    return sorted(found, key=lambda config: (-config.modified_at, config.name))


def read_config(path: Path) -> str:
    """The text of a config, byte for byte. Raises InputError `files.missing`, `files.not_utf8`, `config.too_large`."""
    try:
        data = path.read_bytes() if path.stat().st_size <= MAX_BYTES else None
    except OSError as error:
        raise InputError("files.missing", path=str(path)) from error
    if data is None:
        raise InputError("config.too_large", size_kib=path.stat().st_size // 1024, limit_kib=MAX_BYTES // 1024)
    return _decoded(data, str(path))


def import_config(project: Project, file_name: str, data: bytes) -> ConfigFile:
    """A config from elsewhere, under its own name or the next free one. One that does not parse comes in too: it is mended here.

    Raises InputError `config.too_large`, `files.not_utf8`, `config.bad_name`.
    """
    if len(data) > MAX_BYTES:
        raise InputError("config.too_large", size_kib=len(data) // 1024, limit_kib=MAX_BYTES // 1024)
    return add_config(project, Path(file_name).name, _decoded(data, file_name), is_exact=False)


def copy_config(entry: ConfigEntry, project: Project) -> ConfigFile:
    """Copy one of XTuner's configs to `config/<name>_copy.py`, as `xtuner copy-cfg` does, or to `<name>_copy_2.py` if that is taken."""
    return add_config(project, f"{entry.name}_copy", read_config(entry.path), is_exact=False)


def add_config(project: Project, name: str, text: str, *, is_exact: bool = True) -> ConfigFile:
    """A new config. With `is_exact`, ConflictError `config.name_taken` if the name is taken; else the next free name.

    Raises InputError `config.bad_name`.
    """
    name = name.removesuffix(".py")
    if not _NAME.fullmatch(name):
        raise InputError("config.bad_name", name=name)
    path = project.config / f"{name}.py"
    if is_exact and path.exists():
        raise ConflictError("config.name_taken", name=name)
    path = free_path(path)
    write_text(path, text)
    return ConfigFile(path.stem, path, path.stat().st_mtime)


def save_config(project: Project, draft: Draft) -> ConfigFile:
    """Save a draft over its file; the version before goes to `.danlu/versions/`. The text must parse.

    Raises InputError `config.syntax`, ConflictError `config.changed_on_disk` if the file is no longer what editing began with.
    """
    ConfigSource(draft.text)
    path = project.config / f"{draft.name}.py"
    if path.exists():
        current = read_config(path)
        if current != draft.saved_text:
            raise ConflictError("config.changed_on_disk", name=draft.name)
        if current != draft.text:
            write_text(free_path(project.private / "versions" / f"{draft.name}.py"), current)
    write_text(path, draft.text)
    discard_draft(project, draft.name)
    return ConfigFile(draft.name, path, path.stat().st_mtime)


def change_config(project: Project, name: str, edit: Callable[[ConfigSource], ConfigSource]) -> ConfigFile:
    """Edit a saved config in place, as the launch page's fixes do; the version before goes to `.danlu/versions/`.

    Raises ConflictError `config.has_draft` if there are unsaved edits, which must not be lost or saved unseen.
    """
    draft = open_draft(project, name)
    if draft.text != draft.saved_text or draft.broken_text is not None:
        raise ConflictError("config.has_draft", name=name)
    return save_config(project, replace(draft, text=edit(ConfigSource(draft.text)).text))


def original(name: str) -> str | None:
    """The text of XTuner's config that `<name>_copy` was copied from."""
    entry = find(_COPY_SUFFIX.sub("", name)) if _COPY_SUFFIX.search(name) else None
    return None if entry is None else read_config(entry.path)


def open_draft(project: Project, name: str) -> Draft:
    """The draft of a config if there is one that can be read, else its file."""
    file = _draft_file(project, name)
    saved = read_config(project.config / f"{name}.py")
    try:
        value = read_json(file)
        text, saved_text, broken_text = value["text"], value["saved_text"], value.get("broken_text")
        if isinstance(text, str) and isinstance(saved_text, str) and isinstance(broken_text, str | None):
            return Draft(name, text, saved_text, broken_text)
    except (DanluError, KeyError, TypeError, AttributeError):
        pass
    return Draft(name, saved, saved)


def keep_draft(project: Project, draft: Draft) -> None:
    """Autosave. A draft equal to the file is no draft."""
    if draft.text == draft.saved_text and draft.broken_text is None:
        discard_draft(project, draft.name)
    else:
        value = {"text": draft.text, "saved_text": draft.saved_text, "broken_text": draft.broken_text}
        write_json(_draft_file(project, draft.name), value)


def discard_draft(project: Project, name: str) -> None:
    _draft_file(project, name).unlink(missing_ok=True)


def _decoded(data: bytes, path: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError("files.not_utf8", path=path, offset=error.start) from error


def _draft_file(project: Project, name: str) -> Path:
    return project.drafts / "config" / f"{name}.json"
