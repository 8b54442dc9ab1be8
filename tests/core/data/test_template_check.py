"""Prompt templates against chat templates: verdicts, diffs, and templates that misbehave."""

import json
from pathlib import Path

import pytest

from core.data.template_check import Verdict, check_template, diff
from core.xtuner.templates import prompt_templates
from tests.models import write_tiny_llama

CHATML = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
QWEN = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are Qwen, created by Alibaba Cloud."
    " You are a helpful assistant.<|im_end|>\n' }}{% endif %}" + CHATML
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)


def verdict(folder: Path, template: str, jinja: str | None, **more: str) -> Verdict:
    model = write_tiny_llama(folder / "tiny")
    file = model / "tokenizer_config.json"
    settings = {**json.loads(file.read_text(encoding="utf-8")), **more}
    settings.pop("chat_template", None)
    file.write_text(json.dumps(settings | ({"chat_template": jinja} if jinja else {})), encoding="utf-8")
    (model / "chat_template.jinja").unlink(missing_ok=True)
    found = check_template(prompt_templates()[template], model)
    assert bool(found.pieces) is (found.verdict not in (Verdict.NO_CHAT_TEMPLATE, Verdict.BROKEN))
    return found.verdict


CASES = {
    "chatml_is_qwens": ("qwen_chat", CHATML, Verdict.ENDS),
    "qwen_adds_its_own_system_text": ("qwen_chat", QWEN, Verdict.DEFAULT_SYSTEM),
    "llama3_is_not_chatml": ("llama3_chat", CHATML, Verdict.DIFFERENT),
    "other_chatml": ("internlm2_chat", CHATML, Verdict.ENDS),
    "no_template": ("qwen_chat", None, Verdict.NO_CHAT_TEMPLATE),
    "syntax_error": ("qwen_chat", "{% for %}", Verdict.BROKEN),
    "raises": ("qwen_chat", "{{ raise_exception('tools only') }}", Verdict.BROKEN),
    "asks_for_the_machine": ("qwen_chat", "{{ ''.__class__.__mro__[1].__subclasses__() }}", Verdict.BROKEN),
    "system_refused": (
        "qwen_chat",
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}" + CHATML,
        Verdict.SYSTEM,
    ),
    "system_dropped": (
        "qwen_chat",
        CHATML.replace("{% for m in messages %}", "{% for m in messages if m['role'] != 'system' %}"),
        Verdict.SYSTEM,
    ),
    "answers_trimmed_away": ("qwen_chat", CHATML.replace("m['content']", "m['content'][:0]"), Verdict.DIFFERENT),
    "says_nothing": ("qwen_chat", "{{ '' }}", Verdict.DIFFERENT),
    "huge_loop": ("qwen_chat", "{% for i in range(10**9) %}x{% endfor %}", Verdict.BROKEN),
}


@pytest.mark.parametrize(("template", "jinja", "expected"), CASES.values(), ids=CASES)
def test_verdicts(tmp_path: Path, template: str, jinja: str | None, expected: Verdict):
    assert verdict(tmp_path, template, jinja) is expected


def test_spaces_between_marks_count(tmp_path: Path):
    assert verdict(tmp_path, "llama2_chat", LLAMA2) is Verdict.DIFFERENT


def test_rendering_is_that_of_transformers(tmp_path: Path):
    from transformers import AutoTokenizer

    from core.data.template_check import _SYSTEM, _TURNS, _render_jinja

    model = write_tiny_llama(tmp_path / "tiny")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = QWEN
    for messages in (list(_TURNS), [_SYSTEM, *_TURNS]):
        expected = tokenizer.apply_chat_template(messages, tokenize=False)
        assert _render_jinja(QWEN, messages, bos="<s>", eos="</s>") == expected


def test_diff_holds_both_texts_and_tears_no_mark_apart():
    ours, theirs = "<|im_start|>user\nHi there<|im_end|>", "<|start|>user\nHi you<|im_end|>\n"
    pieces = diff(ours, theirs)
    assert "".join(piece.text for piece in pieces if piece.side != "tokenizer") == ours
    assert "".join(piece.text for piece in pieces if piece.side != "xtuner") == theirs
    assert [piece.text for piece in pieces if piece.side == "xtuner"] == ["<|im_start|>", "there"]
