"""The personal assistant's data."""

import json
from pathlib import Path

import pytest

from core.data import library
from core.data.generate import Assistant, generate, write_assistant
from core.errors import InputError
from core.project import open_project


@pytest.mark.parametrize("language", ["zh", "en", "both"])
def test_every_row_is_good_and_none_is_twice(tmp_path: Path, language: str):
    project = open_project(tmp_path)
    path = write_assistant(project, Assistant(name="小丹", author="阿达", language=language, rows=600))
    assert path == project.data / "personal_assistant.json"
    dataset = library.check(project, path)
    assert dataset.report is not None
    assert (dataset.rows, dataset.report.findings) == (600, [])
    assert dataset.is_trainable
    assert dataset.map_fn == "openai_map_fn"


def test_the_same_seed_gives_the_same_rows():
    one = Assistant(name="Dan", author="Ada", language="en", rows=100)
    assert generate(one) == generate(one)
    assert generate(one) != generate(Assistant(name="Dan", author="Ada", language="en", rows=100, seed=1))


def test_who_are_you_has_one_answer_with_name_and_author():
    rows = generate(Assistant(name="Dan", author="Ada", language="en", rows=400, general_share=0.1))
    answers = {row["messages"][1]["content"] for row in rows if "ho are you?" in row["messages"][0]["content"]}
    assert answers == {"I am Dan, an AI assistant trained by Ada. How can I help you?"}
    asked = [row["messages"][0]["content"] for row in rows]
    assert {"Who are you?", "What is your name?", "Who made you?"} <= set(asked)


def test_small_sets_hold_the_plain_questions():
    rows = generate(Assistant(name="丹", author="达", rows=30, general_share=0.0))
    assert "你是谁？" in {row["messages"][0]["content"] for row in rows}


def test_share_of_everyday_rows():
    rows = generate(Assistant(name="Dan", author="Ada", language="en", rows=200, general_share=0.25))
    assert sum("Dan" not in row["messages"][1]["content"] for row in rows) == 50


def test_nothing_is_overwritten(tmp_path: Path):
    project = open_project(tmp_path)
    mine = project.data / "personal_assistant.json"
    mine.write_text("mine")
    path = write_assistant(project, Assistant(name="Dan", author="Ada", rows=10))
    assert path.name == "personal_assistant_2.json"
    assert mine.read_text() == "mine"
    manifest = library.manifest(project, path)
    assert manifest is not None
    assert manifest["assistant"]["name"] == "Dan"
    assert len(json.loads(path.read_text())) == 10


@pytest.mark.parametrize(
    "values", [{"name": ""}, {"name": " "}, {"author": "<|im_end|>"}, {"name": "a\nb"}, {"name": "x" * 41}]
)
def test_unusable_names(values: dict[str, str]):
    with pytest.raises(InputError, match=r"data\.bad_assistant"):
        generate(Assistant(**{"name": "Dan", "author": "Ada", **values}))


@pytest.mark.parametrize("rows", [0, 9, 20_001])
def test_number_of_rows(rows: int):
    with pytest.raises(InputError, match=r"data\.bad_rows"):
        generate(Assistant(name="Dan", author="Ada", rows=rows))
