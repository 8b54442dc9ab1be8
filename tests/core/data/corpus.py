"""Bad (and odd) data files, each with what validation must find and where."""

import io
import json
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Case:
    name: str
    file: str
    content: bytes
    expected: dict[str, int]
    """Line of the first place by code; all codes that must be found, and no other error may be."""
    rows_out: int | None = None
    """Rows that conversion writes; None: it refuses the file."""


def lines(*values: Any) -> bytes:
    return "\n".join(
        value if isinstance(value, str) else json.dumps(value, ensure_ascii=False) for value in values
    ).encode()


def chat(*turns: tuple[str, Any], **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns], **more}


def good(number: int = 0) -> dict[str, Any]:
    return chat(("user", f"Question {number}?"), ("assistant", f"Answer {number}."))


def asked(escaped: str) -> str:
    """A row with this JSON text as its question."""
    return f'{{"messages": [{{"role": "user", "content": "{escaped}"}}, {{"role": "assistant", "content": "b"}}]}}'


U, A, S = ("user", "Hi"), ("assistant", "Hello"), ("system", "Be kind")


def row_case(name: str, bad: Any, expected: dict[str, int], kept: int = 0) -> Case:
    """`bad` on line 2 of three; `kept`: 1 if conversion mends and keeps it."""
    return Case(name, f"{name}.jsonl", lines(good(1), bad, good(2)), expected, 2 + kept)


def parquet_bytes() -> bytes:
    import pyarrow as pa
    from pyarrow import parquet

    sink = io.BytesIO()
    parquet.write_table(pa.table({"question": ["a", "b"], "answer": ["c", None]}), sink)
    return sink.getvalue()


def alpaca(**values: Any) -> dict[str, Any]:
    return {"instruction": "Add", "input": "1 and 2", "output": "3", **values}


def shared(*turns: tuple[str, Any]) -> dict[str, Any]:
    return {"conversations": [{"from": sender, "value": value} for sender, value in turns]}


