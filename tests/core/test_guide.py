import pytest

from core.guide import CHAPTERS, chapter_of, chapters
from core.i18n import LANGUAGES
from pages.ui.page_table import PAGES


@pytest.mark.parametrize("language", LANGUAGES)
def test_each_page_has_its_chapter(language: str) -> None:
    assert set(CHAPTERS) == set(PAGES)
    for page in PAGES:
        assert len(chapter_of(page, language).text) > 60


def test_both_languages_have_the_same_chapters() -> None:
    zh, en = ([(chapter.number, chapter.level) for chapter in chapters(language)] for language in ("zh", "en"))
    assert zh == en
    assert len({number for number, _ in zh}) == len(zh), "a number names one chapter"


@pytest.mark.parametrize("language", LANGUAGES)
def test_pictures_are_there_and_not_in_the_text(language: str) -> None:
    pictures = [part for chapter in chapters(language) for part in chapter.parts if not isinstance(part, str)]
    assert len(pictures) >= 8
    for name, file in pictures:
        assert name
        assert file.is_file()
    text = "".join(chapter.text for chapter in chapters(language))
    assert "![" not in text
    assert "\0" not in text


@pytest.mark.parametrize("language", LANGUAGES)
def test_nothing_of_the_guide_is_lost(language: str) -> None:
    text = "".join(chapter.text for chapter in chapters(language))
    assert "```bash\nmake run\n```" in text, (
        "fenced: Streamlit strips the spaces of a text that begins with an indented block"
    )
    assert "`docs/results.md`" in text, "a link to a file that the app does not serve is named"
