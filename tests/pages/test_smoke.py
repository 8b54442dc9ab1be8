"""Every page with an empty project, a half-done one and a finished one, in both languages: no exception, nothing silent."""

import pytest

from core.journey import STEPS
from core.project import Project
from pages.ui.shell import PAGES
from tests.pages.conftest import Visit, links
from tests.pages.projects import ANSWER

LANGUAGES = ("zh", "en")
NEEDS = {"launch": "config", "monitor": "launch", "runs": "launch", "export": "launch", "chat": "model"}
"""What a page of an empty project links to: where the thing is made that it needs."""


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("stage", ["empty", "half", "finished"])
@pytest.mark.parametrize("page", PAGES)
def test_every_page_opens(stages: dict[str, Project], visit: Visit, page: str, stage: str, language: str):
    app = visit(stages[stage], page, language)
    assert app.title[0].value
    assert app.caption, "a page says in one line what it is for"
    (guide,) = app.get("link_button")[:1]
    assert guide.proto.url == f"guide?lang={language}", "its chapter is a click away"
    assert not app.error or stage == "half", [error.value for error in app.error]


@pytest.mark.parametrize("page", PAGES)
def test_without_a_project_every_page_asks_for_one(visit: Visit, page: str):
    app = visit(None, page)
    assert app.title[0].value == "Welcome to Danlu"
    assert app.text_input(key="welcome_name").value


@pytest.mark.parametrize(("page", "maker"), NEEDS.items())
def test_an_empty_page_links_to_what_it_needs(stages: dict[str, Project], visit: Visit, page: str, maker: str):
    assert maker in links(visit(stages["empty"], page))


@pytest.mark.parametrize("page", ["model", "dataset", "config"])
def test_an_empty_page_that_makes_things_says_so(stages: dict[str, Project], visit: Visit, page: str):
    assert visit(stages["empty"], page).info


def test_a_failed_run_is_explained(stages: dict[str, Project], visit: Visit):
    app = visit(stages["half"], "monitor")
    assert app.error
    assert any("out of luck" in code.value for code in app.code)
    assert "export" not in links(app), "there is nothing to export"


def test_a_finished_project_shows_what_it_has(stages: dict[str, Project], visit: Visit):
    """What core wrote is on the pages: the loss, the deliverables, the conversation."""
    finished = stages["finished"]
    assert any("1.0192" in markdown.value for markdown in visit(finished, "monitor").markdown)
    delivered = " ".join(markdown.value for markdown in visit(finished, "export").markdown)
    assert "huggingface/iter_8" in delivered
    assert "final_model/iter_8" in delivered
    chat = visit(finished, "chat")
    assert chat.selectbox(key="chat_model").value == f"merged:{finished.final_model / 'iter_8'}"
    conversation = next(finished.chat.glob("*.json")).stem
    app = chat.button(key=f"chat_open_{conversation}").click().run()
    assert any(ANSWER in markdown.value for markdown in app.markdown)


def test_the_sidebar_marks_what_is_done(stages: dict[str, Project], visit: Visit):
    """From the disk: a failed run is no finished training."""

    def done(stage: str) -> set[str]:
        app = visit(stages[stage], "environment")
        return {link.proto.page for link in app.sidebar.get("page_link") if link.proto.label.endswith("✓")}

    assert done("empty") == set()
    assert done("half") == {"model", "dataset", "config", "launch"}
    assert done("finished") == set(STEPS)


@pytest.mark.parametrize("view", ["curves", "hardware", "samples", "log", "details"])
def test_every_view_of_the_monitor(stages: dict[str, Project], visit: Visit, view: str):
    app = visit(stages["finished"], "monitor", "zh")
    app.segmented_control(key="monitor_view").set_value(view).run()
    assert not app.exception


@pytest.mark.parametrize("view", ["form", "guide", "source", "changes"])
def test_every_view_of_the_config(stages: dict[str, Project], visit: Visit, view: str):
    app = visit(stages["finished"], "config", "zh")
    app.segmented_control(key="config_view").set_value(view).run()
    assert not app.exception
