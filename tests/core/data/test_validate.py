"""Validation: the corpus of bad files, and that nothing at all makes it fail."""

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from core.data.convert import convert
from core.data.findings import CODES, Report, Severity
from core.data.formats import CANONICAL, Format
from core.data.reader import sniff
from core.data.rows import is_plainly_good, parse_row
from core.data.validate import _is_plain_line, split_at_lines, validate
from core.errors import InputError
from core.project import open_project
from tests.core.data.corpus import CASES, Case, good, lines


def test_the_corpus_is_large_enough():
    assert len(CASES) >= 60
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_finds_what_is_wrong_and_where(tmp_path: Path, case: Case):
    path = tmp_path / case.file
    path.write_bytes(case.content)
    report = validate(path)
    found = {finding.code: finding.lines[0] for finding in report.findings}
    assert {code: found.get(code) for code in case.expected} == case.expected
    errors = {code for code in found if CODES[code][0] is Severity.ERROR}
    assert errors <= set(case.expected)
    assert Report.from_json(json.loads(json.dumps(report.to_json()))) == report


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_conversion_leaves_a_clean_file_and_the_original(tmp_path: Path, case: Case):
    project = open_project(tmp_path)
    source = project.data / case.file
    source.write_bytes(case.content)
    if case.rows_out is None:
        with pytest.raises(InputError, match=r"data\.(unknown_format|nothing_left)"):
            convert(project, source)
        assert [file.name for file in project.data.iterdir()] == [case.file]
        return
    result = convert(project, source)
    assert result.rows_out == case.rows_out
    assert source.read_bytes() == case.content
    assert result.path != source
    again = validate(result.path)
    assert [finding.code for finding in again.findings if finding.severity is Severity.ERROR] == []
    assert again.rows == result.rows_out


def test_clean_file_has_no_findings(tmp_path: Path):
    path = tmp_path / "good.jsonl"
    path.write_bytes(lines(*[good(number) for number in range(50)]))
    report = validate(path)
    assert (report.rows, report.good_rows, report.findings) == (50, 50, [])
    assert report.detection.format is Format.MESSAGES


def test_parts_give_the_same_report_as_one_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rows = [json.dumps(good(number % 700)) for number in range(1000)]
    rows[123] = "{broken"
    rows[877] = json.dumps({"messages": []})
    path = tmp_path / "large.jsonl"
    path.write_text("\n".join(rows))
    alone = validate(path, workers=1)
    monkeypatch.setattr("core.data.validate._PARALLEL_FROM_BYTES", 0)
    monkeypatch.setattr("core.data.validate.PART_BYTES", 20_000)
    assert len(list(split_at_lines(path, 20_000))) > 3
    together = validate(path, workers=2)
    assert (together.rows, together.good_rows, together.findings) == (alone.rows, alone.good_rows, alone.findings)
    assert {finding.code: finding.lines[0] for finding in together.findings} == {
        "broken_json": 124,
        "no_messages": 878,
        "duplicate_row": 701,
    }


def test_line_of_ten_megabytes(tmp_path: Path):
    path = tmp_path / "long.jsonl"
    path.write_bytes(
        lines(
            good(1),
            {"messages": [{"role": "user", "content": "x" * 10_000_000}, {"role": "assistant", "content": "y"}]},
        )
    )
    assert validate(path).good_rows == 2


def test_line_over_the_limit_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("core.data.reader.MAX_LINE_BYTES", 2**16)
    path = tmp_path / "long.jsonl"
    path.write_bytes(lines(good(1), "x" * 300_000, good(2)))
    report = validate(path)
    assert report.rows == 2
    assert [(finding.code, finding.lines) for finding in report.findings] == [("too_long", [2])]


def test_element_of_a_list_larger_than_a_block(tmp_path: Path):
    path = tmp_path / "large.json"
    big = {"messages": [{"role": "user", "content": "x" * 1_000_000}, {"role": "assistant", "content": "y"}]}
    path.write_text(json.dumps([good(1), big, good(2)], indent=1))
    assert validate(path).good_rows == 3


