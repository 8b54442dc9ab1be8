"""Configs of a project: listed, copied, saved without overwriting what was not read, drafts kept."""

from dataclasses import replace

import pytest

from core.config import library
from core.config.source import ConfigSource
from core.errors import ConflictError, InputError
from core.project import Project
from core.xtuner.catalogue import find


def test_a_copy_is_exact_and_never_overwrites(project: Project) -> None:
    entry = find("internlm2_chat_1_8b_qlora_alpaca_e3")
    assert entry is not None
    first, second = library.copy_config(entry, project), library.copy_config(entry, project)
    assert first.path.read_bytes() == second.path.read_bytes() == entry.path.read_bytes()
    assert first.name == "internlm2_chat_1_8b_qlora_alpaca_e3_copy"
    assert second.name != first.name
    assert library.original(first.name) == library.original(second.name) == entry.path.read_text()
    assert {config.name for config in library.list_configs(project)} == {first.name, second.name}


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "a b", "x" * 200])
def test_names_that_are_no_file_names(project: Project, name: str) -> None:
    with pytest.raises(InputError, match=r"config\.bad_name"):
        library.add_config(project, name, "a = 1\n")


def test_a_taken_name_is_refused(project: Project) -> None:
    library.add_config(project, "我的配置", "a = 1\n")
    with pytest.raises(ConflictError, match=r"config\.name_taken"):
        library.add_config(project, "我的配置", "a = 2\n")


def test_saving_keeps_the_version_before_and_refuses_a_file_changed_elsewhere(project: Project) -> None:
    config = library.add_config(project, "mine", "a = 1\n")
    draft = replace(library.open_draft(project, "mine"), text="a = 2\n")
    library.keep_draft(project, draft)
    assert library.open_draft(project, "mine") == draft
    library.save_config(project, draft)
    assert config.path.read_text() == "a = 2\n"
    assert [file.read_text() for file in (project.private / "versions").iterdir()] == ["a = 1\n"]
    config.path.write_text("a = 3\n")
    with pytest.raises(ConflictError, match=r"config\.changed_on_disk"):
        library.save_config(project, replace(draft, text="a = 4\n", saved_text="a = 2\n"))
    assert config.path.read_text() == "a = 3\n"


def test_text_that_does_not_parse_is_not_saved(project: Project) -> None:
    config = library.add_config(project, "mine", "a = 1\n")
    with pytest.raises(InputError, match=r"config\.syntax"):
        library.save_config(project, replace(library.open_draft(project, "mine"), text="a = (\n"))
    assert config.path.read_text() == "a = 1\n"


def test_binary_and_huge_files_are_refused(project: Project) -> None:
    binary = project.config / "binary.py"
    binary.write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(InputError, match=r"files\.not_utf8"):
        library.read_config(binary)
    huge = project.config / "huge.py"
    huge.write_bytes(b"a = 1\n" * 300_000)
    with pytest.raises(InputError, match=r"config\.too_large"):
        library.read_config(huge)
    with pytest.raises(InputError, match=r"files\.missing"):
        library.read_config(project.config / "gone.py")
    zeros = project.config / "zeros.py"
    zeros.write_bytes(b"a = 1\n\0\0")
    with pytest.raises(InputError, match=r"config\.not_text"):
        ConfigSource(library.read_config(zeros))


def test_a_file_from_elsewhere_comes_in_under_a_free_name(project: Project) -> None:
    assert library.import_config(project, "C:/x/mine.py", b"lr = 1\r\n").name == "mine"
    again = library.import_config(project, "mine.py", "lr = = 1  # 中文\n".encode())
    assert (again.name, library.read_config(again.path)) == ("mine_2", "lr = = 1  # 中文\n")
    assert (project.config / "mine.py").read_bytes() == b"lr = 1\r\n"
    for name, data, code in (
        ("my config.py", b"lr = 1", "config.bad_name"),
        ("gbk.py", "# 中文".encode("gbk"), "files.not_utf8"),
        ("huge.py", b"#" * 1_000_001, "config.too_large"),
    ):
        with pytest.raises(InputError) as caught:
            library.import_config(project, name, data)
        assert caught.value.code == code
    assert len(library.list_configs(project)) == 2
