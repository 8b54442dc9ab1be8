"""The first visitor of a server that has just started: by a bookmark, and in the language of the browser."""

import pytest
from playwright.sync_api import Browser, expect

from tests.e2e.conftest import Screen, Server

pytestmark = pytest.mark.browser


def test_a_bookmark_opens_its_page(screen: Screen):
    """Streamlit would say "Page not found" to whoever comes first (see app.py); `open` fails on that."""
    screen.open("monitor", lang="en")
    screen.see("Welcome to Danlu")
    screen.click("welcome_create_button")
    screen.see("There is no training run yet.")
    assert "/monitor" in screen.page.url


def test_the_first_page_has_a_path_of_its_own_too(screen: Screen):
    """Streamlit serves the default page at `/` only; whoever types a page's name must not be told that it is not there."""
    for name in ("start", "environment", "guide"):
        screen.open(name, lang="en")
        expect(screen.page.locator("h1").first).to_be_visible()


def test_the_language_is_the_browsers_until_it_is_chosen(browser: Browser, server: Server):
    context = browser.new_context(viewport={"width": 1280, "height": 720}, locale="zh-CN")
    screen = Screen(context.new_page(), server)
    screen.open()
    screen.see("欢迎来到丹炉")
    screen.pick("language", "English")
    screen.see("Welcome to Danlu")
    expect(screen.page.get_by_text("欢迎来到丹炉")).to_have_count(0)
    context.close()
