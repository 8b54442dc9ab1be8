"""Templates against the installed XTuner itself, and guesses against what model folders look like."""

import json
from pathlib import Path
from typing import Any

import pytest

from core.errors import InputError
from core.xtuner.templates import (
    PromptTemplate,
    guess_template,
    prompt_templates,
    render,
    render_segments,
    system_templates,
)
from core.xtuner.tokens import TrainingTokens, chat_template, training_tokens

CONVERSATION = [
    {"role": "system", "content": "Be {brief}."},
    {"role": "user", "content": "Who are you?"},
    {"role": "assistant", "content": "<|im_end|> I am Danlu."},
    {"role": "user", "content": "And now?"},
    {"role": "assistant", "content": "Still."},
]


def text(pieces: list[tuple[str, bool]]) -> str:
    return "".join(piece for piece, _ in pieces)


def test_all_templates_of_xtuner_are_read() -> None:
    templates = prompt_templates()
    assert len(templates) == 27
    assert templates["qwen_chat"].STOP_WORDS == ("<|im_end|>", "<|endoftext|>")
    assert templates["minicpm"].SYSTEM is None
    assert set(system_templates()) >= {"alpaca", "sql", "lawyer"}


def test_a_template_survives_json() -> None:
    for template in prompt_templates().values():
        assert PromptTemplate.from_json(json.loads(json.dumps(template.to_json()))) == template


@pytest.mark.parametrize(
    "value",
    [
        {},
        {"INSTRUCTION": "no field"},
        {"INSTRUCTION": "{input} {other}"},
        {"INSTRUCTION": "{input"},
        {"INSTRUCTION": 3},
    ],
)
def test_a_broken_template_is_refused(value: dict[str, Any]) -> None:
    with pytest.raises(InputError) as error:
        PromptTemplate.from_json(value)
    assert error.value.code == "templates.broken"


def test_what_people_wrote_is_never_special() -> None:
    pieces = render(prompt_templates()["qwen_chat"], CONVERSATION, add_generation_prompt=False)
    written = {piece for piece, is_special in pieces if not is_special}
    assert written == {message["content"] for message in CONVERSATION}
    assert all("{" not in piece for piece, is_special in pieces if is_special)


def test_eos_and_bos_stand_where_the_suffix_is_not_the_end() -> None:
    pieces = render(
        prompt_templates()["gemma"], CONVERSATION[1:], add_generation_prompt=False, bos="<bos>", eos="<eos>"
    )
    assert text(pieces).count("<bos>") == text(pieces).count("<eos>") == 2
    assert text(pieces).endswith("Still.<end_of_turn><eos>\n")


def test_a_question_is_left_open_for_the_answer() -> None:
    messages = [*CONVERSATION, {"role": "user", "content": "Third?"}]
    assert text(render(prompt_templates()["qwen_chat"], messages, True)).endswith(
        "Third?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert "Third?" not in text(render(prompt_templates()["qwen_chat"], messages, False))
    assert "[Round 3]" in text(render(prompt_templates()["chatglm2"], messages, True))


@pytest.mark.parametrize(
    ("template", "messages", "code"),
    [
        ("qwen_chat", CONVERSATION, "templates.no_question"),
        ("qwen_chat", [{"role": "tool", "content": "x"}], "templates.bad_role"),
        ("qwen_chat", [{"role": "user", "content": None}], "templates.bad_role"),
        ("minicpm", CONVERSATION[:2], "templates.no_system"),
    ],
)
def test_what_cannot_be_rendered_is_refused(template: str, messages: list[dict[str, Any]], code: str) -> None:
    with pytest.raises(InputError) as error:
        render(prompt_templates()[template], messages, add_generation_prompt=True)
    assert error.value.code == code


def model_folder(folder: Path, config: dict[str, Any], tokenizer: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    return folder


CHATML = "{% for m in messages %}{{'<|im_start|>' + m.role}}{% endfor %}"


@pytest.mark.parametrize(
    ("config", "tokenizer", "expected"),
    [
        ({"model_type": "llama"}, {"chat_template": CHATML}, "qwen_chat"),
        ({"model_type": "internlm2"}, {"chat_template": CHATML}, "internlm2_chat"),
        ({"model_type": "internlm2"}, {}, "internlm2_chat"),
        ({"model_type": "qwen2"}, {"chat_template": [{"name": "default", "template": CHATML}]}, "qwen_chat"),
        ({"model_type": "llama"}, {"chat_template": "<|start_header_id|>"}, "llama3_chat"),
        ({"model_type": "llama", "vocab_size": 128256}, {}, "llama3_chat"),
        ({"model_type": "llama"}, {"chat_template": "[INST] <<SYS>>"}, "llama2_chat"),
        ({"model_type": "mistral"}, {"chat_template": "[INST]"}, "mistral"),
        ({"model_type": "phi3"}, {"chat_template": "<|user|>..<|end|>"}, "phi3_chat"),
        ({"model_type": "deepseek_v3"}, {"chat_template": "<｜User｜>"}, None),
        ({"model_type": "made_up"}, {}, None),
    ],
)
def test_the_template_is_guessed(tmp_path: Path, config: Any, tokenizer: Any, expected: str | None) -> None:
    assert guess_template(model_folder(tmp_path, config, tokenizer)) == expected


def test_a_folder_without_files_has_no_template(tmp_path: Path) -> None:
    assert guess_template(tmp_path) is None
    (tmp_path / "tokenizer_config.json").write_text("{broken", encoding="utf-8")
    assert guess_template(tmp_path) is None
    (tmp_path / "chat_template.jinja").write_text(CHATML, encoding="utf-8")
    assert chat_template(tmp_path) == CHATML


@pytest.mark.parametrize(
    ("tokenizer", "expected"),
    [
        ({"tokenizer_class": "Qwen2Tokenizer", "bos_token": None, "eos_token": "<|im_end|>"}, ("", "<|im_end|>")),
        (
            {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<|im_start|>", "eos_token": "<|im_end|>"},
            ("<|im_start|>", "<|im_end|>"),
        ),
        ({"tokenizer_class": "LlamaTokenizer"}, ("<s>", "</s>")),
        (
            {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": {"content": "<b>"}, "eos_token": "<e>"},
            ("<b>", "<e>"),
        ),
        ({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<e>"}, (None, "<e>")),
    ],
)
def test_bos_and_eos_are_those_of_training(
    tmp_path: Path, tokenizer: Any, expected: tuple[str | None, str | None]
) -> None:
    assert training_tokens(model_folder(tmp_path, {}, tokenizer)) == TrainingTokens(*expected)


@pytest.mark.engine
def test_every_template_renders_what_xtuner_trains_on() -> None:
    """Against XTuner's own functions with a tokenizer whose tokens are characters."""
    from mmengine.config import ConfigDict
    from xtuner.dataset.map_fns import openai_map_fn, template_map_fn
    from xtuner.dataset.utils import encode_fn
    from xtuner.utils import PROMPT_TEMPLATE

    class Characters:
        bos_token_id, eos_token_id = 1, 2

        def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
            assert not add_special_tokens
            return [ord(character) for character in text]

    for name, template in prompt_templates().items():
        messages = CONVERSATION if template.SYSTEM is not None else CONVERSATION[1:]
        example = template_map_fn(openai_map_fn({"messages": messages}), ConfigDict(PROMPT_TEMPLATE[name]))
        encoded = encode_fn(example, Characters(), 10**6)
        segments = render_segments(template, messages, False, bos="\x01", eos="\x02")
        assert [ord(c) for segment in segments for c in text(segment)] == encoded["input_ids"], name
