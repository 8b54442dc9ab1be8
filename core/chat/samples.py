"""From chats to training samples: which answers become rows, and what a row says. Knows conversations and comparisons, no files."""

from collections.abc import Sequence
from typing import Any

from core.chat.comparison import Comparison
from core.chat.conversation import Conversation, split_thinking
from core.errors import InputError

Row = dict[str, Any]


def conversation_row(conversation: Conversation) -> Row:
    """The whole conversation as one row `{"messages": […]}`, up to its last answer. Raises InputError `chat.nothing_to_export`."""
    turns = conversation.turns
    end = next((at + 1 for at in reversed(range(len(turns))) if _is_answer(conversation, at)), 0)
    if not end:
        raise InputError("chat.nothing_to_export")
    return {"messages": conversation.messages(end)}


def answers_of(conversation: Conversation) -> list[int]:
    """Places of the turns that are answers with words in them."""
    return [at for at in range(len(conversation.turns)) if _is_answer(conversation, at)]


def answer_rows(conversation: Conversation, answers: Sequence[int]) -> list[Row]:
    """A row for each of the turns `answers`: the answer, and what was said before it."""
    return [{"messages": conversation.messages(at + 1)} for at in answers]


def best_rows(comparison: Comparison) -> list[Row]:
    """A row for each question with a vote: the question and the answer that was voted best."""
    head = [{"role": "system", "content": comparison.system}] if comparison.system else []
    rows = []
    for number, question in enumerate(comparison.questions):
        column = comparison.votes.get(str(number))
        answer = comparison.answer(number, column) if column is not None else None
        spoken = split_thinking(str(answer["text"]))[1].strip() if answer else ""
        if spoken:
            asked = {"role": "user", "content": question}
            rows.append({"messages": [*head, asked, {"role": "assistant", "content": spoken}]})
    return rows


def _is_answer(conversation: Conversation, at: int) -> bool:
    turn = conversation.turns[at]
    return turn.role == "assistant" and bool(split_thinking(turn.content)[1].strip())
