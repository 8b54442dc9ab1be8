"""The tokenizer of a model folder as XTuner uses it, through the `tokenizers` library alone: no torch, no code of the model.

A folder without tokenizer.json (InternLM2's own) gets one made by `export_tokenizer`, which runs in a job of its own.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from core.errors import InputError
from core.messages import message
from core.models.remote_code import require_allowed
from core.project import Project
from core.runs.job import Progress
from core.xtuner.tokens import training_tokens


@dataclass(frozen=True, slots=True)
class TextTokenizer:
    """Text to token ids without adding special tokens, and the BOS and EOS that XTuner puts around a turn."""

    backend: Any
    """tokenizers.Tokenizer."""
    bos_ids: tuple[int, ...]
    eos_ids: tuple[int, ...]
    bos: str
    eos: str

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text; on all cores."""
        return [encoding.ids for encoding in self.backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def split(self, text: str) -> list[tuple[int, str]]:
        """(id, the text it stands for) of each token; "" for the second and later tokens of one character."""
        encoding = self.backend.encode(text, add_special_tokens=False)
        pieces: list[tuple[int, str]] = []
        shown = 0
        for number, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            pieces.append((number, text[max(start, shown) : end]))
            shown = max(shown, end)
        return pieces


def model_folders(project: Project) -> list[Path]:
    """Base models in the project: `model/` itself, as in the guide, and its sub-folders."""
    folders = [project.model, *sorted(folder for folder in project.model.glob("*") if folder.is_dir())]
    return [folder for folder in folders if (folder / "config.json").is_file() and not folder.name.startswith(".")]


def tokenizer_file(project: Project, model_folder: Path) -> Path | None:
    """The tokenizer.json to use: the model's own, or the one exported before; None if there is none yet."""
    own = model_folder / "tokenizer.json"
    if own.is_file():
        return own
    exported = exported_file(project, model_folder)
    return exported if exported.is_file() else None


def exported_file(project: Project, model_folder: Path) -> Path:
    """Where `export_tokenizer` puts the tokenizer of this model: the name changes with the model's tokenizer files."""
    digest = hashlib.sha256()
    for file in sorted(
        [
            *model_folder.glob("token*"),
            *model_folder.glob("*.model"),
            *model_folder.glob("vocab*"),
            *model_folder.glob("merges*"),
        ]
    ):
        if file.is_file():
            digest.update(file.name.encode() + file.read_bytes())
    return project.private / "tokenizers" / f"{digest.hexdigest()[:16]}.json"


def load_tokenizer(project: Project, model_folder: Path) -> TextTokenizer:
    """Raises InputError `data.no_tokenizer`, `data.broken_tokenizer`, `data.no_bos`, `data.no_eos`."""
    file = tokenizer_file(project, model_folder)
    if file is None:
        raise InputError("data.no_tokenizer", path=str(model_folder))
    return _load(model_folder, file, file.stat().st_mtime_ns)


@lru_cache(maxsize=4)
def _load(model_folder: Path, file: Path, modified_ns: int) -> TextTokenizer:
    del modified_ns
    from tokenizers import Tokenizer

    try:
        backend = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception for whatever is wrong with the file
        raise InputError("data.broken_tokenizer", path=str(file), reason=str(error)[:200]) from error
    backend.no_truncation()
    backend.no_padding()
    tokens = training_tokens(model_folder)
    if tokens.bos is None:
        raise InputError("data.no_bos", path=str(model_folder))
    if tokens.eos is None:
        raise InputError("data.no_eos", path=str(model_folder))
    return TextTokenizer(
        backend,
        _ids(backend, tokens.bos, model_folder),
        _ids(backend, tokens.eos, model_folder),
        tokens.bos,
        tokens.eos,
    )


def _ids(backend: Any, token: str, folder: Path) -> tuple[int, ...]:
    if not token:
        return ()
    single = backend.token_to_id(token)
    if single is not None:
        return (int(single),)
    if token == "[gMASK]sop":  # noqa: S105 - ChatGLM's beginning is two tokens
        return tuple(int(backend.token_to_id(part)) for part in ("[gMASK]", "sop"))
    raise InputError("data.broken_tokenizer", path=str(folder), reason=token)


def export_tokenizer(project: str, model_folder: str, progress: Progress) -> dict[str, Any]:
    """Job: load the tokenizer with transformers, as training does, and keep its fast form as tokenizer.json in the project.

    Runs the model's own tokenizer code where it has some. Raises InputError `data.slow_tokenizer`, `data.broken_tokenizer`.
    """
    from transformers import AutoTokenizer

    folder = Path(model_folder)
    require_allowed(Project(Path(project)), folder)
    progress.update(0, 1, message("data.progress.tokenizer"))
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True, padding_side="right")
    except (OSError, ValueError, ImportError) as error:
        raise InputError("data.broken_tokenizer", path=model_folder, reason=str(error)[:200]) from error
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise InputError("data.slow_tokenizer", path=model_folder)
    target = exported_file(Project(Path(project)), folder)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_suffix(".new")
    backend.save(str(temporary))
    temporary.replace(target)
    progress.update(1, 1, message("data.progress.tokenizer"))
    return {"path": str(target)}