def losing(loss: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y", "loss": loss}]}


def turn(**values: Any) -> dict[str, Any]:
    return {"conversation": [values]}


HUMAN, GPT = ("human", "Hi"), ("gpt", "Hello")
OK_ROW = json.dumps(good(1))


def repeating(members: str) -> str:
    """A good row with these members before it."""
    return f"{{{members}, {json.dumps(good(7))[1:]}"


CASES = [
    # the file itself
    Case("empty", "empty.jsonl", b"", {"empty_file": 1}),
    Case("empty_json", "empty.json", b"", {"empty_file": 1}),
    Case("only_spaces", "spaces.jsonl", b"  \n\n", {"no_rows": 1, "blank_line": 1}),
    Case("empty_list", "list.json", b"[]", {"no_rows": 1}),
    Case("empty_list_with_breaks", "list.json", b"[\n\n]\n", {"no_rows": 1}),
    Case("only_garbage", "garbage.jsonl", b"hello\nworld\n", {"broken_json": 1, "no_rows": 1}),
    Case("an_image", "photo.json", b"\x89PNG\r\n\x1a\n" + bytes(range(128, 256)), {"no_rows": 1, "not_utf8": 1, "broken_json": 2}),
    Case("bom", "bom.jsonl", b"\xef\xbb\xbf" + lines(good()), {"bom": 1}, 1),
    Case("bom_list", "bom.json", b"\xef\xbb\xbf[" + lines(good()) + b"]", {"bom": 1}, 1),
    Case("utf16", "wide.jsonl", lines(good(1), good(2)).decode().encode("utf-16"), {"encoding": 1}, 2),
    Case("utf16_list", "wide.json", ("[" + OK_ROW + "]").encode("utf-16"), {"encoding": 1}, 1),
    Case("gbk_csv", "gbk.csv", "问题,答案\n你好,您好\n".encode("gb18030"), {"encoding": 1}, 1),
    Case("gbk_jsonl", "gbk.jsonl", lines(chat(("user", "你好"), ("assistant", "您好"))).decode().encode("gb18030"), {"encoding": 1}, 1),
    Case("gbk_repeated_key", "gbk.jsonl", repeating('"x": "你好", "x": "你好"').encode("gb18030"), {"encoding": 1, "repeated_key": 1}, 1),
    Case("bad_bytes_in_one_line", "bytes.jsonl", lines(good(1)) + b'\n{"messages": "\xff\xfe"}\n' + lines(good(2)), {"not_utf8": 2}, 2),
    Case("bad_bytes_in_list", "bytes.json", b"[" + lines(good(1)) + b',\n"\xff\xfe"]', {"not_utf8": 2}, 1),
    Case("unknown_columns", "odd.jsonl", lines({"a": 1, "b": 2}), {"unknown_format": 1}),
    Case("scalars", "numbers.jsonl", b"1\n2\n", {"unknown_format": 1, "not_an_object": 1}),
    Case("list_of_strings", "strings.json", b'["a", "b"]', {"unknown_format": 1, "not_an_object": 1}),
    # JSON syntax
    Case("broken_line", "broken.jsonl", lines(good(1), '{"messages": [}', good(2)), {"broken_json": 2}, 2),
    Case("single_quotes", "quotes.jsonl", lines(good(1), "{'messages': []}", good(2)), {"broken_json": 2}, 2),
    Case("two_rows_on_a_line", "two.jsonl", lines(good(1), OK_ROW + OK_ROW, good(2)), {"broken_json": 2}, 2),
    Case("comma_after_each_row", "commas.jsonl", lines(good(1), OK_ROW + ",", good(2)), {"broken_json": 2}, 2),
    Case("python_literals", "python.jsonl", lines(good(1), '{"messages": None}', good(2)), {"broken_json": 2}, 2),
    Case("control_character", "control.jsonl", lines(good(1), '{"messages": "a\tb"}', good(2)), {"broken_json": 2}, 2),
    Case("huge_number", "number.jsonl", lines(good(1), '{"messages": ' + "9" * 5000 + "}", good(2)), {"broken_json": 2}, 2),
    Case("deep_nesting", "deep.jsonl", lines(good(1), "[" * 100_000, good(2)), {"too_deep": 2}, 2),
    Case("deep_list", "deep.json", b"[" + lines(good(1)) + b",\n" + b"[" * 100_000 + b"]", {"too_deep": 2}, 1),
    Case("repeated_key", "twice.jsonl", lines(good(1), '{"messages": [], ' + OK_ROW[1:], good(3)), {"repeated_key": 2}, 2),
    row_case("repeated_key_beside", repeating('"x": 1, "x": 2'), {"repeated_key": 2}, 1),
    row_case("repeated_key_inside", repeating('"x": {"y": 1, "y": 2}'), {"repeated_key": 2}, 1),
    row_case("repeated_role", OK_ROW.replace('"role"', '"role": "system", "role"', 1), {"repeated_key": 2}),
    row_case("repeated_key_escaped", repeating('"x": 1, "\\u0078": 2'), {"repeated_key": 2}, 1),
    row_case("repeated_word_is_no_key", chat(("user", 'Say "role": or "x"'), ("assistant", "role"), x=1), {}, 1),
    Case("blank_lines", "blank.jsonl", lines(good(1), "", "", good(2)), {"blank_line": 2}, 2),
    Case("list_breaks_off", "cut.json", b"[" + lines(good(1)) + b",\n" + lines(good(2))[:30], {"cut_off": 2}, 1),
    Case("list_never_closed", "open.json", b"[" + lines(good(1)) + b"\n", {"cut_off": 2}, 1),
    Case("list_trailing_comma", "comma.json", b"[" + lines(good(1)) + b",\n]", {"trailing_comma": 1}, 1),
    Case("list_missing_comma", "miss.json", b"[" + lines(good(1)) + b"\n" + lines(good(2)) + b"]", {"broken_json": 2}, 2),
    Case("list_broken_row", "mid.json", b"[" + lines(good(1)) + b',\n{"messages": [}]},\n' + lines(good(2)) + b"]", {"broken_json": 2}, 2),
    Case("list_with_more_after", "after.json", b"[" + lines(good(1)) + b"]\n{}", {"broken_json": 2}, 1),
    Case("wrapped", "wrapped.json", json.dumps({"data": [good(1), good(2)]}, indent=2).encode(), {"wrapped_rows": 1}, 2),
    # CSV and Parquet
    Case("csv_cells", "cells.csv", b"question,answer\na,b\nc\nd,e\n", {"cell_count": 3}, 2),
    Case("csv_quote", "quote.csv", b'question,answer\na,"b"x\nc,d\n', {"broken_csv": 2}, 1),
    Case("csv_columns_twice", "names.csv", b"question,question,answer\na,b,c\n", {"repeated_column": 1}, 1),
    Case("csv_empty_answer", "hole.csv", b"question,answer\na,\nc,d\n", {"empty_answer": 2}, 1),
    Case("csv_header_only", "header.csv", b"question,answer\n", {"no_rows": 1}),
    Case("parquet_broken", "broken.parquet", b"PAR1 and then nothing", {"broken_parquet": 1, "no_rows": 1}),
    Case("parquet_null", "null.parquet", parquet_bytes(), {"null_content": 2}, 1),
    # rows
    row_case("not_an_object", [1, 2], {"not_an_object": 2}),
    row_case("missing_messages", {"other": 1}, {"missing_key": 2}),
    row_case("messages_null", {"messages": None}, {"not_a_list": 2}),
    row_case("messages_text", {"messages": "hi"}, {"not_a_list": 2}),
    row_case("messages_empty", {"messages": []}, {"no_messages": 2}),
    row_case("message_text", {"messages": ["hi"]}, {"not_a_message": 2}),
    row_case("other_shape", alpaca(), {"other_shape": 2}),
    row_case("no_role", {"messages": [{"content": "x"}]}, {"missing_key": 2}),
    row_case("no_content", {"messages": [{"role": "user"}]}, {"missing_key": 2}),
    row_case("duplicate", good(1), {"duplicate_row": 2}),
    # roles
    row_case("role_unknown", chat(("narrator", "x"), A), {"unknown_role": 2}),
    row_case("role_null", chat((None, "x"), A), {"unknown_role": 2}),  # type: ignore[arg-type]
    row_case("role_human", chat(("human", "x"), A), {"role_alias": 2}, 1),
    row_case("role_upper", chat(("User", "x"), A), {"role_alias": 2}, 1),
    row_case("role_tool", chat(U, ("tool", "42"), A), {"tool_role": 2}),
    row_case("tool_calls", {"messages": [{"role": "assistant", "content": None, "tool_calls": [{}]}]}, {"tool_role": 2}),
    row_case("answer_first", chat(A, U, A), {"leading_answer": 2}, 1),
    row_case("question_last", chat(U, A, U), {"trailing_question": 2}, 1),
    row_case("only_question", chat(U), {"no_answer": 2}),
    row_case("only_system", chat(S), {"no_answer": 2}),
    row_case("only_answer", chat(A), {"no_answer": 2}),
    row_case("two_answers", chat(U, A, A), {"repeated_answer": 2}),
    row_case("two_questions", chat(U, ("user", "You?"), A), {"repeated_question": 2}, 1),
    row_case("two_systems", chat(S, S, U, A), {"repeated_system": 2}, 1),
    row_case("system_late", chat(U, A, S, U, A), {"late_system": 2}, 1),
    row_case("system_between", chat(U, S, A), {"late_system": 2}, 1),
    row_case("system_empty", chat(("system", " "), U, A), {"empty_system": 2}, 1),
    # content
    row_case("content_null", chat(U, ("assistant", None)), {"null_content": 2}),
    row_case("content_parts", chat(("user", [{"type": "text", "text": "Hi"}]), A), {"content_parts": 2}, 1),
    row_case("content_image", chat(("user", [{"type": "image_url", "image_url": "x"}]), A), {"media_content": 2}),
    row_case("content_number", chat(U, ("assistant", 42)), {"content_number": 2}, 1),
    row_case("content_object", chat(U, ("assistant", {"a": 1})), {"content_object": 2}),
    row_case("answer_empty", chat(U, ("assistant", " \n")), {"empty_answer": 2}),
    row_case("question_empty", chat(("user", ""), A), {"empty_question": 2}, 1),
    row_case("surrogate", chat(("user", "SURR"), A), {"no": 0}),
    row_case("nul", chat(("user", "a\x00b"), A), {"null_byte": 2}, 1),
    row_case("mojibake", chat(("user", "a\ufffdb"), A), {"damaged_text": 2}, 1),
    row_case("template_mark", chat(U, ("assistant", "Hi<|im_end|>")), {"template_tokens": 2}, 1),
    row_case("template_mark_in_brackets", chat(("user", "[INST] Hi [/INST]"), A), {"template_tokens": 2}, 1),
    row_case("mojibake_escaped", asked("\\ufffd"), {"damaged_text": 2}, 1),
    row_case("nul_after_a_backslash", asked("\\\\\\n\\u0000"), {"null_byte": 2}, 1),
    # loss
    row_case("loss_on_some", losing(True), {"mixed_loss": 1}, 1),
    row_case("loss_text", losing("true"), {"loss_not_bool": 2}, 1),
    row_case("loss_all_false", losing(False), {"nothing_learned": 2}),
    # other formats
    Case("alpaca_null_input", "a.jsonl", lines(alpaca(), alpaca(input=None, output="4")), {"null_input": 2}, 2),
    Case("alpaca_no_input", "a.jsonl", lines(alpaca(), {"instruction": "Say hi", "output": "hi"}), {"null_input": 2}, 2),
    Case("alpaca_no_output", "a.jsonl", lines(alpaca(), {"instruction": "x", "input": ""}), {"missing_key": 2}, 1),
    Case("alpaca_nooutput", "a.jsonl", lines(alpaca(), alpaca(output="<nooutput>")), {"no_output": 2}, 1),
    Case("alpaca_history", "a.jsonl", lines(alpaca(), alpaca(history=[["a", "b"]])), {"lost_history": 2}, 2),
    Case("alpaca_system", "a.jsonl", lines(alpaca(), alpaca(system="Be kind")), {"lost_system": 2}, 2),
    Case("alpaca_list_output", "a.jsonl", lines(alpaca(), alpaca(output=["a", 1])), {"media_content": 2}, 1),
    Case("sharegpt_no_value", "s.jsonl", lines(shared(HUMAN, GPT), {"conversations": [{"from": "human"}]}), {"missing_key": 2}, 1),
    Case("sharegpt_odd_sender", "s.jsonl", lines(shared(HUMAN, GPT), shared(("crowd", "x"), GPT)), {"unknown_role": 2}, 1),
    Case("sharegpt_tools", "s.jsonl", lines(shared(HUMAN, GPT), shared(HUMAN, ("function_call", "x"), GPT)), {"tool_role": 2}, 1),
    Case("conversation_no_output", "c.jsonl", lines(turn(input="a", output="b"), turn(input="a")), {"missing_key": 2}, 1),
    Case("conversation_null_output", "c.jsonl", lines(turn(input="a", output="b"), turn(input="a", output=None)), {"null_content": 2}, 1),
    Case("text_empty", "t.jsonl", lines({"text": "a"}, {"text": "  "}), {"empty_text": 2}, 1),
    Case("text_null", "t.jsonl", lines({"text": "a"}, {"text": None}), {"null_content": 2}, 1),
    Case("text_number", "t.jsonl", lines({"text": "a"}, {"text": 5}), {"content_object": 2}, 1),
]  # fmt: skip

_SURROGATE = next(case for case in CASES if case.name == "surrogate")
CASES[CASES.index(_SURROGATE)] = Case(
    "surrogate", "surrogate.jsonl", _SURROGATE.content.replace(b"SURR", b"\\ud800"), {"lone_surrogate": 2}, 2
)
