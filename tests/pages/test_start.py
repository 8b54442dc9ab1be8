"""The start page, the tour of a first visit, and the guide beside each page."""

import json
from contextlib import suppress
from pathlib import Path

from core import tour
from core.data.library import list_datasets
from core.errors import ConflictError
from core.i18n import LANGUAGES
from core.journey import STEPS
from core.project import Project, create_project
from core.runs.control import request_stop
from core.runs.jobs import list_jobs
from core.runs.state import read_status
from tests.core.runs.conftest import wait_until
from tests.pages.conftest import Visit, links


def test_the_start_page_leads_to_the_next_step(stages: dict[str, Project], visit: Visit):
    app = visit(stages["half"], "start")
    assert set(STEPS) <= links(app)
    assert app.button(key="start_go_on").label == "Go on: Environment"
    assert [markdown.value for markdown in app.markdown if "green-badge" in markdown.value]


def test_the_tour_makes_a_project_and_begins(tmp_path: Path, visit: Visit):
    app = visit(None, "start", "zh")
    app.text_input(key="start_author").set_value("Ming")
    app = app.button(key="start_try").click().run()
    assert not app.exception
    assert [error.value for error in app.error] == []
    project = Project(tmp_path / "danlu_home" / tour.PROJECT_NAME)
    (job,) = list_jobs(project, ("dequantize",))
    with suppress(ConflictError):  # it may have ended by now
        request_stop(job, "cancel")
    try:
        assert app.title[0].value == "环境"
        assert app.button(key="tour_hide")
        (data,) = list_datasets(project)
        assert "Ming" in data.path.read_text(encoding="utf-8")
    finally:
        wait_until(lambda: not read_status(job).phase.is_active)


def test_each_step_has_its_hint_with_the_labels_of_its_page(tmp_path: Path, visit: Visit):
    project = create_project(tmp_path, "toured")
    tour.show_hints(project, True)
    for number, step in enumerate(STEPS):
        app = visit(project, step, LANGUAGES[number % 2])
        (hint,) = (block for block in app.markdown if ":material/tour:" in block.value)
        assert f"{number + 1}" in hint.value
        assert "{" not in " ".join(markdown.value for markdown in app.markdown)
        assert (tour.next_page(step) or "") in links(app)
    assert not [button for button in visit(project, "runs").button if button.key == "tour_hide"]


def test_hidden_hints_stay_hidden_and_come_back_on_the_start_page(tmp_path: Path, visit: Visit):
    project = create_project(tmp_path, "toured")
    tour.show_hints(project, True)
    visit(project, "model").button(key="tour_hide").click().run()
    assert json.loads((project.private / "tour.json").read_text(encoding="utf-8"))["is_shown"] is False
    assert not [button for button in visit(project, "model").button if button.key == "tour_hide"]
    visit(project, "start").toggle(key="start_hints").set_value(True).run()
    assert visit(project, "model").button(key="tour_hide")


def test_the_guide_needs_no_project(visit: Visit):
    app = visit(None, "start", "zh")
    app = app.switch_page("pages/start/guide.py").run()
    assert not app.exception
    assert app.title[0].value == "使用指南"
    assert len(app.header) >= 5
