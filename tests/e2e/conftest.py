"""The app as a person meets it: a real server, a real browser. Screenshots are kept in test-artifacts/."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.error import URLError

import pytest
from playwright.sync_api import Browser, Page, WebSocket, expect, sync_playwright
from streamlit.proto.BackMsg_pb2 import BackMsg
from streamlit.proto.ForwardMsg_pb2 import ForwardMsg

from core.runs.control import request_stop
from core.runs.directory import RunDirectory
from core.runs.state import read_status
from core.xtuner.command import free_port
from pages.ui.shell import PAGES

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
PATIENCE_MILLISECONDS = 600_000
"""For what hangs, not for what is slow."""
_UNTIL_IT_IS_SENT_MILLISECONDS = 300
"""Of the page's own clock: sliders and tables keep what was done for up to 200 before they send it."""
_UNTIL_IT_IS_DRAWN_MILLISECONDS = 50
_UNTIL_CHARTS_ARE_DRAWN_MILLISECONDS = 700


expect.set_options(timeout=PATIENCE_MILLISECONDS)


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
        deadline = time.monotonic() + PATIENCE_MILLISECONDS / 1000
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                with urllib.request.urlopen(f"{self.url}/_stcore/health", timeout=10):
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
class Traffic:
    """What a page and its server say to each other: whether the page has asked for a run of the script that has not ended."""

    page: Page
    is_waiting: bool = False
    _fragment: str = ""
    """What is to run of the script; empty: all of it."""
    _run: str = ""
    """Identity of the run that was asked for, once it has begun."""

    def __post_init__(self) -> None:
        self.page.on("websocket", self._listen)

    def _listen(self, socket: WebSocket) -> None:
        self.is_waiting = False  # what an earlier connection was asked is forgotten
        socket.on("framesent", self._sent)
        socket.on("framereceived", self._received)

    def _sent(self, frame: bytes | str) -> None:
        message = BackMsg.FromString(frame) if isinstance(frame, bytes) else BackMsg()
        if message.WhichOneof("type") == "rerun_script" and not message.rerun_script.is_auto_rerun:
            self.is_waiting, self._fragment, self._run = True, message.rerun_script.fragment_id, ""

    def _received(self, frame: bytes | str) -> None:
        message = ForwardMsg.FromString(frame) if isinstance(frame, bytes) else ForwardMsg()
        kind, run = message.WhichOneof("type"), message.metadata.run
        if kind == "new_session" and (not run.fragment_ids or self._fragment in run.fragment_ids):
            self._run = run.script_run_id
        elif kind == "script_finished" and run.script_run_id == self._run:
            self.is_waiting &= message.script_finished == ForwardMsg.FINISHED_EARLY_FOR_RERUN


