"""Each field has help in words: read from the code, so that a field on a page no test opens counts too."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from core.config.fields import FIELDS, Kind
from core.i18n import LANGUAGES, catalog

PAGES = Path(__file__).parents[2] / "pages"
FIELD_CALLS = {"number_input", "text_input", "text_area", "selectbox", "multiselect", "slider", "file_uploader"}


def fields() -> Iterator[tuple[str, str, dict[str, ast.expr]]]:
    """(place, kind, keywords) of every field that shows its label; one without is explained by what stands around it."""
    for file in sorted(PAGES.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in FIELD_CALLS:
                keywords = {keyword.arg or "**": keyword.value for keyword in node.keywords}
                if "label_visibility" not in keywords:
                    yield f"{file.relative_to(PAGES)}:{node.lineno}", node.func.attr, keywords


def test_every_field_has_help() -> None:
    found = list(fields())
    assert len(found) > 100, "the search finds the fields"
    assert not [place for place, _, keywords in found if not {"help", "**"} & set(keywords)]


@pytest.mark.parametrize("language", LANGUAGES)
def test_help_of_a_number_says_what_is_usual(language: str) -> None:
    """A range, an example or the meaning of 0: at any rate a number."""
    sentences = catalog(language).sentences
    silent = []
    for place, kind, keywords in fields():
        call = keywords.get("help")
        if kind == "number_input" and isinstance(call, ast.Call) and isinstance(call.args[0], ast.Constant):
            text = sentences[str(call.args[0].value)]
            silent += [] if any(character.isdigit() for character in text) else [f"{place}: {text}"]
    assert not silent


def test_every_number_of_a_config_has_its_usual_range() -> None:
    numbers = [field for field in FIELDS if field.kind in (Kind.INTEGER, Kind.NUMBER)]
    assert numbers
    assert not [field.key for field in numbers if field.usual is None]
