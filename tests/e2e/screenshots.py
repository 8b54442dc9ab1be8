"""Pictures for the documentation: `python -m tests.e2e.screenshots HOME` opens every page of a finished project in both languages.

HOME is a folder of projects as in DANLU_HOME, with one project in it: of the browser journey or of `core.demo --home HOME`.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

from PIL import Image
from playwright.sync_api import sync_playwright

from pages.ui.shell import PAGES
from tests.e2e.conftest import CHROMIUM_ARGUMENTS, ROOT, Screen, Server, chromium

FOLDER: Final = ROOT / "docs/screenshots"
MAX_BYTES: Final = 200_000
_LANGUAGES: Final = ("en", "zh")


def take(home: Path, folder: Path) -> list[Path]:
    """One picture a page and language, 1280 × 720. Raises AssertionError where a page shows a traceback."""
    folder.mkdir(parents=True, exist_ok=True)
    server = Server(home)
    server.start()
    taken = []
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=chromium(), args=CHROMIUM_ARGUMENTS)
            for language in _LANGUAGES:
                context = browser.new_context(viewport={"width": 1280, "height": 720}, locale=language)
                screen = Screen(context.new_page(), server)
                for name in PAGES:
                    screen.open(
                        "" if name == next(iter(PAGES)) else name, lang=language
                    )  # the first page has no path of its own
                    _PREPARE.get(name, lambda _screen: None)(screen)
                    taken.append(_save(screen, folder / f"{name}_{language}.png"))
                context.close()
            browser.close()
    finally:
        server.kill()
    return taken


def _save(screen: Screen, file: Path) -> Path:
    screen.calm()
    screen.page.screenshot(path=file)
    with Image.open(file) as image:
        image.convert("RGB").quantize(colors=128, dither=Image.Dither.NONE).save(file, optimize=True)
    assert file.stat().st_size <= MAX_BYTES, f"{file} has {file.stat().st_size} bytes"
    return file


def _show_what_is_learned(screen: Screen) -> None:
    screen.page.locator("[class*='st-key-dataset_view_'] [role=radio]").nth(2).click()
    screen.settle()


def _show_changes(screen: Screen) -> None:
    screen.key("config_view").get_by_role("radio").last.click()
    screen.settle()


def _compare_runs(screen: Screen) -> None:
    """Tick all rows by the box in the head of the table, which is a canvas."""
    box = screen.key("runs_table").get_by_test_id("data-grid-canvas").bounding_box()
    assert box is not None
    screen.page.mouse.click(box["x"] + 15, box["y"] + 17)
    screen.settle()


def _open_conversation(screen: Screen) -> None:
    """A page with a chat box is scrolled to its end; the picture begins at its title. A project may have no conversation yet."""
    conversation = screen.page.locator("[class*='st-key-chat_open_']").first
    if not conversation.count():
        return
    screen.page.get_by_test_id("stExpander").filter(has=conversation).click()
    conversation.locator("button").click()
    screen.settle()
    screen.page.mouse.move(640, 200)
    screen.page.mouse.wheel(0, -2000)


_PREPARE: Final[dict[str, Callable[[Screen], None]]] = {
    "dataset": _show_what_is_learned,
    "config": _show_changes,
    "runs": _compare_runs,
    "chat": _open_conversation,
}
"""What is clicked on a page before its picture, so that it shows what the page is for."""


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.e2e.screenshots", description=__doc__)
    parser.add_argument("home", type=Path, help="folder with one finished project in it")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the pictures go")
    arguments = parser.parse_args(argv)
    for file in take(arguments.home, arguments.folder):
        print(file, f"{file.stat().st_size / 1000:.0f} kB")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
