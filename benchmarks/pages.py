"""How fast the app is there: server start until a browser can click, and the server time of each page switch.

The switches are measured in a project as it is after some weeks: a model, data, a config, and runs with metrics.
"""

import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

from benchmarks.monitor import write_steps
from benchmarks.result import Result

_ROOT: Final = Path(__file__).parents[1]
_SWITCHES: Final = 5
_RUNS, _STEPS = 8, 2000
_STARTS: Final = 3
_ML_STACK: Final = ("torch", "transformers", "xtuner", "deepspeed")
_BROWSER: Final = ("--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking")


def run() -> Result:
    with tempfile.TemporaryDirectory() as home:
        write_project(Path(home) / "weeks")
        measured = _measure_in_fresh_process(home)
        figures: dict[str, float | int | str | None] = {**_starts(home), **measured}
    return Result(
        figures,
        {
            "start_to_first_page_seconds": ("<", 3.0),
            "slowest_page_switch_milliseconds": ("<", 300.0),
            "ml_modules_imported": ("==", 0),
        },
    )


def write_project(root: Path) -> None:
    """Model, data and config made by the app itself, in processes of their own, and runs with `_STEPS` steps each."""
    code = (
        "import sys\nfrom pathlib import Path\nfrom tests.models import write_tiny_qwen2\nfrom tests.training import make_project\n"
        "make_project(Path(sys.argv[1]), write_tiny_qwen2)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(root)], cwd=_ROOT, check=True, capture_output=True)
    for number in range(_RUNS):
        write_finished_run(root, f"run_{number}", f"2025-01-0{number + 1}", _STEPS)


def write_finished_run(root: Path, name: str, day: str, steps: int) -> None:
    """A run of the project in `root` that has ended, with its metrics."""
    folder = root / "train" / name
    folder.mkdir(parents=True)
    spec = {"id": name, "kind": "train", "title": "tiny", "argv": [sys.executable], "cwd": str(root)}
    spec["created_at"] = f"{day}T00:00:00+00:00"
    (folder / "run.json").write_text(json.dumps(spec), encoding="utf-8")
    gone = {"pid": 1, "started_ticks": 0, "boot_id": ""}
    state = {"phase": "finished", "supervisor": gone, "process": gone, "started_at": 1.7e9, "ended_at": 1.7e9 + 1000}
    (folder / "state.json").write_text(json.dumps({**state, "exit_code": 0}), encoding="utf-8")
    write_steps(folder / "metrics.jsonl", 1, steps, steps)


def _starts(home: str) -> dict[str, float]:
    """Median seconds from the command to the first script run, and to a page whose links can be clicked in a browser."""
    executable = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if executable is None:
        raise RuntimeError("Chromium is not installed: the start until a page can be clicked cannot be measured.")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=list(_BROWSER))
        page = browser.new_page()
        page.goto("about:blank")
        pages = statistics.median(_seconds_to_first_page(home, page) for _ in range(_STARTS))
        browser.close()
    runs = statistics.median(_seconds_to_first_run(home) for _ in range(_STARTS))
    return {"start_to_first_page_seconds": round(pages, 2), "start_to_first_run_seconds": round(runs, 2)}


def _seconds_to_first_page(home: str, page: Any) -> float:
    """A new server, and `page` of a browser that is open already, until title and links are there."""
    port = free_port()
    started = time.perf_counter()
    server = serve(home, port)
    try:
        wait_until_it_listens(port)
        page.goto(f"http://127.0.0.1:{port}/")
        page.locator('section[data-testid="stSidebar"] a').first.click(trial=True)
        page.locator("h1").first.wait_for()
        return time.perf_counter() - started
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def serve(home: str, port: int) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [sys.executable, "-m", "streamlit", "run", "app.py", "--server.port", str(port)],
        cwd=_ROOT,
        env=_environment(home),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def wait_until_it_listens(port: int) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)
        else:
            return


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _seconds_to_first_run(home: str) -> float:
    """Fresh interpreter, import of Streamlit and of the app, first full script run, without a server and a browser."""
    code = (
        "from streamlit.testing.v1 import AppTest\n"
        "at = AppTest.from_file('app.py', default_timeout=60).run()\n"
        "assert not at.exception, at.exception\n"
    )
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], cwd=_ROOT, env=_environment(home), check=True, capture_output=True)
    return time.perf_counter() - started


def _measure_in_fresh_process(home: str) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.pages", str(_SWITCHES)],
        cwd=_ROOT,
        env=_environment(home),
        check=True,
        capture_output=True,
        text=True,
    )
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def _environment(home: str) -> dict[str, str]:
    return {**os.environ, "DANLU_HOME": home}


def measure_switches(rounds: int) -> dict[str, float]:
    """Milliseconds of a switch to each page: the first one in the life of the server, and the median of those after it.

    Counts what of the ML stack got imported.
    """
    from streamlit.testing.v1 import AppTest

    from pages.ui.shell import PAGES

    app = AppTest.from_file(str(_ROOT / "app.py"), default_timeout=60).run()
    times: dict[str, list[float]] = {name: [] for name in PAGES}
    for _ in range(rounds + 1):
        for name, page in PAGES.items():
            started = time.perf_counter()
            app.switch_page(page).run()
            times[name].append((time.perf_counter() - started) * 1000)
            if app.exception:
                raise RuntimeError(f"{page}: {app.exception}")
    medians = {name: statistics.median(seen[1:]) for name, seen in times.items()}
    figures = {f"switch_to_{name}_milliseconds": round(value, 1) for name, value in medians.items()}
    figures["slowest_page_switch_milliseconds"] = round(max(medians.values()), 1)
    figures["slowest_first_switch_milliseconds"] = round(max(seen[0] for seen in times.values()), 1)
    figures["ml_modules_imported"] = sum(name in sys.modules for name in _ML_STACK)
    return figures


if __name__ == "__main__":
    print(json.dumps(measure_switches(int(sys.argv[1]))))
