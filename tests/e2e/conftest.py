"""The app as a person meets it: a real server, a real browser. Screenshots are kept in test-artifacts/."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.error import URLError

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

ROOT = Path(__file__).parents[2]
ARTIFACTS = ROOT / "test-artifacts"
CHROMIUM_ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Server:
    """`streamlit run app.py` on a free port; can be killed and started again on the same projects."""

    home: Path
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        self.home.mkdir(parents=True, exist_ok=True)
        with open(self.home / "server.log", "ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "streamlit", "run", "app.py", "--server.port", str(self.port)],
                cwd=ROOT,
                env={**os.environ, "DANLU_HOME": str(self.home)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                with urllib.request.urlopen(f"{self.url}/_stcore/health", timeout=1):
                    return
            except (URLError, OSError):
                time.sleep(0.2)
        raise TimeoutError((self.home / "server.log").read_text(encoding="utf-8"))

    def kill(self) -> None:
        """kill -9 of the server's whole process group: what a crash of the web process is to a run."""
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


@dataclass
class Screen:
    """One browser tab, spoken to by the keys of the widgets."""

    page: Page
    server: Server
    _shots: int = 0

    def open(self, name: str = "", **query: str) -> None:
        """Open a page by its name in the URL, as a deep link."""
        arguments = "&".join(f"{key}={value}" for key, value in query.items())
        self.page.goto(f"{self.server.url}/{name}?{arguments}")
        self.settle()

    def go(self, name: str) -> None:
        """Go to a page by its link in the sidebar."""
        self.page.locator(f'section[data-testid="stSidebar"] a[href*="/{name}"]').first.click()
        self.page.wait_for_url(f"**/{name}**")
        self.settle()

    def settle(self) -> None:
        """Wait until the script run has ended, and see that no traceback is on the screen."""
        expect(self.page.get_by_test_id("stApp")).to_have_attribute(
            "data-test-script-state", "notRunning", timeout=60_000
        )
        assert self.page.get_by_test_id("stException").count() == 0, self.text()

    def key(self, key: str):  # type: ignore[no-untyped-def]
        return self.page.locator(f".st-key-{key}").first

    def click(self, key: str) -> None:
        self.key(key).locator("button").first.click()
        self.settle()

    def fill(self, key: str, value: str) -> None:
        box = self.key(key).locator("input, textarea").first
        box.fill(value)
        box.press("Tab")
        self.settle()

    def choose(self, key: str, option: str) -> None:
        """Choose an option of a select box by (a part of) its text."""
        self.key(key).locator("input").first.click()
        self.page.get_by_role("option").filter(has_text=option).first.click()
        self.settle()

    def see(self, text: str, *, seconds: float = 30) -> None:
        expect(self.page.get_by_text(text).first).to_be_visible(timeout=seconds * 1000)

    def text(self) -> str:
        return self.page.locator("body").inner_text()

    def shot(self, name: str) -> None:
        self._shots += 1
        ARTIFACTS.mkdir(exist_ok=True)
        self.page.screenshot(path=ARTIFACTS / f"{name}.png", full_page=False)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    executable = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if executable is None:
        pytest.fail("Chromium is not installed: apt-get install chromium")
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=executable, args=CHROMIUM_ARGUMENTS)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    running = Server(tmp_path / "home")
    running.start()
    yield running
    running.kill()


@pytest.fixture
def screen(browser: Browser, server: Server) -> Iterator[Screen]:
    context = browser.new_context(viewport={"width": 1280, "height": 720}, locale="en-US")
    yield Screen(context.new_page(), server)
    context.close()
