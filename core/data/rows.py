"""One row taken apart: its messages in canonical form, mended where that is safe, and what was wrong with it.

The rules are those of XTuner 0.2.0's map functions (openai_map_fn, alpaca_map_fn, pretrain_map_fn) and of the JSON reader of `datasets`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from core.data.findings import CODES, Remedy, Severity
from core.data.formats import Columns, Format, shape_of

Problem = tuple[str, dict[str, Any]]
_ALIASES: Final = {
    "human": "user", "question": "user", "prompter": "user", "用户": "user",
    "gpt": "assistant", "bot": "assistant", "model": "assistant", "chatgpt": "assistant", "ai": "assistant", "助手": "assistant",
    "instruction": "system", "developer": "system", "系统": "system",
}  # fmt: skip
_TOOL_ROLES: Final = {"tool", "function", "function_call", "observation", "tool_call", "tool_response", "ipython"}
_ROLES: Final = {"system", "user", "assistant"}
_ODD_TEXT: Final = re.compile(
    "[\ud800-\udfff\x00\ufffd]|<\\|(?:im_start|im_end|endoftext|user|assistant|system|end|eot_id|start_header_id|User|Bot)\\|>"
    "|</?s>|\\[/?INST\\]|<eo[ah]>|<(?:start|end)_of_turn>"
)


@dataclass(slots=True)
class Parsed:
    """A row after reading."""

    messages: list[dict[str, Any]] = field(default_factory=list)
    """role, content and, where the row has it, loss. Empty for pre-training rows and for rows to drop."""
    text: str | None = None
    problems: list[Problem] = field(default_factory=list)

    @property
    def has_error(self) -> bool:
        return any(CODES[code][0] is Severity.ERROR for code, _ in self.problems)

    @property
    def dropped_for(self) -> Problem | None:
        """The first problem for which conversion leaves the row out."""
        return next((problem for problem in self.problems if CODES[problem[0]][1] is Remedy.DROP), None)

    def to_row(self) -> dict[str, Any]:
        """The row in the canonical format that Danlu writes."""
        return {"text": self.text} if self.text is not None else {"messages": self.messages}


class _Reject(Exception):
    """The row cannot be used."""

    def __init__(self, code: str, **params: Any) -> None:
        super().__init__(code)
        self.problem: Problem = (code, params)


def is_plainly_good(row: Any) -> bool:
    """A quick test for the usual clean `messages` row: system?, then user and assistant in turn, all with plain text.

    False says nothing: the row then needs the closer look of `parse_row`.
    """
    turns = row.get("messages") if type(row) is dict else None
    if type(turns) is not list or len(turns) < 2:
        return False
    expected = "user"
    for number, turn in enumerate(turns):
        if type(turn) is not dict or len(turn) != 2:
            return False
        role, content = turn.get("role"), turn.get("content")
        if type(content) is not str or not content or content.isspace():
            return False
        if "<" in content or "[" in content or "\ufffd" in content:  # Perhaps a template's mark, or damaged text.
            return False
        if role == expected:
            expected = "assistant" if role == "user" else "user"
        elif number or role != "system":
            return False
    return expected == "user"


def parse_row(row: Any, kind: Format, columns: Columns) -> Parsed:
    """Take `row` apart as `kind` with these columns. Never raises for whatever JSON value it is."""
    parsed = Parsed()
    try:
        if not isinstance(row, dict):
            raise _Reject("not_an_object")
        if kind is Format.TEXT:
            parsed.text = _read_text(row, columns, parsed.problems)
        else:
            raw = _READERS[kind](row, columns, parsed.problems) if kind in _READERS else []
            messages = [_clean_message(message, number, parsed.problems) for number, message in enumerate(raw, start=1)]
            parsed.messages = _order(messages, parsed.problems)
    except _Reject as reject:
        parsed.problems.append(reject.problem)
        parsed.messages, parsed.text = [], None
    return parsed


def _column(row: Mapping[str, Any], name: str | None, kind: Format) -> Any:
    if name is None or name not in row:
        other = shape_of(row)
        if other not in (kind, Format.UNKNOWN):
            raise _Reject("other_shape", found=str(other), expected=str(kind))
        raise _Reject("missing_key", key=name or "?")
    return row[name]


def _turns(row: Mapping[str, Any], columns: Columns, kind: Format) -> list[dict[str, Any]]:
    turns = _column(row, columns.turns, kind)
    if not isinstance(turns, list):
        raise _Reject("not_a_list", key=columns.turns, found=type(turns).__name__)
    if not turns:
        raise _Reject("no_messages", key=columns.turns)
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict):
            raise _Reject("not_a_message", number=number, found=type(turn).__name__)
    return turns


def _system_column(row: Mapping[str, Any], columns: Columns) -> list[dict[str, Any]]:
    system = row.get(columns.system) if columns.system else None
    return [{"role": "system", "content": system}] if isinstance(system, str) and system.strip() else []


def _read_messages(row: Mapping[str, Any], columns: Columns, problems: list[Problem]) -> list[dict[str, Any]]:
    del problems
    return _system_column(row, columns) + _turns(row, columns, Format.MESSAGES)


def _read_sharegpt(row: Mapping[str, Any], columns: Columns, problems: list[Problem]) -> list[dict[str, Any]]:
    del problems
    messages = _system_column(row, columns)
    for number, turn in enumerate(_turns(row, columns, Format.SHAREGPT), start=1):
        if "from" not in turn or "value" not in turn:
            raise _Reject("missing_key", key="from" if "from" not in turn else "value", number=number)
        role = turn["from"]
        name = role.strip().lower() if isinstance(role, str) else role
        known = _ALIASES.get(name, name) if isinstance(name, str) else name
        messages.append({"role": known, "content": turn["value"]} | ({"loss": turn["loss"]} if "loss" in turn else {}))
    return messages


def _read_conversation(row: Mapping[str, Any], columns: Columns, problems: list[Problem]) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    for number, turn in enumerate(_turns(row, columns, Format.CONVERSATION), start=1):
        for key in ("input", "output"):
            if key not in turn:
                raise _Reject("missing_key", key=key, number=number)
        if turn.get("system"):
            messages.append({"role": "system", "content": turn["system"]})
        question = turn["input"]
        if question is None:
            problems.append(("null_input", {"key": "input"}))
            question = ""
        messages.append({"role": "user", "content": question})
        loss = {"loss": turn["output_with_loss"]} if turn.get("output_with_loss") is not None else {}
        messages.append({"role": "assistant", "content": turn["output"]} | loss)
    return messages


def _read_columns(
    row: Mapping[str, Any], columns: Columns, problems: list[Problem], kind: Format
) -> list[dict[str, Any]]:
    prompt, response = _column(row, columns.prompt, kind), _column(row, columns.response, kind)
    messages = _system_column(row, columns)
    if messages and kind is Format.ALPACA:
        problems.append(("lost_system", {"key": columns.system}))
    messages += _history(row, columns, problems, kind)
    if response == "<nooutput>":
        raise _Reject("no_output")
    if kind is Format.ALPACA:
        context = row.get(columns.context) if columns.context else None
        if context is None:
            problems.append(("null_input", {"key": columns.context or "input"}))
        elif not isinstance(context, str):
            raise _Reject("content_object", key=columns.context, found=type(context).__name__)
        if isinstance(prompt, str) and context:
            prompt = f"{prompt}\n{context}" if prompt.strip() else context
    return [*messages, {"role": "user", "content": prompt}, {"role": "assistant", "content": response}]


def _history(row: Mapping[str, Any], columns: Columns, problems: list[Problem], kind: Format) -> list[dict[str, Any]]:
    history = row.get(columns.history) if columns.history else None
    if not history:
        return []
    if not isinstance(history, list) or not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in history):
        raise _Reject("not_a_list", key=columns.history, found=type(history).__name__)
    if kind is Format.ALPACA:
        problems.append(("lost_history", {"key": columns.history}))
    return [
        {"role": role, "content": text}
        for pair in history
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]


def _read_alpaca(row: Mapping[str, Any], columns: Columns, problems: list[Problem]) -> list[dict[str, Any]]:
    return _read_columns(row, columns, problems, Format.ALPACA)


def _read_pair(row: Mapping[str, Any], columns: Columns, problems: list[Problem]) -> list[dict[str, Any]]:
    return _read_columns(row, columns, problems, Format.PAIR)


_READERS: Final = {
    Format.MESSAGES: _read_messages,
    Format.SHAREGPT: _read_sharegpt,
    Format.CONVERSATION: _read_conversation,
    Format.ALPACA: _read_alpaca,
    Format.PAIR: _read_pair,
}


def _read_text(row: Mapping[str, Any], columns: Columns, problems: list[Problem]) -> str:
    text = _column(row, columns.text, Format.TEXT)
    if text is None:
        raise _Reject("null_content", number=1, role="text")
    if not isinstance(text, str):
        raise _Reject("content_object", key=columns.text, found=type(text).__name__)
    if not text.strip():
        raise _Reject("empty_text", key=columns.text)
    return _check_text(text, problems)


def _clean_message(message: Mapping[str, Any], number: int, problems: list[Problem]) -> dict[str, Any]:
    if "role" not in message:
        raise _Reject("missing_key", key="role", number=number)
    role = message["role"]
    if not isinstance(role, str):
        raise _Reject("unknown_role", role=str(role)[:40], number=number)
    if role in _TOOL_ROLES or message.get("tool_calls") or message.get("function_call"):
        raise _Reject("tool_role", role=role, number=number)
    if role not in _ROLES:
        plain = role.strip().lower()
        known = plain if plain in _ROLES else _ALIASES.get(plain)
        if known is None:
            raise _Reject("tool_role" if plain in _TOOL_ROLES else "unknown_role", role=role[:40], number=number)
        problems.append(("role_alias", {"role": role[:40], "known": known, "number": number}))
        role = known
    if "content" not in message:
        raise _Reject("missing_key", key="content", number=number)
    cleaned: dict[str, Any] = {"role": role, "content": _clean_content(message["content"], role, number, problems)}
    if "loss" in message and message["loss"] is not None:
        cleaned["loss"] = _clean_loss(message["loss"], number, problems)
    return cleaned


def _clean_content(content: Any, role: str, number: int, problems: list[Problem]) -> str:
    if content is None:
        raise _Reject("null_content", role=role, number=number)
    if isinstance(content, (bool, int, float)):
        problems.append(("content_number", {"role": role, "number": number, "found": str(content)[:40]}))
        content = str(content)
    elif isinstance(content, list):
        content = _join_parts(content, role, number)
        problems.append(("content_parts", {"role": role, "number": number}))
    elif not isinstance(content, str):
        raise _Reject("content_object", key="content", found=type(content).__name__)
    if not content.strip() and role == "assistant":
        raise _Reject("empty_answer", number=number)
    return _check_text(content, problems)


def _join_parts(parts: list[Any], role: str, number: int) -> str:
    texts: list[str] = []
    for part in parts:
        text = part if isinstance(part, str) else part.get("text") if isinstance(part, dict) else None
        if not isinstance(text, str):
            raise _Reject("media_content", role=role, number=number)
        texts.append(text)
    return "\n".join(texts)


def _clean_loss(loss: Any, number: int, problems: list[Problem]) -> bool:
    if isinstance(loss, bool):
        return loss
    problems.append(("loss_not_bool", {"number": number, "found": str(loss)[:40]}))
    return str(loss).strip().lower() in ("true", "1", "1.0", "yes")


def _check_text(text: str, problems: list[Problem]) -> str:
    """`text` without NUL characters. Notes characters and marks that do harm."""
    for found in {match.group() for match in _ODD_TEXT.finditer(text)}:
        if found == "\x00":
            problems.append(("null_byte", {}))
            text = text.replace("\x00", "")
        elif found == "\ufffd":
            problems.append(("damaged_text", {}))
        elif "\ud800" <= found <= "\udfff":
            raise _Reject("lone_surrogate")
        else:
            problems.append(("template_tokens", {"token": found}))
    return text


def _order(messages: list[dict[str, Any]], problems: list[Problem]) -> list[dict[str, Any]]:
    """The messages as XTuner will take them: system texts first, then question and answer in turn."""
    messages = _drop_leading_answers(messages, problems)
    ordered: list[dict[str, Any]] = []
    for number, message in enumerate(messages, start=1):
        role, content = message["role"], message["content"]
        before = ordered[-1]["role"] if ordered else None
        if role == "system" and not content.strip():
            problems.append(("empty_system", {"number": number}))
        elif role == before == "assistant" or (role == "assistant" and before in (None, "system")):
            raise _Reject("repeated_answer", number=number)
        elif role == before:
            problems.append((f"repeated_{'system' if role == 'system' else 'question'}", {"number": number}))
            ordered[-1] = {**ordered[-1], "content": f"{ordered[-1]['content']}\n{content}"}
        elif role == "system" and before == "user":
            problems.append(("late_system", {"number": number}))
            ordered.insert(-1, message)
        else:
            if role == "system" and before is not None:
                problems.append(("late_system", {"number": number}))
            if role == "user" and not content.strip():
                problems.append(("empty_question", {"number": number}))
            ordered.append(message)
    return _cut_tail(ordered, problems)


def _drop_leading_answers(messages: list[dict[str, Any]], problems: list[Problem]) -> list[dict[str, Any]]:
    start = 1 if messages and messages[0]["role"] == "system" else 0
    end = start
    while end < len(messages) and messages[end]["role"] == "assistant":
        end += 1
    if end > start:
        problems.append(("leading_answer", {"number": start + 1}))
    return messages[:start] + messages[end:]


def _cut_tail(messages: list[dict[str, Any]], problems: list[Problem]) -> list[dict[str, Any]]:
    last = max((at for at, message in enumerate(messages) if message["role"] == "assistant"), default=None)
    if last is None:
        raise _Reject("no_answer")
    if last + 1 < len(messages):
        problems.append(("trailing_question", {"number": last + 2}))
        messages = messages[: last + 1]
    if not any(message.get("loss", True) for message in messages if message["role"] == "assistant"):
        raise _Reject("nothing_learned")
    return messages
