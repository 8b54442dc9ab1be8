import ast
from pathlib import Path

import pytest

from core.errors import DanluError, InputError
from core.i18n import LANGUAGES, catalog, guess_language, placeholders
from core.messages import Message, message

ROOT = Path(__file__).parents[2]
RAISED = {"DanluError", "InputError", "MachineError", "ConflictError", "JobError"}


def calls(name_set: set[str]) -> list[tuple[str, str]]:
    """(place, first argument) of every call of these names with a literal first argument, in core and pages."""
    found = []
    for file in [ROOT / "app.py", *(ROOT / "core").rglob("*.py"), *(ROOT / "pages").rglob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
                name = getattr(node.func, "id", getattr(node.func, "attr", ""))
                if name in name_set and isinstance(node.args[0].value, str):
                    found.append((f"{file.relative_to(ROOT)}:{node.lineno}", node.args[0].value))
    return found


def test_both_languages_have_the_same_keys() -> None:
    zh, en = (catalog(language).sentences for language in ("zh", "en"))
    assert sorted(zh) == sorted(en)


def test_both_languages_have_the_same_placeholders() -> None:
    zh, en = (catalog(language).sentences for language in ("zh", "en"))
    differing = {key for key in zh if key in en and placeholders(zh[key]) != placeholders(en[key])}
    assert not differing


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_error_code_has_words(language: str) -> None:
    sentences = catalog(language).sentences
    missing = []
    for place, code in calls(RAISED):
        area, _, name = code.partition(".")
        missing += [
            f"{place} {area}.errors.{name}.{part}"
            for part in ("what", "next")
            if f"{area}.errors.{name}.{part}" not in sentences
        ]
    assert not missing


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_key_in_the_code_has_words(language: str) -> None:
    sentences = catalog(language).sentences
    missing = [
        f"{place} {key}" for place, key in calls({"t", "message", "Message"}) if "." in key and key not in sentences
    ]
    assert not missing


def test_chinese_is_chinese() -> None:
    """A sentence left in English in the Chinese files is most likely forgotten."""
    zh, en = (catalog(language).sentences for language in ("zh", "en"))
    same = {key for key in zh if zh[key] == en[key] and len(en[key].split()) > 3}
    assert not same


def test_an_error_is_explained_with_place_and_next_step() -> None:
    error = InputError("files.broken_json", path="data/a.json", line=3, column=7, reason="Expecting value")
    what, next_step = catalog("en").explain(error)
    assert "data/a.json, line 3, column 7" in what
    assert next_step
    again = DanluError.from_json(error.to_json())
    assert (type(again), again.params) == (InputError, error.params)


def test_a_message_inside_a_message_is_said_too() -> None:
    inner = message("shell.pages.model")
    assert catalog("en").text("shell.go_to", page=inner) == "Go to “Model”"
    assert Message.from_json(inner.to_json()) == inner


def test_a_missing_value_does_not_break_a_sentence() -> None:
    assert "{path}" in catalog("en").text("files.errors.missing.what", other=1)


@pytest.mark.parametrize(
    ("locale", "language"), [("zh-CN", "zh"), ("zh", "zh"), ("en-US", "en"), ("de", "en"), (None, "en")]
)
def test_first_guess_from_the_browser(locale: str | None, language: str) -> None:
    assert guess_language(locale) == language
