"""Whoever reads with a screen reader, in the dark, on a phone or without a mouse: every page by axe, by keys, and on 390 pixels.

The rules of axe-core come with the package axe-playwright-python. Only findings of serious or critical impact count.
"""

from importlib.resources import files
from typing import Any

import pytest
from playwright.sync_api import Browser, expect

from core import tour
from pages.ui.shell import PAGES
from tests.e2e.conftest import Screen, Server
from tests.pages import projects

pytestmark = pytest.mark.browser
NOT_OURS: dict[str, str] = {}
"""Rule → why Streamlit's own elements break it and nothing here can mend that."""
PHONE = {"width": 390, "height": 844}
_MOST_TABS = 120
_STILL = "*, *::before, *::after { transition: none !important; animation: none !important }"
"""A colour on its way to another has the contrast of neither."""


@pytest.fixture
def finished(server: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    """A server with one project in which everything is done, and the tour's hints are on."""
    monkeypatch.setenv("DANLU_DEVICES", str(server.home / "devices"))
    tour.show_hints(projects.write_finished(server.home / "finished"), True)
    return server


def serious_findings(screen: Screen) -> list[str]:
    """Rule, element and reason of each finding that counts, as the page is now."""
    result: dict[str, Any] = screen.page.evaluate("axe.run(document, {resultTypes: ['violations']})")
    return [
        f"{finding['id']}: {node['html'][:200]} {node['failureSummary']}"
        for finding in result["violations"]
        if finding["impact"] in ("serious", "critical") and finding["id"] not in NOT_OURS
        for node in finding["nodes"]
    ]


def test_no_page_has_a_serious_finding(browser: Browser, finished: Server):
    """Every page in both languages and both themes."""
    rules = files("axe_playwright_python").joinpath("axe.min.js").read_text(encoding="utf-8")
    found: dict[str, list[str]] = {}
    for language in ("zh", "en"):
        context = browser.new_context(viewport={"width": 1280, "height": 720}, locale=language)
        screen = Screen(context.new_page(), finished)
        screen.open(lang=language)
        screen.page.evaluate(rules)
        screen.page.add_style_tag(content=_STILL)
        for name in PAGES:
            screen.go(name)
            for theme in ("light", "dark"):
                screen.page.emulate_media(color_scheme=theme)
                expect(screen.page.get_by_test_id("stApp")).to_have_css("color-scheme", theme)
                found[f"{name} {language} {theme}"] = serious_findings(screen)
        context.close()
    assert not {place: findings for place, findings in found.items() if findings}


def tab_to(screen: Screen, key: str) -> None:
    """Press Tab until the element with this key has the focus, as a person without a mouse does."""
    for _ in range(_MOST_TABS):
        screen.page.keyboard.press("Tab")
        if screen.page.evaluate("key => !!document.activeElement.closest('.st-key-' + key)", key):
            return
    pytest.fail(f"{_MOST_TABS} tabs do not lead to {key}")


def test_the_journey_can_be_gone_by_keys_alone(screen: Screen, finished: Server):
    screen.open(lang="en")
    tab_to(screen, "start_go_on")
    screen.page.keyboard.press("Enter")
    screen.page.wait_for_url("**/chat*")
    for page, key in (("environment", "environment_check"), ("config", "config_view"), ("launch", "launch_start")):
        screen.open(page, lang="en")
        tab_to(screen, key)
    screen.open("model", lang="en")
    tab_to(screen, "tour_hide")
    screen.page.keyboard.press("Enter")
    expect(screen.key("tour_hint")).to_have_count(0)


def test_the_monitor_fits_a_phone(browser: Browser, finished: Server):
    context = browser.new_context(viewport=PHONE, locale="en-US", has_touch=True)
    screen = Screen(context.new_page(), finished)
    screen.page.goto(f"{finished.url}/monitor?lang=en")
    screen.see("Gradient norm")
    screen.settle()
    main = "document.querySelector('[data-testid=stMain]')"  # nothing is cut off at the side, once all is drawn
    screen.page.wait_for_function(f"{main}.scrollWidth <= {main}.clientWidth")
    screen.shot("phone_monitor")
    context.close()