@pytest.mark.parametrize("head", [b"PK\x03\x04", b"\x1f\x8b\x08"])
def test_archives_are_refused(tmp_path: Path, head: bytes):
    path = tmp_path / "data.json"
    path.write_bytes(head + b"x" * 100)
    with pytest.raises(InputError, match=r"data\.archive"):
        sniff(path)


def test_missing_file_and_folder(tmp_path: Path):
    with pytest.raises(InputError, match=r"files\.missing"):
        validate(tmp_path / "nothing.json")
    with pytest.raises(InputError, match=r"data\.not_a_file"):
        validate(tmp_path)


_INNER = st.sampled_from(["role", "content", "from", "value", "input", "output", "loss", "x"])
_OUTER = st.sampled_from(
    [
        "messages",
        "conversation",
        "conversations",
        "instruction",
        "input",
        "output",
        "text",
        "history",
        "prompt",
        "response",
    ]
)
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_INNER, inner, max_size=3),
    max_leaves=12,
)
_ROWS = st.dictionaries(_OUTER, _JSON, max_size=4)
_CONTENTS = st.binary(max_size=300) | st.lists(_ROWS, max_size=4).map(lambda rows: json.dumps(rows).encode())
_SUFFIXES = st.sampled_from([".json", ".jsonl", ".csv", ".txt", ".parquet"])


@given(row=_ROWS | _JSON, kind=st.sampled_from([kind for kind in Format if kind is not Format.UNKNOWN]))
@settings(max_examples=300, deadline=None)
def test_no_row_crashes_the_parser(row: object, kind: Format):
    columns = CANONICAL.get(kind) or CANONICAL[Format.ALPACA]
    parsed = parse_row(row, kind, columns)
    assert all(code in CODES for code, _ in parsed.problems)
    if parsed.dropped_for is None and kind is not Format.TEXT:
        assert parsed.messages[-1]["role"] == "assistant"


@given(content=_CONTENTS, suffix=_SUFFIXES)
@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
def test_no_file_crashes_validation(tmp_path: Path, content: bytes, suffix: str):
    path = tmp_path / f"data{suffix}"
    path.write_bytes(content)
    try:
        report = validate(path)
    except InputError as error:
        if error.code != "data.archive":
            raise
        return
    json.dumps(report.to_json())
    assert report.good_rows <= report.rows


@given(text=st.text(alphabet='[]{},:"\\ \nabmesgrolcntu01', max_size=120))
@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
def test_streamed_lists_agree_with_json(tmp_path: Path, text: str):
    """What json.loads reads as a list of rows, the stream reads the same."""
    path = tmp_path / "data.json"
    path.write_text(f"[{text}]", encoding="utf-8")
    report = validate(path)
    try:
        value = json.loads(f"[{text}]")
    except ValueError:
        assert report.findings
    else:
        assert report.rows == len(value)


_PIECES = st.sampled_from(
    ["a", "你好", " ", "\n", '"', "\\", "<", ">", "<|im_end|>", "[INST]", "\x00", "\ufffd", "\ud800", "</s>", "/"]
)
_TURN_LISTS = st.lists(
    st.fixed_dictionaries(
        {
            "role": st.sampled_from(["system", "user", "assistant", "user", "assistant", "tool"]),
            "content": st.lists(_PIECES, max_size=4).map("".join),
        }
    ),
    max_size=5,
)


@given(turns=_TURN_LISTS, is_ascii=st.booleans())
@settings(max_examples=400, deadline=None)
def test_quick_look_never_overlooks_what_the_close_look_finds(turns: list[dict[str, str]], is_ascii: bool):
    """Rows that the check waves through have nothing that the parser would speak of."""
    text = json.dumps({"messages": turns}, ensure_ascii=is_ascii)
    raw = text.encode("utf-8", "surrogatepass")
    value = json.loads(text)
    if is_plainly_good(value) and _is_plain_line(raw, value):
        parsed = parse_row(value, Format.MESSAGES, CANONICAL[Format.MESSAGES])
        assert parsed.problems == []
        assert parsed.messages == turns
