"""The environment page: a report of each colour, choosing the Python that trains, making one, the tunnel line."""

import sys
import time
from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest

from core.environment import venv, venv_cache
from core.environment.doctor import run_examination
from core.environment.interpreters import training_python
from core.environment.known_good import BASE_FILE, NODEPS_FILE
from core.project import Project, open_project
from core.runs.job import SilentProgress
from core.runs.jobs import active_jobs, latest_job
from core.runs.logs import log_file
from core.runs.state import Phase, read_status
from tests.core.environment.fakes import XTUNER, install, make_python

SCRIPT = str(Path(__file__).parents[2] / "pages/prepare/environment.py")


@pytest.fixture
def project(tmp_path: Path) -> Project:
    (tmp_path / "home/ft").mkdir(parents=True)
    return open_project(tmp_path / "home/ft")


def show(project: Project, language: str = "en") -> AppTest:
    app = AppTest.from_file(SCRIPT, default_timeout=240)
    app.session_state["project_root"] = str(project.root)
    app.session_state["language"] = language
    return app.run()


def text(app: AppTest) -> str:
    shown = [*app.markdown, *app.caption, *app.info, *app.error, *app.warning, *app.success, *app.code]
    return "\n".join(str(item.value) for item in shown)


@pytest.mark.parametrize(("language", "words"), [("zh", "还没有检查"), ("en", "Not checked yet")])
def test_first_visit(project: Project, language: str, words: str):
    app = show(project, language)
    assert not app.exception
    assert words in text(app)


def test_report_of_another_python_is_marked(project: Project, tmp_path: Path):
    python = make_python(tmp_path / "env")
    install(python, "xtuner", "0.1.23", XTUNER)
    run_examination(str(python), str(project.root), SilentProgress())
    app = show(project)
    assert not app.exception
    assert "would make training fail" in text(app)
    assert "another Python" in text(app)
    app.text_input(key="environment_other").set_value(str(python)).run()
    app.button(key="environment_use").click().run()
    assert training_python(project) == python
    assert "another Python" not in text(app)


def test_wrong_path_is_said_and_nothing_chosen(project: Project):
    app = show(project)
    app.text_input(key="environment_other").set_value("/etc/passwd").run()
    app.button(key="environment_use").click().run()
    assert not app.exception
    assert "/etc/passwd" in app.error[0].value
    assert training_python(project) == Path(sys.executable)


def test_environment_made_from_the_page_is_offered_and_used(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The cache holds the finished environment already, so that the real builder has only to give it out."""
    monkeypatch.setenv("DANLU_CACHE", str(tmp_path / "cache"))
    kept = " ".join(sorted(f"{name}=={version}" for name, version in venv.kept_packages([BASE_FILE]).items()))
    folder = venv_cache.environment_folder(tmp_path / "cache", [BASE_FILE, NODEPS_FILE], kept)
    make_python(folder)
    (folder / venv_cache.MARK).write_text("{}", encoding="ascii")
    app = show(project)
    app.button(key="environment_create").click().run()
    deadline = time.monotonic() + 240
    while active_jobs(project):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    job = latest_job(project, ["environment"])
    assert job is not None
    assert read_status(job).phase is Phase.FINISHED, log_file(job).read_text(encoding="utf-8")
    app = show(project)
    app.button(key="environment_use_made").click().run()
    assert not app.exception
    assert training_python(project) == project.private / "env/bin/python"
    assert (project.private / "env").resolve() == folder


def test_tunnel_line_follows_the_fields(project: Project):
    app = show(project)
    app.text_input(key="environment_tunnel_user").set_value("root").run()
    app.text_input(key="environment_tunnel_host").set_value("ssh.intern-ai.org.cn").run()
    app.number_input(key="environment_tunnel_port").set_value(35000).run()
    assert "root@ssh.intern-ai.org.cn -p 35000" in text(app)
    app.text_input(key="environment_tunnel_host").set_value("box; rm -rf /").run()
    assert "rm -rf" not in text(app)
