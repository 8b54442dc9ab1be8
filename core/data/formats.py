"""The shapes a row of a data set can have, how to tell them apart from a sample, and which XTuner map function reads each.

Knows single rows; knows no file. `core.data.reader` yields the rows, `core.data.rows` takes them apart.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final


class Format(StrEnum):
    """Shape of a row."""

    MESSAGES = "messages"
    """OpenAI: `{"messages": [{"role", "content"}, …]}`."""
    CONVERSATION = "conversation"
    """XTuner's own: `{"conversation": [{"system"?, "input", "output"}, …]}`."""
    ALPACA = "alpaca"
    """`{"instruction", "input", "output"}`."""
    SHAREGPT = "sharegpt"
    """`{"conversations": [{"from", "value"}, …]}`."""
    PAIR = "pair"
    """Two columns, a prompt and a response, whatever their names."""
    TEXT = "text"
    """`{"text"}`: pre-training."""
    UNKNOWN = "unknown"

    @property
    def is_chat(self) -> bool:
        return self not in (Format.TEXT, Format.UNKNOWN)


_MAP_FN: Final = {
    Format.MESSAGES: "openai_map_fn",
    Format.ALPACA: "alpaca_map_fn",
    Format.CONVERSATION: None,
    Format.TEXT: "pretrain_map_fn",
}
"""Formats that XTuner reads as they are. `conversation` rows are the only ones that work with None."""


def is_native(kind: Format) -> bool:
    """True if XTuner can read rows of this shape without conversion."""
    return kind in _MAP_FN


def dataset_map_fn_for(kind: Format) -> str | None:
    """Name in `xtuner.dataset.map_fns` of the function for this shape; None for XTuner's own rows (and for those that need conversion)."""
    return _MAP_FN.get(kind)


def has_template(kind: Format) -> bool:
    """True if `template_map_fn` applies: pre-training text is learned as it stands."""
    return kind is not Format.TEXT


@dataclass(frozen=True, slots=True)
class Columns:
    """Which column plays which part. A part without a column is None."""

    turns: str | None = None
    """The list of messages or turns."""
    prompt: str | None = None
    context: str | None = None
    """More of the prompt: alpaca's `input`."""
    response: str | None = None
    system: str | None = None
    history: str | None = None
    """Earlier rounds as `[[question, answer], …]`."""
    text: str | None = None

    def to_json(self) -> dict[str, str]:
        return {part: name for part in self.__slots__ if (name := getattr(self, part)) is not None}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Columns":
        return cls(**{part: str(value[part]) for part in cls.__slots__ if value.get(part) is not None})


CANONICAL: Final = {
    Format.MESSAGES: Columns(turns="messages"),
    Format.CONVERSATION: Columns(turns="conversation"),
    Format.SHAREGPT: Columns(turns="conversations"),
    Format.ALPACA: Columns(prompt="instruction", context="input", response="output"),
    Format.TEXT: Columns(text="text"),
}
_PAIRS: Final = (
    ("prompt", ("response", "completion", "answer", "output", "chosen")),
    ("question", ("answer", "response", "output")),
    ("query", ("response", "answer", "output")),
    ("instruction", ("response", "answer", "completion")),
    ("input", ("output", "response", "answer", "target")),
    ("user", ("assistant",)),
    ("source", ("target",)),
    ("problem", ("solution",)),
    ("问题", ("答案", "回答", "回复")),
    ("提问", ("回答", "答案", "回复")),
    ("输入", ("输出",)),
    ("指令", ("输出", "回答")),
)
_SYSTEMS: Final = ("system", "system_prompt", "系统", "系统提示")
_HISTORIES: Final = ("history", "历史")
_TEXTS: Final = ("text", "content", "正文", "文本")


@dataclass(frozen=True, slots=True)
class Detection:
    """What a sample of rows looks like."""

    format: Format
    confidence: float
    """Share of the sampled rows that have this shape, 0–1; less where the column names are a guess."""
    columns: Columns = field(default_factory=Columns)
    names: tuple[str, ...] = ()
    """All column names seen, for mapping by hand."""

    @property
    def is_sure(self) -> bool:
        return self.format is not Format.UNKNOWN and self.confidence >= 0.9

    @property
    def is_canonical(self) -> bool:
        """True if the columns are named as XTuner's map function expects."""
        standard = CANONICAL.get(self.format)
        return (
            standard is not None
            and all(getattr(self.columns, part) in (None, name) for part, name in standard.to_json().items())
            and not (self.format is Format.ALPACA and self.columns.history)
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "format": str(self.format),
            "confidence": self.confidence,
            "columns": self.columns.to_json(),
            "names": list(self.names),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Detection":
        return cls(
            Format(value["format"]),
            float(value["confidence"]),
            Columns.from_json(value["columns"]),
            tuple(value["names"]),
        )


def detect(rows: Sequence[Any]) -> Detection:
    """The shape most of `rows` have. UNKNOWN with confidence 0 if no row has a known one."""
    names = tuple(dict.fromkeys(str(name) for row in rows if isinstance(row, dict) for name in row))
    votes: Counter[tuple[Format, Columns, float]] = Counter(guess for row in rows if (guess := _guess(row)))
    if not votes:
        return Detection(Format.UNKNOWN, 0.0, Columns(), names)
    by_format: Counter[Format] = Counter()
    for (kind, _, _), count in votes.items():
        by_format[kind] += count
    best = by_format.most_common(1)[0][0]
    _, columns, trust = max(
        (guess for guess in votes if guess[0] is best), key=lambda guess: (len(guess[1].to_json()), votes[guess])
    )
    return Detection(best, round(trust * by_format[best] / len(rows), 3), columns, names)


def shape_of(row: Any) -> Format:
    """The shape of one row."""
    guess = _guess(row)
    return guess[0] if guess else Format.UNKNOWN


def _guess(row: Any) -> tuple[Format, Columns, float] | None:
    if not isinstance(row, dict):
        return None
    return _guess_turns(row) or _guess_columns(row)


def _guess_turns(row: dict[str, Any]) -> tuple[Format, Columns, float] | None:
    for name in sorted((name for name, value in row.items() if isinstance(value, list)), key=_turns_rank):
        turns = [turn for turn in row[name] if isinstance(turn, dict)]
        system = next((key for key in _SYSTEMS if isinstance(row.get(key), str)), None)
        for kind, keys in (
            (Format.MESSAGES, ("role",)),
            (Format.SHAREGPT, ("from", "value")),
            (Format.CONVERSATION, ("input", "output")),
        ):
            if turns and any(all(key in turn for key in keys) for turn in turns):
                return kind, Columns(turns=str(name), system=system), 1.0
        if name in ("messages", "conversation", "conversations"):
            kind = {"messages": Format.MESSAGES, "conversation": Format.CONVERSATION}.get(name, Format.SHAREGPT)
            return kind, Columns(turns=str(name), system=system), 0.9
    return next((_named_turns(name, kind) for name, kind in _TURNS if name in row and not _is_text(row[name])), None)


_TURNS: Final = (
    ("messages", Format.MESSAGES),
    ("conversation", Format.CONVERSATION),
    ("conversations", Format.SHAREGPT),
)


def _named_turns(name: str, kind: Format) -> tuple[Format, Columns, float]:
    return kind, Columns(turns=name), 0.9


def _turns_rank(name: str) -> int:
    order = ("messages", "conversation", "conversations")
    return order.index(name) if name in order else len(order)


def _guess_columns(row: dict[str, Any]) -> tuple[Format, Columns, float] | None:
    keys = {str(name).strip().lower(): str(name) for name in row}
    system = next((keys[name] for name in _SYSTEMS if name in keys), None)
    history = next((keys[name] for name in _HISTORIES if name in keys), None)
    if "instruction" in keys and "output" in keys:
        columns = Columns(
            prompt=keys["instruction"],
            context=keys.get("input"),
            response=keys["output"],
            system=system,
            history=history,
        )
        return Format.ALPACA, columns, 1.0
    for prompt, responses in _PAIRS:
        response = next((name for name in responses if name in keys), None)
        if prompt in keys and response is not None:
            columns = Columns(prompt=keys[prompt], response=keys[response], system=system, history=history)
            return Format.PAIR, columns, 1.0 if prompt in ("prompt", "question", "问题") else 0.95
    for name in _TEXTS:
        if name in keys and _is_text(row[keys[name]]):
            return Format.TEXT, Columns(text=keys[name]), 1.0 if name == "text" else 0.8
    texts = [name for name, value in row.items() if _is_text(value)]
    if len(row) == 1 and texts:
        return Format.TEXT, Columns(text=str(texts[0])), 0.5
    return None


def _is_text(value: Any) -> bool:
    return isinstance(value, str)
