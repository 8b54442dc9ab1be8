"""The model page: nothing yet, a download from a hub on loopback, what a cut one leaves, consent to a model's own code."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest

from core.errors import JobError
from core.models.download import download_model, unfinished_downloads
from core.project import Project, open_project
from core.runs.jobs import active_jobs, latest_job
from core.runs.state import Phase, read_status
from tests.core.models.hub_server import REPO, FakeHub, model_files, reach_loopback, serve
from tests.core.models.test_download import Watched
from tests.models import write_tiny_internlm2, write_tiny_llama

SCRIPT = str(Path(__file__).parents[2] / "pages/prepare/model.py")


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "no_cache"))
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "no_cache"))
    (tmp_path / "ft").mkdir()
    return open_project(tmp_path / "ft")


@pytest.fixture
def hub(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    reach_loopback(monkeypatch)
    with serve(model_files(write_tiny_llama(tmp_path_factory.mktemp("origin") / "tiny"))) as found:
        monkeypatch.setenv("HF_ENDPOINT", found.url)
        yield found


def show(project: Project, language: str = "en") -> AppTest:
    app = AppTest.from_file(SCRIPT, default_timeout=240)
    app.session_state["project_root"] = str(project.root)
    app.session_state["language"] = language
    return app.run()


def wait_for_jobs(project: Project) -> None:
    deadline = time.monotonic() + 240
    while active_jobs(project):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def text(app: AppTest) -> str:
    return "\n".join(str(item.value) for item in [*app.markdown, *app.caption, *app.info, *app.error, *app.warning])


@pytest.mark.parametrize(("language", "words"), [("zh", "还没有模型"), ("en", "No model yet")])
def test_empty_project(project: Project, language: str, words: str):
    app = show(project, language)
    assert not app.exception
    assert words in text(app)


def test_model_is_looked_up_downloaded_and_shown(project: Project, hub: FakeHub):
    app = show(project)
    app.text_input(key="model_repo").set_value(REPO).run()
    app.button(key="model_look_up").click().run()
    assert not app.exception
    assert "KiB in" in text(app)
    assert hub.sent_bytes == 0
    app.button(key="model_download").click().run()
    wait_for_jobs(project)
    job = latest_job(project, ["download"])
    assert job is not None
    assert read_status(job).phase is Phase.FINISHED
    app = show(project)
    assert not app.exception
    assert "tiny-chat" in text(app)
    assert "optimised in XTuner" in text(app)


def test_model_that_is_not_there_is_said(project: Project, hub: FakeHub):
    app = show(project)
    app.text_input(key="model_repo").set_value("ada/nothing").run()
    app.button(key="model_look_up").click().run()
    assert not app.exception
    assert "ada/nothing is not on this hub" in app.error[0].value


def test_cut_download_can_go_on_or_be_deleted(project: Project, hub: FakeHub):
    def cut() -> None:
        arguments = {"hub": "huggingface", "endpoint": hub.url, "repo": REPO, "revision": ""}
        with pytest.raises(JobError):
            download_model(**arguments, target=str(project.model / "tiny"), progress=Watched(stop_at_bytes=1))

    cut()
    [left] = unfinished_downloads(project)
    app = show(project)
    assert "was not finished" in text(app)
    app.button(key=f"model_discard_{left.path.name}").click().run()
    assert unfinished_downloads(project) == []
    cut()
    app = show(project)
    app.button(key=f"model_go_on_{left.path.name}").click().run()
    wait_for_jobs(project)
    assert (project.model / "tiny/model.safetensors").is_file()
    assert unfinished_downloads(project) == []


def test_own_code_is_asked_for_once_and_again_after_a_change(project: Project):
    folder = write_tiny_internlm2(project.model / "internlm2")
    app = show(project)
    app.button(key="model_allow_internlm2").click().run()
    assert not app.exception
    assert "Its own code is allowed" in text(app)
    with (folder / "modeling_internlm2.py").open("a", encoding="utf-8") as stream:
        stream.write("# changed\n")
    app = show(project)
    assert app.button(key="model_allow_internlm2")
