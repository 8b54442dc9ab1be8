"""Projects at three stages, made once, and the app as AppTest runs it: from the router, so that links and the sidebar are real."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from streamlit.testing.v1 import AppTest

from core import i18n
from core.project import Project
from pages.ui import text
from pages.ui.shell import PAGES
from tests.pages import projects

APP = str(Path(__file__).parents[2] / "app.py")
Visit = Callable[..., AppTest]


@pytest.fixture(scope="session")
def stages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Project]:
    """`empty`, `half`, `finished`. Tests look at them; they change nothing."""
    home = tmp_path_factory.mktemp("stages")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("DANLU_DEVICES", str(home / "devices"))
        return {
            "empty": projects.write_empty(home / "empty"),
            "half": projects.write_half(home / "half"),
            "finished": projects.write_finished(home / "finished"),
        }


@pytest.fixture
def visit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Visit:
    """Open a page of a project; a word that is missing in the locale is an error here, not the key on the screen."""
    for name in ("DANLU_HOME", "HF_HOME", "MODELSCOPE_CACHE"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    plain = i18n.Catalog.text

    def strict(catalog: i18n.Catalog, key: str, /, **params: Any) -> str:
        assert key in catalog.sentences, f"no words for {key} ({catalog.language})"
        return plain(catalog, key, **params)

    monkeypatch.setattr(i18n.Catalog, "text", strict)

    def open_page(project: Project | None, page: str, language: str = "en") -> AppTest:
        # AppTest calls format functions outside of the session, where only the browser's language is known.
        monkeypatch.setattr(text, "guess_language", lambda _locale: language)
        app = AppTest.from_file(APP, default_timeout=240)
        app.session_state["language"] = language
        if project is not None:
            app.session_state["project_root"] = str(project.root)
        app = app.run()
        app = app.switch_page(PAGES[page]).run()
        assert not app.exception, (page, app.exception)
        return app

    return open_page


def links(app: AppTest) -> set[str]:
    """Names of the pages that the page itself links to."""
    return {element.proto.page for element in app.main.get("page_link")}
