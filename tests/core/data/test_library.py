"""Listing, browsing, adding, converting, splitting and editing data sets."""

import io
import json
from pathlib import Path

import pytest

from core.data import library
from core.data.convert import convert, convert_job, dropped_path, manifest_path
from core.data.formats import Columns, Detection, Format, detect, shape_of
from core.data.split import replace_row, split_dataset
from core.data.statistics import load_lengths, measure
from core.data.validate import file_sha256
from core.errors import InputError
from core.i18n import catalog
from core.project import Project, open_project
from core.runs.job import SilentProgress
from core.xtuner.templates import prompt_templates
from tests.core.data.corpus import good, lines
from tests.models import write_tokenizer


@pytest.fixture
def project(tmp_path: Path) -> Project:
    root = tmp_path / "ft"
    root.mkdir()
    return open_project(root)


@pytest.mark.parametrize(
    ("row", "kind", "columns"),
    [
        ({"messages": [{"role": "user", "content": "x"}]}, Format.MESSAGES, Columns(turns="messages")),
        ({"dialog": [{"role": "user", "content": "x"}]}, Format.MESSAGES, Columns(turns="dialog")),
        ({"conversations": [{"from": "human", "value": "x"}]}, Format.SHAREGPT, Columns(turns="conversations")),
        ({"conversations": [{"role": "user", "content": "x"}]}, Format.MESSAGES, Columns(turns="conversations")),
        ({"conversation": [{"input": "a", "output": "b"}]}, Format.CONVERSATION, Columns(turns="conversation")),
        (
            {"instruction": "a", "input": "", "output": "b"},
            Format.ALPACA,
            Columns(prompt="instruction", context="input", response="output"),
        ),
        ({"Question": "a", "Answer": "b"}, Format.PAIR, Columns(prompt="Question", response="Answer")),
        ({"问题": "a", "答案": "b"}, Format.PAIR, Columns(prompt="问题", response="答案")),
        ({"prompt": "a", "completion": "b"}, Format.PAIR, Columns(prompt="prompt", response="completion")),
        ({"text": "a"}, Format.TEXT, Columns(text="text")),
        ({"a": 1}, Format.UNKNOWN, Columns()),
    ],
)
def test_formats(row: dict, kind: Format, columns: Columns):
    found = detect([row])
    assert (found.format, found.columns) == (kind, columns)
    assert shape_of(row) is kind


def test_an_unsure_format_says_so():
    found = detect([{"messages": [{"role": "user"}]}] * 6 + [{"x": 1}] * 4)
    assert found.format is Format.MESSAGES
    assert found.confidence == pytest.approx(0.6)
    assert not found.is_sure


def test_columns_by_hand(project: Project):
    path = project.data / "odd.csv"
    path.write_text("frage,antwort\nwas?,das.\n")
    assert library.describe(project, path).format is Format.UNKNOWN
    by_hand = Detection(Format.PAIR, 1.0, Columns(prompt="frage", response="antwort"), ("frage", "antwort"))
    dataset = library.check(project, path, by_hand)
    assert dataset.rows == 1
    assert not dataset.is_trainable
    result = convert(project, path, detection=by_hand)
    assert json.loads(result.path.read_text())["messages"][1]["content"] == "das."
    assert library.check(project, result.path).is_trainable


def test_report_is_kept_until_the_file_changes(project: Project):
    path = project.data / "rows.jsonl"
    path.write_bytes(lines(good(1), good(2)))
    assert library.describe(project, path).rows is None
    library.check(project, path)
    [dataset] = library.list_datasets(project)
    assert (dataset.rows, dataset.sha256, dataset.is_trainable) == (2, file_sha256(path), True)
    path.write_bytes(lines(good(1), good(2), good(3)))
    assert library.describe(project, path).rows is None


def test_list_shows_what_cannot_be_read(project: Project):
    (project.data / "archive.json").write_bytes(b"PK\x03\x04")
    (project.data / ".hidden.json").write_text("[]")
    (project.data / "notes.docx").write_text("x")
    [dataset] = library.list_datasets(project)
    assert dataset.problem is not None
    assert not dataset.is_trainable