@dataclass
class Screen:
    """One browser tab, spoken to by the keys of the widgets."""

    page: Page
    server: Server
    _shots: int = 0
    _traffic: Traffic = field(init=False)

    def __post_init__(self) -> None:
        self.page.set_default_timeout(PATIENCE_MILLISECONDS)
        self._traffic = Traffic(self.page)

    def open(self, name: str = "", **query: str) -> None:
        """Open a page by its name in the URL, as a deep link."""
        arguments = "&".join(f"{key}={value}" for key, value in query.items())
        self.page.goto(f"{self.server.url}/{name}?{arguments}")
        expect(self.page.locator('section[data-testid="stSidebar"] a').first).to_be_visible()
        self.settle()

    def go(self, name: str) -> None:
        """Go to a page by its link in the sidebar."""
        links = self.page.get_by_test_id("stSidebar").get_by_test_id("stPageLink-NavLink")
        links.nth(list(PAGES).index(name)).click()
        is_first = name == next(iter(PAGES))  # which has no path of its own
        self.page.wait_for_url(re.compile(r"//[^/]+/(\?.*)?$" if is_first else rf"/{name}(\?.*)?$"))
        self.settle()

    def settle(self) -> None:
        """Wait until the script run has ended, and see that no traceback is on the screen."""
        self._pause(_UNTIL_IT_IS_SENT_MILLISECONDS)
        deadline = time.monotonic() + PATIENCE_MILLISECONDS / 1000
        while self._traffic.is_waiting:
            assert time.monotonic() < deadline, self.text()
            self.page.wait_for_timeout(20)
        self._pause(_UNTIL_IT_IS_DRAWN_MILLISECONDS)
        expect(self.page.get_by_test_id("stApp")).to_have_attribute("data-test-script-state", "notRunning")
        assert self.page.get_by_test_id("stException").count() == 0, self.text()
        assert self.page.get_by_text("Page not found").count() == 0, self.page.url

    def _pause(self, milliseconds: int) -> None:
        """By the page's clock, which stands still while the page has no time for us."""
        self.page.evaluate("milliseconds => new Promise(done => setTimeout(done, milliseconds))", milliseconds)

    def calm(self) -> None:
        """Wait until charts are drawn and notices are gone, and take the pointer off the page: for a picture."""
        self.settle()
        self.page.mouse.move(1279, 719)
        expect(self.page.get_by_test_id("stToast")).to_have_count(0)
        self.page.wait_for_timeout(_UNTIL_CHARTS_ARE_DRAWN_MILLISECONDS)

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

    def tab(self, name: str) -> None:
        self.page.get_by_role("tab", name=name).click()
        self.settle()

    def pick(self, key: str, option: str) -> None:
        """Press one of a row of buttons by its whole text."""
        self.key(key).get_by_role("radio", name=option, exact=True).click()
        self.settle()

    def toggle(self, key: str) -> None:
        self.key(key).locator("label").first.click()
        self.settle()

    def least(self, key: str) -> None:
        """Move a slider to its left end."""
        self.key(key).get_by_role("slider").press("Home")
        self.settle()

    def choose_row(self, key: str, text: str) -> None:
        """Tick the row of a table that has a cell with this text. The table is a canvas: its rows are found by its reading aid."""
        cell = self.key(key).locator(f"[role=gridcell]:text-is('{text}')").first
        row = int((cell.get_attribute("id") or "").rsplit("-", 1)[-1])
        box = self.key(key).get_by_test_id("data-grid-canvas").bounding_box()
        assert box is not None
        self.page.mouse.click(box["x"] + 15, box["y"] + 35 * (row + 1) + 17)
        self.settle()

    def say(self, key: str, text: str) -> None:
        """Write into the chat box and send it."""
        box = self.key(key).locator("textarea").first
        box.fill(text)
        box.press("Enter")

    def see(self, text: str | re.Pattern[str], *, or_text: str | None = None) -> None:
        """Wait until this text, or the other, can be seen."""
        wanted = self.page.get_by_text(text)
        if or_text is not None:
            wanted = wanted.or_(self.page.get_by_text(or_text))
        expect(wanted.locator("visible=true").first).to_be_visible()

    def text(self) -> str:
        return self.page.locator("body").inner_text()

    def shot(self, name: str) -> None:
        self._shots += 1
        ARTIFACTS.mkdir(exist_ok=True)
        self.calm()
        self.page.screenshot(path=ARTIFACTS / f"{name}.png", full_page=False)


def end_runs(home: Path) -> None:
    """Cancel what a test that failed on its way has left: trainings, jobs and chat workers outlive the server by design."""
    files = [*home.glob("*/train/*/run.json"), *home.glob("*/.danlu/jobs/*/run.json")]
    runs = [RunDirectory(file.parent) for file in files]
    active = [run for run in runs if read_status(run).phase.is_active]
    for run in active:
        request_stop(run, "cancel")
    deadline = time.monotonic() + 240
    while any(read_status(run).phase.is_active for run in active) and time.monotonic() < deadline:
        time.sleep(0.2)


def chromium() -> str:
    """Path of the browser. Fails the test if there is none."""
    executable = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if executable is None:
        pytest.fail("Chromium is not installed: apt-get install chromium")
    return executable


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(
            executable_path=chromium(), args=CHROMIUM_ARGUMENTS, timeout=PATIENCE_MILLISECONDS
        )


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    running = Server(tmp_path / "home")
    running.start()
    yield running
    running.kill()
    end_runs(running.home)


@pytest.fixture
def screen(browser: Browser, server: Server) -> Iterator[Screen]:
    context = browser.new_context(viewport={"width": 1280, "height": 720}, locale="en-US")
    yield Screen(context.new_page(), server)
    context.close()
