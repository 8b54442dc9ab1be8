"""What a model folder says about its chat: the XTuner template that fits it, the BOS and EOS XTuner puts around turns.

Reads config.json and the tokenizer's JSON files only; loads no tokenizer.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

_DEFAULT_TOKENS: Final = {
    "LlamaTokenizer": ("<s>", "</s>"),
    "CodeLlamaTokenizer": ("<s>", "</s>"),
    "InternLMTokenizer": ("<s>", "</s>"),
    "InternLM2Tokenizer": ("<s>", "</s>"),
    "InternLM3Tokenizer": ("<s>", "</s>"),
    "BaichuanTokenizer": ("<s>", "</s>"),
    "GPT2Tokenizer": ("<|endoftext|>", "<|endoftext|>"),
    "GemmaTokenizer": ("<bos>", "<eos>"),
}
"""BOS and EOS of tokenizer classes whose folders may leave them out."""
_WITHOUT_BOS: Final = {"QWenTokenizer", "QWen2Tokenizer", "Qwen2Tokenizer"}
"""Classes for which XTuner 0.2.0 puts no BOS; AutoTokenizer loads Qwen2Tokenizer in its fast form, which is listed."""


@dataclass(frozen=True, slots=True)
class TrainingTokens:
    """What XTuner puts before the first turn and, where the suffix is not the end, after each answer."""

    bos: str | None
    """"" for Qwen tokenizers. None: the tokenizer has none, and XTuner 0.2.0 stops with a TypeError."""
    eos: str | None


def training_tokens(model_folder: Path) -> TrainingTokens:
    """BOS and EOS as XTuner 0.2.0 uses them for this model (`xtuner/dataset/utils.py`, get_bos_eos_token_ids)."""
    settings = _read(model_folder / "tokenizer_config.json")
    fallback = _read(model_folder / "special_tokens_map.json")
    kind = str(settings.get("tokenizer_class", "")).removesuffix("Fast")
    bos, eos = (_token(settings, name) or _token(fallback, name) for name in ("bos_token", "eos_token"))
    default_bos, default_eos = _DEFAULT_TOKENS.get(kind, (None, None))
    eos = eos or (default_eos if "eos_token" not in settings else None)
    if kind in _WITHOUT_BOS:
        return TrainingTokens("", eos)
    if kind == "ChatGLMTokenizer":
        return TrainingTokens("[gMASK]sop", eos)
    return TrainingTokens(bos or (default_bos if "bos_token" not in settings else None), eos)


def chat_template(model_folder: Path) -> str | None:
    """The Jinja chat template of the tokenizer, if it has one (its `default` where it has several)."""
    file = model_folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8", errors="replace")
    for name in ("tokenizer_config.json", "chat_template.json"):
        value = _read(model_folder / name).get("chat_template")
        if isinstance(value, list):
            named = {str(entry.get("name")): entry.get("template") for entry in value if isinstance(entry, dict)}
            value = named.get("default") or next(iter(named.values()), None)
        if isinstance(value, str) and value:
            return value
    return None


def guess_template(model_folder: Path) -> str | None:
    """The key of XTuner's PROMPT_TEMPLATE that fits the model, or None if none is known to.

    The markers in the chat template decide; a base model without one is judged by its `model_type` and vocabulary.
    """
    config = _read(model_folder / "config.json")
    model_type = str(config.get("model_type", "")).lower()
    jinja = chat_template(model_folder)
    if jinja is not None:
        for matches, name in _BY_MARKER:
            if matches(jinja, model_type):
                return name
        return None
    return _guess_base(model_type, config, model_folder)


_BY_MARKER: Final[tuple[tuple[Callable[[str, str], bool], str | None], ...]] = (
    (lambda text, kind: "<|im_start|>" in text and kind.startswith("internlm"), "internlm2_chat"),
    (lambda text, kind: "<|im_start|>" in text and kind == "minicpm3", "minicpm3"),
    (lambda text, _: "<|im_start|>" in text, "qwen_chat"),
    (lambda text, _: "<|start_header_id|>" in text, "llama3_chat"),
    (lambda text, _: "<start_of_turn>" in text, "gemma"),
    (lambda text, _: "<|START_OF_TURN_TOKEN|>" in text, "cohere_chat"),
    (lambda text, _: "<用户>" in text, "minicpm"),
    (lambda text, _: "<｜User｜>" in text, None),  # DeepSeek-V3/R1: XTuner 0.2.0 has no template for it
    (lambda text, kind: "<eoh>" in text or kind == "internlm", "internlm_chat"),
    (lambda text, _: "[gMASK]" in text and "sop" in text, "chatglm3"),
    (lambda text, _: "<|user|>" in text and "<|end|>" in text, "phi3_chat"),
    (lambda text, _: "<|user|>" in text and "<|assistant|>" in text, "zephyr"),
    (lambda text, kind: "[INST]" in text and kind in {"mistral", "mixtral"}, "mistral"),
    (lambda text, kind: "[INST]" in text and kind == "deepseek", "deepseek_moe"),
    (lambda text, _: "[INST]" in text, "llama2_chat"),
    (lambda text, _: "### Instruction" in text, "deepseek_coder"),
    (lambda text, _: "User: " in text and "Assistant:" in text, "deepseek_v2"),
    (lambda text, _: "USER: " in text and "ASSISTANT:" in text, "vicuna"),
)

_BY_MODEL_TYPE: Final = {
    "internlm": "internlm_chat",
    "internlm2": "internlm2_chat",
    "internlm3": "internlm2_chat",
    "qwen": "qwen_chat",
    "qwen2": "qwen_chat",
    "qwen2_moe": "qwen_chat",
    "qwen3": "qwen_chat",
    "qwen3_moe": "qwen_chat",
    "mistral": "mistral",
    "mixtral": "mixtral",
    "gemma": "gemma",
    "gemma2": "gemma",
    "phi3": "phi3_chat",
    "cohere": "cohere_chat",
    "minicpm": "minicpm",
    "minicpm3": "minicpm3",
    "deepseek": "deepseek_moe",
    "deepseek_v2": "deepseek_v2",
}


def _guess_base(model_type: str, config: dict[str, Any], folder: Path) -> str | None:
    vocabulary = config.get("vocab_size")
    if model_type == "llama":
        return {32000: "llama2_chat", 32016: "code_llama_chat", 128256: "llama3_chat"}.get(vocabulary)  # type: ignore[arg-type]
    if model_type == "baichuan":
        return "baichuan2_chat" if vocabulary == 125696 else "baichuan_chat"
    if model_type == "chatglm":
        return "chatglm3" if "chatglm3" in f"{config.get('_name_or_path', '')} {folder.name}".lower() else "chatglm2"
    return _BY_MODEL_TYPE.get(model_type)


def _token(table: dict[str, Any], name: str) -> str | None:
    value = table.get(name)
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) and value else None


def _read(file: Path) -> dict[str, Any]:
    """The JSON object in `file`; empty if there is none or it is broken: model inspection reports that."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
