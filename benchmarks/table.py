"""Writes the figures of the last benchmark runs into the READMEs, between two marks."""

import json
from pathlib import Path
from typing import Any, Final

_ROOT: Final = Path(__file__).parents[1]
_READMES: Final = ("README.md", "README_zh.md")
_BEGIN: Final = "<!-- benchmarks: begin -->"
_END: Final = "<!-- benchmarks: end -->"
_HEADS: Final = {
    "README.md": ("what", "figure", "target", ""),
    "README_zh.md": ("项目", "数值", "目标", ""),
}


def write_tables(lines: list[dict[str, Any]], results_file: Path) -> None:
    """Keep `lines` in `results_file` (one per benchmark, newest wins) and rewrite the tables from all that it holds."""
    kept = {line["name"]: line for line in _read(results_file)} | {line["name"]: line for line in lines}
    results_file.write_text("".join(json.dumps(kept[name]) + "\n" for name in sorted(kept)), encoding="utf-8")
    for name in _READMES:
        readme = _ROOT / name
        before, _, rest = readme.read_text(encoding="utf-8").partition(_BEGIN)
        _, _, after = rest.partition(_END)
        table = render(list(kept.values()), _HEADS[name])
        readme.write_text(f"{before}{_BEGIN}\n{table}\n{_END}{after}", encoding="utf-8")


def render(lines: list[dict[str, Any]], heads: tuple[str, ...]) -> str:
    """A Markdown table of every figure that has a target."""
    rows = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for line in sorted(lines, key=lambda line: str(line["name"])):
        for key, target in line["targets"].items():
            figure = line["figures"].get(key)
            shown = f"{figure:,.4g}" if isinstance(figure, float) else f"{figure:,}" if isinstance(figure, int) else "–"
            mark = "✗" if key in line["missed"] else "✓"
            rows.append(f"| `{line['name']}` {key.replace('_', ' ')} | {shown} | {target} | {mark} |")
    return "\n".join(rows)


def _read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []
