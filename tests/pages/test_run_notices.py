"""What the monitor would tell through the browser: ends and alerts, once each, in plain text of the person's language."""

import json
from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest

SCRIPT = """
from pathlib import Path
import streamlit as st
from core.runs.directory import RunDirectory
from core.runs.state import Phase, RunStatus, read_status
from dataclasses import replace
from pages.ui.run_notices import notices

run = RunDirectory(Path({run!r}))
status = replace(read_status(run), phase=Phase({phase!r}), ended_at=5.0)
st.json(notices(run, status))
"""


def told(run: Path, phase: str, language: str) -> list[dict[str, str]]:
    app = AppTest.from_string(SCRIPT.format(run=str(run), phase=phase), default_timeout=240)
    app.session_state["language"] = language
    app.run()
    assert not app.exception
    found: list[dict[str, str]] = json.loads(app.json[0].value)
    return found


@pytest.mark.parametrize(("language", "end"), [("en", "Failed"), ("zh", "失败")])
def test_ends_and_alerts_are_told_but_not_what_one_did_oneself(tmp_path: Path, language: str, end: str) -> None:
    run = tmp_path / "first"
    run.mkdir()
    assert told(run, "running", language) == []
    assert told(run, "cancelled", language) == [], "the one who cancelled knows"
    alert = {
        "kind": "stalled",
        "level": "error",
        "since": 3.0,
        "until": None,
        "iteration": 7,
        "subject": "",
        "params": {},
    }
    (run / "alerts.json").write_text(json.dumps({"alerts": [alert, alert | {"kind": "plateau", "level": "info"}]}))
    warned, ended = told(run, "failed", language)
    assert warned["id"] != ended["id"]
    assert warned["title"].startswith("first: ")
    assert not {"*", "`"} & set(warned["title"] + warned["body"])
    assert ended["title"] == f"first: {end}"
