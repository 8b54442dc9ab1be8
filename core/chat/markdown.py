"""Model and user text made safe to show as Markdown: loads nothing from anywhere, keeps code and formulas. Knows no page."""

import re
from typing import Final

_CONTROL: Final = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\u202a-\u202e\u2066-\u2069]")
"""Terminal escapes, control characters, and marks that turn the writing direction around."""
_FENCE: Final = re.compile(r" {0,3}(`{3,}|~{3,})")
_IMAGE_LIKE: Final = re.compile(r"!(?=\[[^\]]*\]\s*[(\[])", re.DOTALL)
_DEFINITION: Final = re.compile(r"^[\s>]*\[[^\]]+\]:", re.MULTILINE)
_DISPLAY: Final = re.compile(r"\\\[(.+?)\\\]", re.DOTALL)
_INLINE: Final = re.compile(r"\\\((.+?)\\\)")
_BREAK: Final = "!\u200b"
"""An exclamation mark that begins no image: a zero-width space follows it."""


def safe_markdown(text: str) -> str:
    """`text` with its images shown as text (no request leaves the browser) and LaTeX's own brackets as `$`.

    HTML is left to the page, which shows it as text. Inside code only what could be an image anyway is touched, because
    what looks like code here may not be code to the renderer.
    """
    text = _CONTROL.sub("", text)
    has_definitions = bool(_DEFINITION.search(text))
    parts = []
    for part, is_code in _split_fences(text):
        if is_code and not has_definitions:
            parts.append(_IMAGE_LIKE.sub(_BREAK, part))
        else:
            plain = part.replace("![", _BREAK + "[")
            parts.append(plain if is_code else _INLINE.sub(r"$\1$", _DISPLAY.sub(r"$$\1$$", plain)))
    return "".join(parts)


def _split_fences(text: str) -> list[tuple[str, bool]]:
    """Runs of lines, and whether they lie in a fenced code block."""
    parts: list[tuple[str, bool]] = []
    held: list[str] = []
    fence = ""
    for line in text.splitlines(keepends=True):
        match = _FENCE.match(line)
        if not fence and match:
            parts.append(("".join(held), False))
            held, fence = [line], match.group(1)
        elif fence and match and match.group(1).startswith(fence) and not line.strip().strip(fence[0]):
            held.append(line)
            parts.append(("".join(held), True))
            held, fence = [], ""
        else:
            held.append(line)
    parts.append(("".join(held), bool(fence)))
    return [part for part in parts if part[0]]
