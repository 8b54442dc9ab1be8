"""What a person starts, stops, deletes is written down where it happens, and shown."""

import ast
from pathlib import Path

import pytest

from core import settings
from core.access import audit
from core.access.gate import COOKIE
from core.access.sessions import session_name
from core.project import Project
from pages.ui.audit import visitor
from tests.pages.conftest import Visit

PAGES = Path(__file__).parents[2] / "pages"
RECORDED = frozenset({
    "launch", "go_on", "retry", "request_stop", "delete", "restore", "discard", "allow", "add_file", "write_bundle", "zip_folder",
    "create_project",
})  # fmt: skip
"""Functions of core that end, remove or hand out something; whatever begins something is called `start_…`."""
LOOKS = frozenset({"start_of", "start_button"})
"""Called `start_…` too, and begin nothing."""
NOTES = frozenset({"note", "_run", "_use", "_offer"})
"""`note`, and what calls it for what it is given."""


def _called(node: ast.AST) -> set[str]:
    functions = [child.func for child in ast.walk(node) if isinstance(child, ast.Call)]
    return {getattr(function, "id", getattr(function, "attr", "")) for function in functions}


def _scopes(tree: ast.Module) -> list[ast.AST]:
    outer = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    return [*outer, ast.Module([node for node in tree.body if node not in outer], [])]


@pytest.mark.parametrize("file", sorted(PAGES.rglob("*.py")), ids=lambda file: file.name)
def test_who_starts_or_removes_something_is_written_down(file: Path) -> None:
    for scope in _scopes(ast.parse(file.read_text(encoding="utf-8"))):
        calls = _called(scope)
        recorded = calls & RECORDED | {name for name in calls - LOOKS if name.startswith("start_")}
        assert not recorded or calls & NOTES, (file.name, getattr(scope, "name", "page"), recorded)


def test_the_log_is_shown_and_filtered(visit: Visit, stages: dict[str, Project]) -> None:
    page = visit(stages["empty"], "environment")
    page.session_state["environment_audit"] = True
    home = settings.load().home
    audit.record(home, "start", who="ada@example.org", project="empty", target="train_1")
    audit.record(home, "login_failed", address="10.0.0.9")
    shown = page.run().dataframe[0].value
    assert list(shown["What"]) == ["failed login", "started"]
    page.multiselect(key="audit_actions").select("start").run()
    assert list(page.dataframe[0].value["Who"]) == ["ada@example.org"]
    page.text_input(key="audit_find").set_value("nobody").run()
    assert page.dataframe[0].value.empty


def test_who_makes_a_project_is_in_the_log(visit: Visit) -> None:
    page = visit(None, "environment")
    page.text_input(key="welcome_name").set_value("mine")
    page.button(key="welcome_create_button").click().run()
    (entry,) = audit.read(settings.load().home)
    assert (entry.action, entry.who, entry.project) == ("create", "test@example.com", "mine")  # AppTest's own user


def test_without_a_name_it_is_the_login_or_the_account() -> None:
    login = visitor({}, {COOKIE: "secret-session"})
    assert login == session_name("secret-session")
    assert "secret" not in login
    assert visitor({"email": "ada@example.org"}, {COOKIE: "secret-session"}) == "ada@example.org"
    assert visitor({}, {}) == audit.system_user()
