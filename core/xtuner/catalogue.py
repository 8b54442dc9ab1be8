"""The configs that come with the installed XTuner: what each trains, on what, and whether it can start here.

Read from file names and text; no config is run and xtuner is not imported.
"""

import importlib.util
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

from core.messages import Message, message
from core.xtuner.templates import xtuner_folder

METHODS: Final = ("qlora", "lora", "full", "pretrain", "dpo", "orpo", "reward", "vision", "huggingface", "script")
_METHOD_BY_MODEL: Final = {
    "DPO": "dpo",
    "ORPO": "orpo",
    "RewardModel": "reward",
    "LLaVAModel": "vision",
    "InternVL_V1_5": "vision",
    "AutoModelForCausalLM": "huggingface",
}
_NAME_METHOD: Final = re.compile(r"_(?:int8_)?(full_finetune|full|qlora|lora|dpo|orpo|reward)(?:_|$)")
_SIZE: Final = re.compile(r"(?:^|_)((?:0_5|1_2|1_8|6_7|\d+x\d+|\d+)b)(?:_|$)", re.IGNORECASE)
_EPOCHS_IN_NAME: Final = re.compile(r"_e(\d+)(?:_|$)")
_TAIL: Final = re.compile(r"_(?:e\d+|gpu\d+|\d+gpus|sp\d+|\d+k|1M|hf|openmind|varlenattn|varlen|copy)(?=_|$)")


@dataclass(frozen=True, slots=True)
class ConfigEntry:
    """One config file of XTuner."""

    name: str
    """Stem of the file, as `xtuner list-cfg` prints it."""
    path: Path
    family: str
    """`internlm`, `qwen`, … (folder below `configs`; the model's own for `custom_dataset`)."""
    model: str
    """`internlm2_chat_1_8b`: the name up to the method."""
    base_model: str | None
    """What `pretrained_model_name_or_path` says: a hub id, as shipped."""
    size: str | None
    """`1.8B`, `8x7B`; None where the name does not say."""
    method: str
    """One of METHODS."""
    data: str
    """`alpaca`, `oasst1`, `custom_sft`, …"""
    epochs: int | None
    max_length: int | None
    obstacle: Message | None
    """Why it cannot start with this stack; None if it can."""

    @property
    def is_supervised(self) -> bool:
        """Whether it is one of the 510 that train a language model on text, which the form can edit."""
        return self.method in {"qlora", "lora", "full", "pretrain"}


@cache
def configs() -> Sequence[ConfigEntry]:
    """All configs of the installed XTuner, by name. Raises MachineError `templates.no_xtuner`."""
    root = xtuner_folder() / "configs"
    files = sorted(file for file in root.rglob("*.py") if not file.name.startswith(("_", ".")))
    return tuple(sorted((_read(file, root) for file in files), key=lambda entry: (entry.name, str(entry.path))))


def search(pattern: str = "", *, methods: Sequence[str] = (), only_loadable: bool = False) -> list[ConfigEntry]:
    """Configs with every word of `pattern` in name, base model or data, in any case: those of `xtuner list-cfg -p`, and more."""
    words = pattern.lower().split()
    found = []
    for entry in configs():
        text = f"{entry.name} {entry.base_model or ''} {entry.data}".lower()
        is_wanted = (not methods or entry.method in methods) and (entry.obstacle is None or not only_loadable)
        if is_wanted and all(word in text for word in words):
            found.append(entry)
    return found


def find(name: str) -> ConfigEntry | None:
    """The config of that name; a few names occur twice, then the first by path."""
    return next((entry for entry in configs() if entry.name == name), None)


def _read(file: Path, root: Path) -> ConfigEntry:
    text = file.read_text(encoding="utf-8", errors="replace")
    name = file.stem
    folders = file.relative_to(root).parts[:-1]
    method = _method(name, text)
    model, data = _model_and_data(name)
    size = _SIZE.search(name)
    epochs = _number(text, "max_epochs") or _as_int(_EPOCHS_IN_NAME.search(name))
    return ConfigEntry(
        name=name,
        path=file,
        family=folders[2] if folders[0] == "custom_dataset" and len(folders) > 2 else folders[0],
        model=model,
        base_model=_text(text, "pretrained_model_name_or_path")
        or _text(text, "llm_name_or_path")
        or _text(text, "path"),
        size=size[1].replace("_", ".").upper().replace("X", "x") if size else None,
        method=method,
        data=data,
        epochs=epochs,
        max_length=_number(text, "max_length"),
        obstacle=_obstacle(text, method),
    )


def _method(name: str, text: str) -> str:
    kind = re.search(r"^model = dict\(\s*type=(\w+)", text, re.MULTILINE)
    if kind is None:
        return "script"
    if kind[1] in _METHOD_BY_MODEL:
        return _METHOD_BY_MODEL[kind[1]]
    if "pretrain" in name:
        return "pretrain"
    if "quantization_config" in text:
        return "lora" if "load_in_8bit=True" in text and "load_in_4bit=True" not in text else "qlora"
    return "lora" if re.search(r"^\s+lora=dict\(", text, re.MULTILINE) else "full"


def _model_and_data(name: str) -> tuple[str, str]:
    found = _NAME_METHOD.search(name)
    if found is None:
        return _TAIL.sub("", name), ""
    rest = name[found.end() - 1 :] if found.end() < len(name) or name[-1] == "_" else ""
    data = _TAIL.sub("", rest).strip("_")
    return name[: found.start()], re.sub(r"^(?:full|qlora|lora)(?:_|$)", "", data)


def _obstacle(text: str, method: str) -> Message | None:
    if method == "script":
        return message("catalogue.obstacle.script")
    if "transformers_models" in text:
        return message("catalogue.obstacle.old_transformers")
    for module in ("openmind", "modelscope", "llava"):
        if re.search(rf"^from {module}[. ]", text, re.MULTILINE) and importlib.util.find_spec(module) is None:
            return message("catalogue.obstacle.module", module=module)
    if method == "huggingface":
        return message("catalogue.obstacle.huggingface")
    return None


def _text(text: str, name: str) -> str | None:
    found = re.search(rf"""^{name} = \(?\s*(["'])(.+?)\1""", text, re.MULTILINE)
    return found[2] if found else None


def _number(text: str, name: str) -> int | None:
    return _as_int(re.search(rf"^{name} = (\d+)\s*(?:#.*)?$", text, re.MULTILINE))


def _as_int(found: re.Match[str] | None) -> int | None:
    return int(found[1]) if found else None
