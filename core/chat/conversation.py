"""Conversations kept in the project, one JSON file each: edit, regenerate, branch, delete.

Nothing is lost by editing: an edit begins a branch, and a new answer keeps the old ones beside it.
"""

import json
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Self

from core.errors import InputError
from core.files import read_json, write_json
from core.project import Project
from core.schema import upgraded

SCHEMA_VERSION: Final = 1
_TITLE_CHARACTERS: Final = 40
_THINK: Final = ("<think>", "</think>")


@dataclass(kw_only=True)
class Turn:
    """One message."""

    role: str
    """user or assistant"""
    content: str
    model: str = ""
    """Who answered."""
    finish_reason: str | None = None
    """stop, length, cancelled, error; None while it streams."""
    usage: dict[str, Any] = field(default_factory=dict)
    previous: list[dict[str, Any]] = field(default_factory=list)
    """Earlier answers to the same question, oldest first."""
    beside: dict[str, Any] | None = None
    """The base model's answer to the same question, when both were asked."""


@dataclass(kw_only=True)
class Conversation:
    """Turns in order, alternating from the user's first."""

    id: str
    created_at: str
    turns: list[Turn] = field(default_factory=list)
    system: str = ""
    title: str = ""
    branch_of: dict[str, Any] | None = None
    """`{"id", "turn"}` of the conversation this one left, and where."""
    schema_version: int = SCHEMA_VERSION

    def messages(self, end: int | None = None) -> list[dict[str, str]]:
        """What is sent to the model: the system text, then the turns before `end`. Thoughts of earlier answers stay out."""
        head = [{"role": "system", "content": self.system}] if self.system else []
        return head + [{"role": turn.role, "content": _spoken(turn)} for turn in self.turns[:end]]

    def ask(self, text: str) -> Turn:
        """Add a question."""
        turn = Turn(role="user", content=text)
        self.turns.append(turn)
        self.title = self.title or " ".join(text.split())[:_TITLE_CHARACTERS]
        return turn

    def begin_answer(self, model: str) -> Turn:
        """Add an empty answer to fill while it streams. After `regenerate` it holds the earlier answers."""
        turn = Turn(role="assistant", content="", model=model)
        if self.turns and self.turns[-1].role == "assistant":
            old = self.turns.pop()
            kept = asdict(old)
            earlier = kept.pop("previous")
            turn.previous = [*earlier, kept]
        self.turns.append(turn)
        return turn

    def branch(self, end: int) -> "Conversation":
        """A new conversation with copies of the turns before `end`."""
        copied = Conversation.from_json(self.to_json())
        fresh = new_conversation(self.system)
        fresh.turns, fresh.title = copied.turns[:end], self.title
        fresh.branch_of = {"id": self.id, "turn": end}
        return fresh

    def edit(self, index: int, text: str) -> "Conversation":
        """A branch in which the question at `index` says `text`. Raises InputError `chat.not_a_question`."""
        if not 0 <= index < len(self.turns) or self.turns[index].role != "user":
            raise InputError("chat.not_a_question", index=index)
        fresh = self.branch(index)
        fresh.title = "" if index == 0 else fresh.title
        fresh.ask(text)
        return fresh

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        known = {name: value[name] for name in cls.__dataclass_fields__ if name in value}
        fields = Turn.__dataclass_fields__
        known["turns"] = [
            Turn(**{name: turn[name] for name in fields if name in turn}) for turn in value.get("turns", [])
        ]
        return cls(**known)


def new_conversation(system: str = "") -> Conversation:
    """An empty conversation with an id that sorts by time."""
    now = datetime.now(UTC)
    return Conversation(id=f"{now:%Y%m%d_%H%M%S}_{secrets.token_hex(3)}", created_at=now.isoformat(), system=system)


def save_conversation(project: Project, conversation: Conversation) -> Path:
    """Write it to the project; one without turns is not written."""
    file = project.chat / f"{conversation.id}.json"
    if conversation.turns:
        write_json(file, conversation.to_json())
    return file


def load_conversation(project: Project, conversation_id: str) -> Conversation:
    """Raises InputError if there is none of that id or its file is broken (`chat.broken_conversation`)."""
    if Path(conversation_id).name != conversation_id:
        raise InputError("chat.no_conversation", id=conversation_id)
    file = project.chat / f"{conversation_id}.json"
    if not file.is_file():
        raise InputError("chat.no_conversation", id=conversation_id)
    try:
        return Conversation.from_json(upgraded(read_json(file), file, SCHEMA_VERSION, {0: dict}))
    except (TypeError, KeyError, AttributeError) as error:
        raise InputError("chat.broken_conversation", path=str(file), reason=str(error)) from error


def list_conversations(project: Project) -> list[tuple[str, str]]:
    """(id, title) of what is saved, newest first. A broken file is listed by its name; opening it says what is wrong."""
    found = []
    for file in sorted(project.chat.glob("*.json"), reverse=True):
        try:
            title = str(json.loads(file.read_text(encoding="utf-8")).get("title") or file.stem)
        except (OSError, ValueError, AttributeError):
            title = file.stem
        found.append((file.stem, title))
    return found


def delete_conversation(project: Project, conversation_id: str) -> None:
    """Move it to the project's trash."""
    file = project.chat / f"{Path(conversation_id).name}.json"
    if file.is_file():
        trash = project.private / "trash"
        trash.mkdir(parents=True, exist_ok=True)
        file.replace(trash / file.name)


def split_thinking(text: str) -> tuple[str, str, bool]:
    """(thoughts, answer, still thinking) of an answer that may begin with `<think>…</think>`."""
    opening, closing = _THINK
    body = text.lstrip()
    if not body.startswith(opening):
        return "", text, False
    thoughts, closed, answer = body[len(opening) :].partition(closing)
    return thoughts.strip(), answer.lstrip(), not closed


def _spoken(turn: Turn) -> str:
    return split_thinking(turn.content)[1] if turn.role == "assistant" else turn.content
