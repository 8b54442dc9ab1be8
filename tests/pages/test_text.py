"""Sizes and durations for people."""

import pytest

from pages.ui import text


@pytest.mark.parametrize(
    ("language", "seconds", "words"),
    [
        ("en", 42.4, "42 s"),
        ("en", 185, "3 min 5 s"),
        ("en", 8040, "2 h 14 min"),
        ("zh", 42.4, "42 秒"),
        ("zh", 185, "3 分 5 秒"),
        ("zh", 8040, "2 小时 14 分"),
    ],
)
def test_durations(monkeypatch: pytest.MonkeyPatch, language: str, seconds: float, words: str):
    monkeypatch.setattr(text, "language", lambda: language)
    assert text.duration(seconds) == words


@pytest.mark.parametrize(
    ("size", "words"), [(12, "12 B"), (1536, "1.5 KiB"), (340 * 2**20, "340 MiB"), (1.25e9, "1.2 GiB")]
)
def test_sizes(size: float, words: str):
    assert text.gib(size) == words
