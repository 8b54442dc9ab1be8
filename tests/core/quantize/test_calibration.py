"""Rows for the quantiser: token for token what training sees, the same each time, and none of those kept back."""

import json
from pathlib import Path
from typing import Any

import pytest

from core.data.generate import Assistant, write_assistant
from core.data.library import describe
from core.data.preview import training_segments, training_tokens_of
from core.data.tokenizer import load_tokenizer
from core.errors import InputError
from core.project import Project, open_project
from core.quantize.calibration import HELD_OUT, Calibration, collect
from core.runs.job import SilentProgress
from core.xtuner.templates import prompt_templates
from tests.models import write_tiny_llama

TEMPLATE = "internlm2_chat"


@pytest.fixture
def project(tmp_path: Path) -> Project:
    made = open_project(tmp_path)
    write_tiny_llama(made.final_model / "iter_4", dtype="bfloat16")
    write_assistant(made, Assistant(name="Danlu", author="Ada", rows=120, language="en"))
    return made


def gather(
    project: Project, data: str = "personal_assistant.json", template: Any = TEMPLATE, **options: Any
) -> Calibration:
    described = {"prompt_template": prompt_templates()[template].to_json()} if template else {}
    choices = {"rows": 32, "max_length": 256, **options}
    model = project.final_model / "iter_4"
    return collect(project, project.data / data, model, described, progress=SilentProgress(), **choices)


def test_rows_are_those_of_the_training_with_its_template(project: Project) -> None:
    made = gather(project)
    file = project.data / "personal_assistant.json"
    tokenizer = load_tokenizer(project, project.final_model / "iter_4")
    detection = describe(project, file).detection
    expected = set()
    for row in json.loads(file.read_text()):
        segments = training_segments(row, detection.format, detection.columns, prompt_templates()[TEMPLATE], tokenizer)
        expected.add(tuple(token.id for token in training_tokens_of(segments, tokenizer, 256))[:256])
    assert {tuple(row) for row in made.rows} <= expected
    assert (len(made.rows), made.template) == (32, TEMPLATE)
    assert made.tokens == sum(map(len, made.rows))
    assert gather(project) == made


def test_rows_kept_back_are_not_among_the_others_nor_twice(project: Project) -> None:
    made = gather(project)
    kept = {tuple(row) for row in made.held_out}
    assert 0 < len(kept) == len(made.held_out) <= HELD_OUT
    assert not kept & {tuple(row) for row in made.rows}


def test_rows_are_cut_and_packed_without_losing_a_token(project: Project) -> None:
    made = gather(project, max_length=48)
    assert max(map(len, made.rows)) == 48
    packed = made.packed()
    assert [number for part in packed for number in part] == [number for row in made.rows for number in row]
    assert {len(part) for part in packed[:-1]} == {48}


def test_without_a_recorded_template_the_one_that_fits_the_model_is_taken(project: Project) -> None:
    assert gather(project, template=None).template == "qwen_chat"
    settings = project.final_model / "iter_4" / "tokenizer_config.json"
    value = json.loads(settings.read_text())
    settings.write_text(json.dumps({**value, "chat_template": "{{ messages }}"}))
    with pytest.raises(InputError) as caught:
        gather(project, template=None)
    assert caught.value.code == "quantize.no_template"


def test_plain_text_needs_no_template(project: Project) -> None:
    text = [
        json.dumps({"text": f"{number}. The quick brown fox jumps over the lazy dog. " * 3}) for number in range(60)
    ]
    (project.data / "text.jsonl").write_text("\n".join(text))
    made = gather(project, "text.jsonl", template=None)
    assert (len(made.rows), made.template) == (32, None)


def test_too_little_is_said_with_what_was_found(project: Project) -> None:
    rows = json.loads((project.data / "personal_assistant.json").read_text())
    (project.data / "few.json").write_text(json.dumps([*rows[:5], {"messages": "broken"}]))
    with pytest.raises(InputError) as caught:
        gather(project, "few.json")
    assert (caught.value.code, caught.value.params["rows"]) == ("quantize.too_little", 5)
    with pytest.raises(InputError) as caught:
        gather(project, rows=32, max_length=8)
    assert (caught.value.params["rows"], caught.value.params["tokens"]) == (32, 256)
