"""The threat model names the test that holds each line: each of them is there."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[3]


def test_each_threat_names_tests_that_exist() -> None:
    text = (ROOT / "docs/security.md").read_text(encoding="utf-8")
    rows = [line.split("|")[-2] for line in text.splitlines() if re.match(r"\| (?!threat|-)", line)]
    named = [re.findall(r"`([^`]+)`", row) for row in rows]
    assert len(rows) > 20
    assert all(named)
    found = set(
        re.findall(r"def (test_\w+)", "".join(p.read_text(encoding="utf-8") for p in ROOT.glob("tests/**/*.py")))
    )
    for name in {name for names in named for name in names}:
        assert name in found or (ROOT / name).exists(), name
