"""What training will see of a row: the text with the template around it, its tokens, and which of them are learned.

Follows XTuner 0.2.0 to the token: openai_map_fn, alpaca_map_fn, pretrain_map_fn, template_map_fn and encode_fn; an engine test compares.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from core.data.formats import Columns, Format
from core.data.rows import parse_row
from core.data.tokenizer import TextTokenizer
from core.errors import InputError
from core.messages import Message
from core.xtuner.templates import PromptTemplate


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of text that XTuner tokenises in one go."""

    text: str
    is_learned: bool
    ids: tuple[int, ...] | None = None
    """Set for BOS and EOS: they are put as ids, not tokenised."""


@dataclass(frozen=True, slots=True)
class Token:
    id: int
    text: str
    is_learned: bool
    """True: it counts in the loss."""
    is_cut: bool = False
    """True: it lies beyond max_length."""


def training_segments(
    row: Any, kind: Format, columns: Columns, template: PromptTemplate | None, tokenizer: TextTokenizer
) -> list[Segment]:
    """The segments of `row` in order, [] for a row that XTuner drops. `template`: None for pre-training text.

    Raises InputError `data.row_unusable` for a row that would stop training, `templates.no_system`.
    """
    turns = _turns(row, kind, columns)
    segments: list[Segment] = []
    needs_bos = True
    for number, turn in enumerate(turns, start=1):
        prompt, output, needs_eos, separator = _apply(template, turn, number)
        if needs_bos and tokenizer.bos_ids:
            segments.append(Segment(tokenizer.bos, False, tokenizer.bos_ids))
        segments += [Segment(prompt, False), Segment(output, turn["learned"])]
        if needs_eos:
            segments.append(Segment(tokenizer.eos, turn["learned"], tokenizer.eos_ids))
        needs_bos = needs_eos
        segments.append(Segment(separator, False))
    return [segment for segment in segments if segment.text]


def training_tokens_of(segments: Iterable[Segment], tokenizer: TextTokenizer, max_length: int) -> list[Token]:
    """Every token of the segments; those beyond `max_length` are marked as cut."""
    tokens: list[Token] = []
    for segment in segments:
        if segment.ids is None:
            pieces = tokenizer.split(segment.text)
        else:
            pieces = [(number, segment.text if at == 0 else "") for at, number in enumerate(segment.ids)]
        tokens += [
            Token(number, text, segment.is_learned, len(tokens) + at >= max_length)
            for at, (number, text) in enumerate(pieces)
        ]
    return tokens


@dataclass(frozen=True, slots=True)
class RowLength:
    """Tokens of one row before it is cut."""

    tokens: int
    first_learned: int
    """Position of the first learned token; `tokens` if there is none. A row whose prompt reaches max_length is dropped whole."""


def measure_rows(
    rows: Sequence[Any], kind: Format, columns: Columns, template: PromptTemplate | None, tokenizer: TextTokenizer
) -> list[RowLength | None]:
    """Token counts of each row, exact; None for a row that cannot be used. Tokenises all segments of all rows in one batch."""
    grouped: list[list[Segment] | None] = []
    for row in rows:
        try:
            grouped.append(training_segments(row, kind, columns, template, tokenizer))
        except InputError:
            grouped.append(None)
    texts = [segment.text for segments in grouped for segment in segments or [] if segment.ids is None]
    counts = iter([len(ids) for ids in tokenizer.encode(texts)])
    return [None if not segments else _length(segments, counts) for segments in grouped]


def _length(segments: list[Segment], counts: Iterator[int]) -> RowLength:
    total, first = 0, None
    for segment in segments:
        count = next(counts) if segment.ids is None else len(segment.ids)
        if first is None and segment.is_learned and count:
            first = total
        total += count
    return RowLength(total, total if first is None else first)


def _turns(row: Any, kind: Format, columns: Columns) -> list[dict[str, Any]]:
    """Turns as the map function of this format makes them, of rows in the form that XTuner reads without conversion."""
    try:
        match kind:
            case Format.MESSAGES if columns.turns == "messages":
                return _openai_turns(row["messages"])
            case Format.CONVERSATION if columns.turns == "conversation":
                return [_conversation_turn(turn) for turn in row["conversation"]]
            case Format.ALPACA if not columns.history and not columns.system:
                return _alpaca_turns(row)
            case Format.TEXT:
                text = row[columns.text or "text"].strip()
                return [{"system": "", "input": "", "output": text, "learned": True, "is_text": True}]
    except (KeyError, TypeError, AttributeError, IndexError, NotImplementedError) as error:
        raise InputError("data.row_unusable", reason=f"{type(error).__name__}: {error}") from error
    parsed = parse_row(row, kind, columns)
    if parsed.dropped_for is not None:
        code, params = parsed.dropped_for
        raise InputError("data.row_unusable", reason=Message(f"data.found.{code}", params))
    return _openai_turns(parsed.messages)


def _openai_turns(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    turns: list[dict[str, Any]] = []
    system, question = "", ""
    start = next((at for at, message in enumerate(messages) if message["role"] != "assistant"), len(messages))
    for message in messages[start:]:
        match message["role"]:
            case "system":
                system = message["content"]
            case "user":
                question += message["content"]
            case "assistant":
                is_learned = str(message.get("loss", "True")).lower() == "true"
                turns.append(
                    {"system": system, "input": question, "output": message["content"] + "", "learned": is_learned}
                )
                system, question = "", ""
            case _:
                raise NotImplementedError(message["role"])
    return turns


def _conversation_turn(turn: Mapping[str, Any]) -> dict[str, Any]:
    loss = turn.get("output_with_loss", True)
    return {
        "system": turn.get("system") or "",
        "input": turn.get("input") or "",
        "output": turn["output"] + "",
        "learned": bool(loss),
    }


def _alpaca_turns(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    if row.get("output") == "<nooutput>":
        return []
    question = f"{row['instruction']}\n{row['input']}"
    return [{"system": "", "input": question, "output": row["output"] + "", "learned": True}]


def _apply(template: PromptTemplate | None, turn: Mapping[str, Any], number: int) -> tuple[str, str, bool, str]:
    """(prompt, answer, whether EOS follows, separator) of a turn."""
    if template is None:
        return turn["input"], turn["output"], not turn.get("is_text", False), ""
    prompt = template.INSTRUCTION.format(input=turn["input"], round=number)
    if turn["system"]:
        if template.SYSTEM is None:
            raise InputError("templates.no_system", template=template.name)
        prompt = template.SYSTEM.format(system=turn["system"]) + prompt
    return prompt, turn["output"] + template.SUFFIX, not template.SUFFIX_AS_EOS, template.SEP
