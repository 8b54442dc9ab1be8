from pathlib import Path

import pytest

from core.errors import ConflictError, InputError, MachineError
from core.files import (
    free_path,
    read_json,
    require_absent,
    require_space,
    tree_size_bytes,
    within,
    write_json,
    write_text,
)


def test_a_file_is_replaced_whole_and_leaves_no_rest(tmp_path: Path) -> None:
    target = tmp_path / "folder" / "state.json"
    write_json(target, {"a": 1})
    write_json(target, {"name": "丹炉"})
    assert read_json(target) == {"name": "丹炉"}
    assert [file.name for file in target.parent.iterdir()] == ["state.json"]


def test_a_read_only_folder_is_said(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("x", encoding="utf-8")
    with pytest.raises(MachineError, match="cannot_write"):
        write_text(blocked / "state.json", "x")


@pytest.mark.parametrize(
    ("content", "code", "line"), [(b"", "files.broken_json", 1), (b'{"a": 1,\n "b": }', "files.broken_json", 2)]
)
def test_broken_json_names_the_place(tmp_path: Path, content: bytes, code: str, line: int) -> None:
    file = tmp_path / "a.json"
    file.write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_json(file)
    assert (caught.value.code, caught.value.params["line"]) == (code, line)


def test_not_utf8_names_the_byte(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_bytes(b'{"a": "\xff"}')
    with pytest.raises(InputError) as caught:
        read_json(file)
    assert caught.value.params["offset"] == 7


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    taken = tmp_path / "a.py"
    taken.write_text("x", encoding="utf-8")
    assert free_path(taken).name == "a_2.py"
    with pytest.raises(ConflictError):
        require_absent(taken)
    require_absent(tmp_path / "b.py")


def test_a_path_cannot_leave_its_root_by_dots_or_links(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "secret").write_text("x", encoding="utf-8")
    (root / "link").symlink_to(tmp_path / "secret")
    for path in (root / ".." / "secret", root / "link"):
        with pytest.raises(InputError, match="outside"):
            within(path, root)
    assert within(root / "a", root) == (root / "a").resolve()


def test_space_is_asked_for_before_the_start(tmp_path: Path) -> None:
    require_space(tmp_path / "new" / "folder", 1)
    with pytest.raises(MachineError, match="no_space"):
        require_space(tmp_path / "new" / "folder", 2**60)


def test_size_counts_all_files(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").write_bytes(b"12345")
    assert tree_size_bytes(tmp_path) == 5