def test_linked_folder_that_leads_out_is_not_listed(project: Project, tmp_path: Path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.json").write_text("[]")
    (project.data / "link").symlink_to(outside)
    assert library.list_datasets(project) == []


def test_browse_and_search(project: Project):
    path = project.data / "rows.jsonl"
    path.write_bytes(lines(*[good(number) for number in range(30)]))
    page = library.browse(path, offset=10, count=5)
    assert [row.line for row in page.rows] == [11, 12, 13, 14, 15]
    assert page.has_more
    found = library.browse(path, query="QUESTION 2?")
    assert [row.line for row in found.rows] == [3]
    assert not found.has_more


@pytest.mark.parametrize("name", ["../../evil.json", "a\\..\\..\\evil.json", "/etc/evil.json"])
def test_upload_stays_in_the_data_folder(project: Project, name: str):
    path = library.add_file(project, name, io.BytesIO(b"[]"), 2)
    assert path == project.data / "evil.json"


@pytest.mark.parametrize("name", ["", ".json", "program.py", "a\n.json", ".."])
def test_bad_upload_names(project: Project, name: str):
    with pytest.raises(InputError, match=r"data\.bad_name"):
        library.add_file(project, name, io.BytesIO(b""), 0)


def test_copy_of_a_local_file(project: Project, tmp_path: Path):
    source = tmp_path / "big.jsonl"
    source.write_bytes(lines(good()))
    (project.data / "big.jsonl").write_text("mine")
    result = library.copy_file(str(project.root), str(source), SilentProgress())
    assert Path(result["path"]) == project.data / "big_2.jsonl"
    assert (project.data / "big.jsonl").read_text() == "mine"
    assert sorted(file.name for file in project.data.iterdir()) == ["big.jsonl", "big_2.jsonl"]


def test_manifest_names_each_dropped_row(project: Project):
    path = project.data / "rows.jsonl"
    path.write_bytes(lines(good(1), "{", good(1), {"messages": []}, good(2)))
    result = convert_job(str(project.root), str(path), progress=SilentProgress())
    made = Path(result["path"])
    assert made.name == "rows_2.jsonl"
    known = json.loads(manifest_path(project, made).read_text())
    assert (known["rows_in"], known["rows_out"], known["source_sha256"]) == (5, 2, file_sha256(path))
    assert known["sha256"] == file_sha256(made)
    dropped = [json.loads(line) for line in dropped_path(project, made).read_text().splitlines()]
    assert [(one["line"], one["code"]) for one in dropped] == [
        (2, "broken_json"),
        (3, "duplicate_row"),
        (4, "no_messages"),
    ]


def test_duplicates_can_stay(project: Project):
    path = project.data / "rows.jsonl"
    path.write_bytes(lines(good(1), good(1)))
    assert convert(project, path, keep=["duplicate_row"]).rows_out == 2


def test_loss_keys_are_on_every_message_or_on_none(project: Project):
    path = project.data / "rows.jsonl"
    marked = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "loss": True}]}
    path.write_bytes(lines(good(1), marked))
    rows = [json.loads(line) for line in convert(project, path).path.read_text().splitlines()]
    assert [[one["loss"] for one in row["messages"]] for row in rows] == [[False, True], [False, True]]


def test_split_keeps_every_row_once(project: Project):
    path = project.data / "rows.jsonl"
    path.write_bytes(lines(*[good(number) for number in range(400)]))
    split = split_dataset(project, path, 10)
    assert split.train_rows + split.validation_rows == 400
    assert 20 <= split.validation_rows <= 60
    parts = split.train.read_text().splitlines() + split.validation.read_text().splitlines()
    assert sorted(parts) == sorted(path.read_text().splitlines())


def test_split_of_too_few_rows_leaves_nothing_behind(project: Project):
    path = project.data / "rows.jsonl"
    path.write_bytes(lines(good(1)))
    with pytest.raises(InputError, match=r"data\.split_empty"):
        split_dataset(project, path, 10)
    assert [file.name for file in project.data.iterdir()] == ["rows.jsonl"]


def test_edit_makes_a_new_version(project: Project):
    path = project.data / "rows.json"
    path.write_text(json.dumps([good(1), good(2)], indent=1))
    line = library.browse(path).rows[1].line
    made = replace_row(project, path, line, json.dumps(good(9)))
    assert [json.loads(text) for text in made.read_text().splitlines()] == [good(1), good(9)]
    with pytest.raises(InputError, match=r"data\.bad_edit"):
        replace_row(project, path, line, "{")
    with pytest.raises(InputError, match=r"data\.bad_edit"):
        replace_row(project, path, line, '{"messages": []}')
    with pytest.raises(InputError, match=r"data\.no_such_row"):
        replace_row(project, path, 999, json.dumps(good(9)))


def test_formula_cells_are_plain_text_in_the_export(project: Project):
    path = project.data / "rows.jsonl"
    path.write_bytes(lines(good(1), {"messages": [{"role": "=cmd|'/c calc'!A1", "content": "x"}]}))
    report = library.check(project, path).report
    assert report is not None
    table = library.findings_csv(report, catalog("en"))
    assert "unknown_role,error,2," in table
    assert all(not cell.startswith("=") for line in table.splitlines() for cell in line.split(","))
    assert library.plain_cell("=1+1") == "'=1+1"


def test_lengths_are_measured_once_and_kept(project: Project):
    write_tokenizer(project.model)
    path = project.data / "rows.jsonl"
    path.write_bytes(lines(*[good(number) for number in range(20)], {"messages": [{"role": "tool", "content": "x"}]}))
    template = prompt_templates()["qwen_chat"]
    assert load_lengths(project, path, project.model, template) is None
    lengths = measure(project, path, library.describe(project, path).detection, project.model, template)
    kept = load_lengths(project, path, project.model, template)
    assert kept is not None
    assert kept.tokens.tolist() == lengths.tokens.tolist()
    assert kept.unusable_rows == 1
    summary = kept.summary(int(lengths.tokens.max()) - 1)
    assert summary.rows == 20
    assert summary.truncated_rows > 0
    assert kept.summary(3).dropped_rows == 20
    assert kept.dropped_lines(3) == list(range(1, 21))
    assert kept.dropped_lines(10_000) == []
    assert sum(rows for _, _, rows in kept.histogram()) == 20
    path.write_bytes(lines(good(1)))
    assert load_lengths(project, path, project.model, template) is None
