"""Joining data sets and mixing general rows in."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from core.data import library
from core.data.mix import join, mix
from core.data.validate import file_sha256
from core.errors import InputError
from core.project import Project, open_project
from tests.core.data.corpus import A, S, alpaca, chat, good, lines, shared


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return open_project(tmp_path)


def put(project: Project, name: str, *rows: Any) -> Path:
    path = project.data / name
    path.write_bytes(lines(*rows))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_files_of_different_formats_become_one(project: Project):
    one = put(project, "one.jsonl", good(1), good(2), chat(("user", "x"), ("assistant", None)))
    two = put(project, "two.jsonl", alpaca(), alpaca())
    three = put(project, "three.jsonl", shared(("human", "Hi"), ("gpt", "Hello")))
    before = [path.read_bytes() for path in (one, two, three)]
    path = join(project, [one, two, three], "all")
    assert [row["messages"][-1]["content"] for row in read(path)] == ["Answer 1.", "Answer 2.", "3", "Hello"]
    assert [path.read_bytes() for path in (one, two, three)] == before
    checked = library.check(project, path)
    assert (checked.is_trainable, checked.rows) == (True, 4)
    known = library.manifest(project, path)
    assert known is not None
    assert (known["rows_in"], known["rows_out"]) == (5, 4)
    assert [Path(source["path"]).name for source in known["sources"]] == ["one.jsonl", "two.jsonl", "three.jsonl"]
    assert known["sources"][0]["sha256"] == file_sha256(one)


@pytest.mark.parametrize("percent", [1, 20, 50, 90])
def test_share_of_general_rows(project: Project, percent: int):
    own = put(project, "own.jsonl", *[good(number) for number in range(200)])
    general = put(project, "general.jsonl", *[chat(("user", f"g{number}"), A) for number in range(3000)])
    rows = read(mix(project, own, general, percent))
    kinds = Counter(row["messages"][0]["content"].startswith("g") for row in rows)
    assert kinds[False] == 200
    assert kinds[True] / len(rows) == pytest.approx(percent / 100, abs=0.005)
    places = [at for at, row in enumerate(rows) if row["messages"][0]["content"].startswith("g")]
    assert places[-1] > len(rows) / 3
    assert rows == read(mix(project, own, general, percent))
    assert rows != read(mix(project, own, general, percent, seed=1))


def test_too_few_general_rows_give_all_they_have(project: Project):
    own = put(project, "own.jsonl", *[good(number) for number in range(10)])
    general = put(project, "general.jsonl", chat(("user", "g"), A))
    assert len(read(mix(project, own, general, 50))) == 11


def test_marks_of_loss_are_in_all_rows_or_in_none(project: Project):
    marked = {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y", "loss": False}] * 2}
    marked["messages"][-1] = {"role": "assistant", "content": "z", "loss": True}
    path = join(project, [put(project, "a.jsonl", good(1)), put(project, "b.jsonl", marked)], "all")
    assert [[turn["loss"] for turn in row["messages"]] for row in read(path)] == [
        [False, True],
        [False, False, False, True],
    ]
    assert library.check(project, path).report.findings == []


def test_what_cannot_be_mixed_is_said(project: Project):
    own, text = put(project, "own.jsonl", good(1)), put(project, "text.jsonl", {"text": "a"})
    odd, bad = put(project, "odd.jsonl", {"a": 1, "b": 2}), put(project, "bad.jsonl", chat(S), chat(S))
    for action, code in (
        (lambda: mix(project, own, text, 20), "data.other_kinds"),
        (lambda: join(project, [own, odd], "x"), "data.unknown_format"),
        (lambda: join(project, [bad], "x"), "data.nothing_left"),
        (lambda: mix(project, own, own, 0), "data.bad_mix"),
        (lambda: mix(project, own, own, 91), "data.bad_mix"),
        (lambda: join(project, [own], "../../x"), "files.outside"),
    ):
        with pytest.raises(InputError) as caught:
            action()
        assert caught.value.code == code
    assert sorted(path.name for path in project.data.iterdir()) == ["bad.jsonl", "odd.jsonl", "own.jsonl", "text.jsonl"]
