"""A config to take away: the plain XTuner file, and the guide's own commands to repeat everything without this app."""

import io
import shlex
import zipfile
from dataclasses import dataclass

from core.config.deepspeed import FOLDER, Setting
from core.config.edits import method_of
from core.config.source import ConfigSource
from core.messages import Message, message
from core.project import Project


@dataclass(frozen=True, slots=True)
class Command:
    """One step of the guide."""

    why: Message
    line: str
    """For bash, to be run in the project's folder."""


def commands(
    project: Project, name: str, source: ConfigSource, *, deepspeed: Setting | None = None, cards: int = 1
) -> list[Command]:
    """Train, convert, merge and chat, as in the guide. A full fine-tuning has no adapter and nothing to merge."""
    config, work = f"config/{name}.py", f"train/{name}"
    ranks = f"NPROC_PER_NODE={cards} " if cards > 1 else ""
    engine = f" --deepspeed {shlex.quote(_file(deepspeed) or deepspeed.name)}" if deepspeed else ""
    template = str(source.get("prompt_template", "")).removeprefix("PROMPT_TEMPLATE.")
    model = str(source.get("model.llm.pretrained_model_name_or_path", ""))
    chat = f" --prompt-template {shlex.quote(template)}" if template.isidentifier() else ""
    result = f"huggingface/{name}"
    found = [
        Command(message("config.export.folder"), f"cd {shlex.quote(str(project.root))}"),
        Command(
            message("config.export.train"),
            f"{ranks}xtuner train {shlex.quote(config)} --work-dir {shlex.quote(work)}{engine}",
        ),
        Command(
            message("config.export.convert"),
            f'xtuner convert pth_to_hf {shlex.quote(config)} "$(cat {shlex.quote(work)}/last_checkpoint)" {shlex.quote(result)}',
        ),
    ]
    if method_of(source) != "full":
        merged = f"final_model/{name}"
        line = f"xtuner convert merge {shlex.quote(model)} {shlex.quote(result)} {shlex.quote(merged)}"
        found.append(Command(message("config.export.merge"), line))
        result = merged
    return [*found, Command(message("config.export.chat"), f"xtuner chat {shlex.quote(result)}{chat}")]


def bundle(name: str, text: str, script: str, deepspeed: Setting | None = None) -> bytes:
    """A zip with the config as it is, the commands, and the DeepSpeed JSON if XTuner has not got it."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"config/{name}.py", text.encode("utf-8"))
        if deepspeed and (file := _file(deepspeed)):
            archive.writestr(file, deepspeed.text.encode("utf-8"))
        entry = zipfile.ZipInfo("commands.sh", date_time=(2024, 1, 1, 0, 0, 0))
        entry.external_attr = 0o755 << 16
        entry.compress_type = zipfile.ZIP_DEFLATED
        archive.writestr(entry, script.encode("utf-8"))
    return buffer.getvalue()


def _file(deepspeed: Setting) -> str | None:
    """Where the project keeps it; None for one of XTuner's, which goes by its name."""
    return f"config/{FOLDER}/{deepspeed.name}.json" if deepspeed.is_own else None
