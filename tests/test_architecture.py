"""The house rules of docs/architecture.md, read from the code itself."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ML_STACK = {
    "torch",
    "transformers",
    "xtuner",
    "peft",
    "deepspeed",
    "mmengine",
    "datasets",
    "bitsandbytes",
    "accelerate",
}
STDLIB_ONLY = ("core/runs/supervisor.py", "core/environment/probe.py", "core/environment/venv.py")
LEAVES = ("core/errors.py", "core/messages.py", "core/settings.py", "core/files.py", "core/i18n.py")
ML_ROOMS = ("core/xtuner/runtime", "core/chat")
HARD_LIMIT_LINES = 500


def python_files(*folders: str) -> list[Path]:
    return sorted(file for folder in folders for file in (ROOT / folder).rglob("*.py"))


def imports(file: Path, *, top_level_only: bool) -> set[str]:
    """Dotted names of everything `file` imports."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def roots(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("file", python_files("core"), ids=str)
def test_core_works_without_a_browser(file: Path) -> None:
    assert not roots(imports(file, top_level_only=False)) & {"streamlit", "pages"}


@pytest.mark.parametrize("file", python_files("core"), ids=str)
def test_core_loads_the_ml_stack_only_where_it_trains_or_chats(file: Path) -> None:
    place = file.relative_to(ROOT).as_posix()
    if not place.startswith(ML_ROOMS):
        assert not roots(imports(file, top_level_only=True)) & ML_STACK


def project_modules(file: Path) -> set[Path]:
    """Files of this project that `file` imports when it is loaded or run, and all that those import."""
    found: set[Path] = set()
    waiting = [file]
    while waiting:
        names = imports(waiting.pop(), top_level_only=False)
        candidates = {ROOT / f"{name.replace('.', '/')}.py" for name in names if name.startswith("core.")}
        new = {candidate for candidate in candidates if candidate.is_file()} - found
        found |= new
        waiting.extend(new)
    return found


@pytest.mark.parametrize("place", STDLIB_ONLY)
def test_what_must_outlive_the_ml_stack_is_stdlib_only(place: str) -> None:
    """Itself and every module of the project it leads to; NVML's binding may be missing and is asked for with care."""
    allowed = set(sys.stdlib_module_names) | {"pynvml", "core"}
    foreign = {
        f"{file.relative_to(ROOT)}: {name}"
        for file in {ROOT / place} | project_modules(ROOT / place)
        for name in imports(file, top_level_only=False)
        if name.split(".")[0] not in allowed
    }
    assert not foreign


@pytest.mark.parametrize("place", LEAVES)
def test_leaves_import_no_other_room(place: str) -> None:
    leaves = {leaf.removesuffix(".py").replace("/", ".") for leaf in LEAVES}
    for name in imports(ROOT / place, top_level_only=False):
        root = name.split(".")[0]
        assert root in set(sys.stdlib_module_names) | {"pydantic"} or any(name.startswith(leaf) for leaf in leaves)


@pytest.mark.parametrize("file", [ROOT / "app.py", *python_files("pages")], ids=str)
def test_pages_stay_thin(file: Path) -> None:
    names = imports(file, top_level_only=False)
    assert not roots(names) & (ML_STACK | {"subprocess"})
    tree = ast.parse(file.read_text(encoding="utf-8"))
    opens = [
        n for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name) and n.func.id == "open"
    ]
    assert not opens
    section = file.parent.name
    sections = ("start", "prepare", "train", "deliver")
    if section in (*sections, "ui"):
        assert not [name for name in names if name.startswith(tuple(f"pages.{other}" for other in sections))]


def test_no_script_lies_directly_in_pages() -> None:
    """Streamlit's old discovery runs pages/*.py on a deep link before app.py, without the login gate."""
    assert {file.name for file in (ROOT / "pages").glob("*.py")} <= {"__init__.py"}


@pytest.mark.parametrize("file", [ROOT / "app.py", *python_files("core", "pages", "benchmarks", "tests")], ids=str)
def test_no_module_is_longer_than_the_limit(file: Path) -> None:
    assert len(file.read_text(encoding="utf-8").splitlines()) <= HARD_LIMIT_LINES
