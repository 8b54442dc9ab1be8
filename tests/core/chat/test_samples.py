"""Answers as training samples: what becomes a row, and a new version of a data set that holds them and all that was there."""

import json
from pathlib import Path
from typing import Any

import pytest

from core.chat.comparison import Column, Comparison
from core.chat.conversation import Conversation, new_conversation
from core.chat.samples import answer_rows, answers_of, best_rows, conversation_row
from core.data.library import list_datasets, manifest
from core.data.mix import append, append_job
from core.errors import InputError
from core.project import Project, open_project
from core.runs.job import SilentProgress


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return open_project(tmp_path)


def talk() -> Conversation:
    conversation = new_conversation("be brief")
    for question, answer in (
        ("你是谁？", "<think>hm</think>我是小丹🔥"),
        ("And now?", "Now this."),
        ("Hm?", "<think>I"),
    ):
        conversation.ask(question)
        conversation.begin_answer("tuned").content = answer
    return conversation


def rows_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_a_conversation_is_one_row_up_to_its_last_whole_answer() -> None:
    row = conversation_row(talk())
    assert [message["role"] for message in row["messages"]] == ["system", *["user", "assistant"] * 2]
    assert row["messages"][2]["content"] == "我是小丹🔥", "thoughts are not taught"
    with pytest.raises(InputError, match="nothing_to_export"):
        conversation_row(new_conversation())


def test_a_chosen_answer_is_a_row_with_what_was_said_before() -> None:
    conversation = talk()
    assert answers_of(conversation) == [1, 3]
    first, second = answer_rows(conversation, [1, 3])
    assert [len(row["messages"]) for row in (first, second)] == [3, 5]
    assert second["messages"][-1] == {"role": "assistant", "content": "Now this."}


def test_the_best_answers_of_a_comparison_are_those_with_votes() -> None:
    comparison = Comparison(
        id="c", created_at="", questions=["q0", "q1", "q2"], system="s",
        columns=[Column(label="x", model="/x"), Column(label="y", model="/y")],
        answers={"0:1": {"text": "a1"}, "1:0": {"text": "b0"}, "2:0": {"text": "  "}}, votes={"0": 1, "2": 0},
    )  # fmt: skip
    [row] = best_rows(comparison)
    assert [message["content"] for message in row["messages"]] == ["s", "q0", "a1"]


def test_a_new_version_holds_the_old_rows_and_the_new_and_nothing_is_overwritten(project: Project) -> None:
    base = project.data / "own.json"
    base.write_text(json.dumps([{"instruction": "hi", "input": "", "output": "ho"}]), encoding="utf-8")
    before = base.read_bytes()
    row = conversation_row(talk())
    made, added = append(project, base, [row, row], "own_chat", source="a talk")
    assert (made.name, added) == ("own_chat.jsonl", 1)
    assert [len(each["messages"]) for each in rows_of(made)] == [2, 5]
    assert base.read_bytes() == before
    assert (manifest(project, made) or {})["made_by"] == "chat"
    again, _ = append(project, base, [row], "own_chat", source="a talk")
    assert again != made
    assert {each.name for each in list_datasets(project)} == {base.name, made.name, again.name}
    with pytest.raises(InputError, match="nothing_new"):
        append(project, made, [row], "more", source="a talk")


def test_a_new_data_set_and_one_with_loss_marks(project: Project) -> None:
    row = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    made, _ = append(project, None, [row], "fresh", source="a talk")
    assert rows_of(made) == [row]
    marked = project.data / "marked.jsonl"
    marks = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y", "loss": False}]
    marked.write_text(json.dumps({"messages": marks}) + "\n", encoding="utf-8")
    result = append_job(
        project=str(project.root),
        path=str(marked),
        added=[row],
        name="both",
        source="a talk",
        progress=SilentProgress(),
    )
    last = rows_of(Path(result["path"]))[-1]["messages"]
    assert all("loss" in message for message in last if message["role"] == "assistant")


@pytest.mark.parametrize("name", ["", "../out", ".hidden", "a/b"])
def test_a_name_that_is_none_is_refused(project: Project, name: str) -> None:
    with pytest.raises(InputError, match="bad_name"):
        append(project, None, [conversation_row(talk())], name, source="a talk")


def test_chats_do_not_go_into_plain_text(project: Project) -> None:
    texts = project.data / "texts.jsonl"
    texts.write_text('{"text": "a long story"}\n', encoding="utf-8")
    with pytest.raises(InputError, match="other_kinds"):
        append(project, texts, [conversation_row(talk())], "both", source="a talk")
