"""Every config of the installed XTuner, without importing it."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from core.xtuner.catalogue import METHODS, configs, find, search

ROOT = Path(__file__).parents[3]


def test_all_of_them() -> None:
    entries = configs()
    assert len(entries) == 593
    assert sum(entry.is_supervised for entry in entries) == 510
    assert {entry.method for entry in entries} <= set(METHODS)
    counts = Counter(entry.method for entry in entries)
    assert (counts["dpo"], counts["orpo"], counts["reward"], counts["script"]) == (8, 5, 7, 6)


def test_a_search_is_that_of_list_cfg() -> None:
    names = {entry.name for entry in configs() if "internlm2_chat_1_8b" in entry.name}
    assert {entry.name for entry in search("InternLM2_chat_1_8B")} == names
    assert names
    assert {entry.name for entry in search("1_8b qlora alpaca internlm2")} >= {"internlm2_chat_1_8b_qlora_alpaca_e3"}
    assert all(entry.method == "dpo" for entry in search("", methods=["dpo"]))
    assert not [entry for entry in search("deepseek_v2", only_loadable=True) if entry.obstacle]
    assert search("no such thing at all") == []


def test_what_a_name_says() -> None:
    entry = find("internlm2_chat_1_8b_qlora_alpaca_e3")
    assert entry is not None
    said = (entry.family, entry.model, entry.size, entry.method, entry.data, entry.epochs, entry.max_length)
    assert said == ("internlm", "internlm2_chat_1_8b", "1.8B", "qlora", "alpaca", 3, 2048)
    assert entry.base_model == "internlm/internlm2-chat-1_8b"
    assert entry.obstacle is None


@pytest.mark.parametrize("part", ["deepseek_v2_lite_chat_full", "convert"])
def test_what_cannot_start_says_why(part: str) -> None:
    entries = [entry for entry in configs() if part in entry.name]
    assert entries
    assert all(entry.obstacle is not None for entry in entries)


def test_nothing_heavy_is_imported() -> None:
    code = (
        "import sys; from core.xtuner import catalogue; catalogue.configs(); "
        "print(sorted({'torch', 'xtuner', 'mmengine'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
