"""How fast the app is there: server start to first interactive page, and the server time of each page switch."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.result import Result

_ROOT = Path(__file__).parents[1]
_SWITCHES = 5


def run() -> Result:
    with tempfile.TemporaryDirectory() as home:
        measured = _measure_in_fresh_process(home)
        start = statistics.median(_seconds_to_first_page(home) for _ in range(3))
    figures = {"start_to_first_page_seconds": round(start, 2), **measured}
    return Result(
        figures,
        {
            "start_to_first_page_seconds": ("<", 3.0),
            "slowest_page_switch_milliseconds": ("<", 300.0),
            "ml_modules_imported": ("==", 0),
        },
    )


def _seconds_to_first_page(home: str) -> float:
    """Fresh interpreter, import of Streamlit and of the app, first full script run: what a person waits for after the command."""
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
    """Median milliseconds of a switch to each page, with a project in use; counts what of the ML stack got imported."""
    from streamlit.testing.v1 import AppTest

    from core.project import create_project
    from core.settings import load
    from pages.ui.shell import PAGES

    home = load().home
    if not (home / "bench").exists():
        create_project(home, "bench")
    app = AppTest.from_file(str(_ROOT / "app.py"), default_timeout=60).run()
    times: dict[str, list[float]] = {name: [] for name in PAGES}
    for _ in range(rounds):
        for name, page in PAGES.items():
            started = time.perf_counter()
            app.switch_page(page).run()
            times[name].append((time.perf_counter() - started) * 1000)
            if app.exception:
                raise RuntimeError(f"{page}: {app.exception}")
    medians = {name: statistics.median(seen) for name, seen in times.items()}
    figures = {f"switch_to_{name}_milliseconds": round(value, 1) for name, value in medians.items()}
    figures["slowest_page_switch_milliseconds"] = round(max(medians.values()), 1)
    figures["ml_modules_imported"] = sum(
        name in sys.modules for name in ("torch", "transformers", "xtuner", "deepspeed")
    )
    return figures


if __name__ == "__main__":
    print(json.dumps(measure_switches(int(sys.argv[1]))))
