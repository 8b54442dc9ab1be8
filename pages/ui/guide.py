"""The user guide in the app: a page's own chapter a click away, and the whole of it with pictures."""

import streamlit as st

from core.guide import Chapter, chapter_of, chapters
from pages.ui.text import language, t


def chapter_button(page: str) -> None:
    """A button that opens the chapter about this page beside it."""
    chapter = chapter_of(page, language())
    with st.popover(
        t("start.guide.chapter", number=chapter.number), icon=":material/menu_book:", type="tertiary", key="shell_guide"
    ):
        st.markdown(f"**{chapter.title}**\n\n{chapter.text}", width=520)
        # In a tab of its own: the page stays as it is.
        st.link_button(t("start.guide.whole"), f"guide?lang={language()}", icon=":material/open_in_new:")


def whole_guide() -> None:
    """All chapters below a list of them."""
    found = chapters(language())
    named = [chapter for chapter in found if chapter.title]
    st.markdown("\n".join(f"{'  ' * (chapter.level - 2)}- [{chapter.title}](#{_anchor(chapter)})" for chapter in named))
    for chapter in found:
        if chapter.title:
            (st.header if chapter.level == 2 else st.subheader)(chapter.title, anchor=_anchor(chapter))
        for part in chapter.parts:
            if isinstance(part, str):
                st.markdown(part)
            elif part[1].is_file():
                st.image(str(part[1]), alt=part[0], width=880)


def _anchor(chapter: Chapter) -> str:
    return f"guide-{chapter.number.replace('.', '-')}"
