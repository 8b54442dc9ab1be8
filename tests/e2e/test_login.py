"""The password form as a real browser sends it: browsers add an origin to it, which the gate looks at."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, expect

from core.access import audit
from tests.e2e.conftest import PATIENCE_MILLISECONDS, Server

PASSWORD = "correct horse battery"


@pytest.fixture
def locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("DANLU_PASSWORD", PASSWORD)
    server = Server(tmp_path / "home")
    server.start()
    yield server
    server.kill()


def test_the_password_lets_in_and_what_follows_has_its_login(browser: Browser, locked: Server) -> None:
    context = browser.new_context(locale="en-US")
    page = context.new_page()
    page.set_default_timeout(PATIENCE_MILLISECONDS)
    page.goto(f"{locked.url}/environment?lang=en")
    for given in ("not it", PASSWORD):
        page.get_by_label("Password").fill(given)
        with page.expect_navigation():
            page.get_by_role("button", name="Log in").click()
    page.wait_for_url(f"{locked.url}/environment?lang=en")
    name = page.locator(".st-key-welcome_name input")
    expect(name).to_be_visible()
    name.fill("mine")
    name.press("Tab")
    page.locator(".st-key-welcome_create_button button").click()
    expect(name).not_to_be_visible()
    made, login, failed = audit.read(locked.home)
    assert (made.action, login.action, failed.action) == ("create", "login", "login_failed")
    assert made.who == login.who != ""
    context.close()
