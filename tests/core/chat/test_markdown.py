"""Hostile text makes the browser fetch nothing; honest text stays as it was."""

import re

import pytest

from core.chat.markdown import safe_markdown


@pytest.mark.parametrize(
    "text",
    [
        "![x](http://evil.example/beacon.png)",
        "a ![x][ref]\n\n[ref]: http://evil.example/b.png",
        "![ref]\n\n[ref]: http://evil.example/b.png",
        "<!--\n```\n-->\n![x](http://evil.example/b.png)",
        "```\nopen ![x](http://evil.example/b.png)",
        "<!--\n```\n-->\n![ref]\n\n[ref]: http://evil.example/b.png",
        "[![x](http://evil.example/a.png)](http://evil.example)",
        "!\x00[x](http://evil.example/a.png)",
    ],
)
def test_no_image_is_left(text: str) -> None:
    assert not re.search(r"!\[", safe_markdown(text))


def test_code_and_formulas_stay() -> None:
    code = "```rust\nlet a = vec![1, 2];\n\\(x\\)\n```\n"
    assert safe_markdown(code) == code
    assert safe_markdown(r"so \(a^2\) and \[b\]") == "so $a^2$ and $$b$$"
    assert safe_markdown("**bold** $x$ | a | 你好 🔥") == "**bold** $x$ | a | 你好 🔥"


def test_terminal_escapes_and_direction_marks_go() -> None:
    assert safe_markdown("\x1b[31mred\x1b[0m \u202egnp.exe") == "red gnp.exe"
