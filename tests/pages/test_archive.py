"""A project is written into one file on the page, and another project is made of it."""

from pathlib import Path

from core import settings
from core.access import audit
from core.archive.pack import KIND, exports_folder
from core.archive.unpack import KIND as IMPORT
from core.project import create_project
from core.runs.jobs import latest_job
from tests.pages.conftest import Visit
from tests.waiting import has_stopped


def test_out_and_in_again(visit: Visit, tmp_path: Path) -> None:
    project = create_project(tmp_path / "elsewhere", "ft")
    (project.config / "mine.py").write_text("lr = 1e-4\n", encoding="utf-8")
    (project.data / "a.json").write_text("[]", encoding="utf-8")
    page = visit(project, "environment")
    assert not [button for button in page.button if button.key == "archive_export"]
    page.session_state["environment_archive"] = True
    page.run()
    page.multiselect(key="archive_data").select("a.json").run()
    assert any("Data: 1 file(s)" in one.value for one in page.markdown)
    page.button(key="archive_export").click().run()
    job = latest_job(project, (KIND,))
    assert job is not None
    assert has_stopped(job, 240)
    (archive,) = exports_folder(project).glob("*.danlu.zip")
    page.text_input(key="archive_path").set_value(str(archive))
    page.button(key="archive_look").click().run()
    page.text_input(key=f"archive_name_{archive.name}").set_value("back").run()
    page.button(key="archive_import").click().run()
    assert not page.error
    job = latest_job(project, (IMPORT,))
    assert job is not None
    assert has_stopped(job, 240)
    home = settings.load().home
    assert (home / "back" / "config" / "mine.py").is_file()
    assert [entry.action for entry in audit.read(home)] == ["import", "export"]


def test_what_is_no_archive_is_said(visit: Visit, tmp_path: Path) -> None:
    project = create_project(tmp_path / "elsewhere", "ft")
    (tmp_path / "x.zip").write_bytes(b"no zip")
    page = visit(project, "environment", "zh")
    page.session_state["environment_archive"] = True
    page.run()
    page.text_input(key="archive_path").set_value(str(tmp_path / "x.zip"))
    page.button(key="archive_look").click().run()
    assert "不是项目导出文件" in page.error[0].value
