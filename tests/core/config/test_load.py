"""A config is code: it runs in a process of its own, within a time limit, and what is wrong is said with its line."""

import sys
from pathlib import Path

import pytest

from core.config.load import load_values
from core.errors import InputError, MachineError


def test_values_and_names() -> None:
    values = load_values("from torch.optim import AdamW\nlr = 1e-4\nopt = dict(type=AdamW, lr=lr)\n")
    assert values["opt"] == {"type": "torch.optim.AdamW", "lr": 1e-4}


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        ("a = 1\nb = a + unknown\n", 2, "unknown"),
        ('import os\n\nx = os.environ["NO_SUCH_NAME"]\n', 3, "subscriptable"),
        ("a = 1\nraise SystemExit(3)\n", 2, "3"),
        ("import os\nx = 1 / 0\n", 2, "division"),
        ("import os\nwhile True:\n    print('x' * 2**20)\n", 3, "too large"),
    ],
)
def test_what_goes_wrong_is_said_with_its_line(text: str, line: int, reason: str) -> None:
    with pytest.raises(InputError, match=r"config\.does_not_load") as caught:
        load_values(text)
    assert caught.value.params["line"] == line
    assert reason in caught.value.params["reason"]


def test_a_config_that_ends_its_process_is_told_from_a_missing_mmengine() -> None:
    with pytest.raises(InputError, match=r"config\.does_not_load") as caught:
        load_values("a = 1\n__import__('os').abort()\n")
    assert caught.value.params["reason"] == "SIGABRT"


def test_an_endless_loop_is_ended() -> None:
    with pytest.raises(InputError, match=r"config\.takes_too_long"):
        load_values("import os\nwhile True:\n    pass\n", timeout_seconds=4)


def test_a_syntax_error_starts_no_process() -> None:
    with pytest.raises(InputError, match=r"config\.syntax"):
        load_values("a = (\n", python="/does/not/exist")


def test_a_python_without_mmengine_is_named(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -S -c "import mmengine"\n')
    python.chmod(0o755)
    with pytest.raises(MachineError, match=r"config\.no_mmengine") as caught:
        load_values("a = 1\n", python=str(python))
    assert "mmengine" in caught.value.params["reason"]
