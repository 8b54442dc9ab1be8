"""Conversations on disk: nothing is lost by editing, and a saved one comes back as it was."""

from pathlib import Path

import pytest

from core.chat.conversation import (
    Conversation,
    delete_conversation,
    list_conversations,
    load_conversation,
    new_conversation,
    save_conversation,
    split_thinking,
)
from core.errors import InputError
from core.project import Project, open_project


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return open_project(tmp_path)


def talk(system: str = "") -> Conversation:
    conversation = new_conversation(system)
    for question, answer in (("你是谁？", "我是小丹🔥"), ("And now?", "Now this.")):
        conversation.ask(question)
        turn = conversation.begin_answer("tuned")
        turn.content, turn.finish_reason = answer, "stop"
    return conversation


def test_it_comes_back_as_it_was_saved(project: Project) -> None:
    conversation = talk("be brief")
    save_conversation(project, conversation)
    assert load_conversation(project, conversation.id) == conversation
    assert list_conversations(project) == [(conversation.id, "你是谁？")]


def test_an_empty_one_leaves_no_file(project: Project) -> None:
    save_conversation(project, new_conversation())
    assert list_conversations(project) == []


def test_an_edit_begins_a_branch_and_leaves_the_original(project: Project) -> None:
    conversation = talk()
    before = conversation.to_json()
    branch = conversation.edit(2, "Really?")
    assert conversation.to_json() == before
    assert [turn.content for turn in branch.turns] == ["你是谁？", "我是小丹🔥", "Really?"]
    assert branch.branch_of == {"id": conversation.id, "turn": 2}
    branch.turns[0].content = "changed"
    assert conversation.turns[0].content == "你是谁？"
    with pytest.raises(InputError, match="not_a_question"):
        conversation.edit(1, "an answer")


def test_a_new_answer_keeps_the_old_ones() -> None:
    conversation = talk()
    for text in ("second", "third"):
        turn = conversation.begin_answer("tuned")
        turn.content = text
    assert len(conversation.turns) == 4
    assert [old["content"] for old in conversation.turns[-1].previous] == ["Now this.", "second"]


def test_thoughts_are_told_apart_and_not_sent_again() -> None:
    assert split_thinking("<think>hm\n</think>\n\nYes") == ("hm", "Yes", False)
    assert split_thinking("<think>hm") == ("hm", "", True)
    assert split_thinking("a <think> b") == ("", "a <think> b", False)
    conversation = new_conversation()
    conversation.ask("q")
    conversation.begin_answer("m").content = "<think>secret</think>Yes"
    assert conversation.messages()[-1]["content"] == "Yes"


def test_deleted_goes_to_the_trash(project: Project) -> None:
    conversation = talk()
    file = save_conversation(project, conversation)
    delete_conversation(project, conversation.id)
    assert not file.exists()
    assert (project.private / "trash" / file.name).exists()


@pytest.mark.parametrize("name", ["../project", "missing"])
def test_an_id_that_is_none_is_refused(project: Project, name: str) -> None:
    with pytest.raises(InputError, match="no_conversation"):
        load_conversation(project, name)


def test_a_broken_file_is_listed_and_explained(project: Project) -> None:
    (project.chat).mkdir(parents=True, exist_ok=True)
    (project.chat / "bad.json").write_text("{", encoding="utf-8")
    assert list_conversations(project) == [("bad", "bad")]
    with pytest.raises(InputError, match="broken_json"):
        load_conversation(project, "bad")
