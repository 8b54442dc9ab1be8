"""Which Pythons are found, which one trains, and what the launch makes of an old XTuner."""

import sys
from pathlib import Path

import pytest

from core.environment.interpreters import (
    choose_python,
    find_interpreters,
    installed_versions,
    is_legacy,
    python_version,
    training_python,
    xtuner_version,
)
from core.errors import InputError
from core.project import Project, open_project
from core.runs.request import TrainRequest
from core.runs.train import plan
from core.xtuner.command import training_argv
from core.xtuner.legacy import legacy_argv
from tests.core.environment.fakes import install, make_python, script
from tests.models import write_tiny_llama
from tests.training import make_project


def conda(folder: Path, xtuner: str | None = None, python: str = "3.10") -> Path:
    """The shape of a conda environment; its interpreter."""
    (folder / "conda-meta").mkdir(parents=True)
    (folder / f"lib/python{python}/site-packages").mkdir(parents=True)
    interpreter = script(folder / "bin/python", "exit 0")
    if xtuner:
        install(interpreter, "xtuner", xtuner, {})
    return interpreter


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home/projects/ft").mkdir(parents=True)
    return open_project(tmp_path / "home/projects/ft")


def found(project: Project, chosen: Path | None = None, **environ: str) -> dict[str, tuple[str, str | None]]:
    """Source and XTuner by name, without what this machine itself has."""
    home = project.root.parents[1]
    listed = find_interpreters(project, chosen, environ)
    assert listed[0].python == Path(sys.executable)
    return {item.name: (item.source, item.xtuner) for item in listed[1:] if item.python.is_relative_to(home.parent)}


def test_conda_environments_of_every_usual_kind_are_found(project: Project, tmp_path: Path):
    home = tmp_path / "home"
    conda(home / "miniconda3/envs/xtuner0.1.17", "0.1.17")
    conda(home / "listed", "0.2.0", "3.11")
    conda(tmp_path / "more/by_variable")
    conda(tmp_path / "prefix/active")
    conda(tmp_path / "base/envs/of_program")
    (home / ".conda").mkdir()
    (home / ".conda/environments.txt").write_text(f"{home / 'listed'}\n\n/gone\n", encoding="utf-8")
    assert found(
        project,
        CONDA_PREFIX=str(tmp_path / "prefix/active"),
        CONDA_ENVS_PATH=str(tmp_path / "more"),
        CONDA_EXE=str(tmp_path / "base/bin/conda"),
    ) == {
        "active": ("conda", None),
        "by_variable": ("conda", None),
        "of_program": ("conda", None),
        "listed": ("conda", "0.2.0"),
        "xtuner0.1.17": ("conda", "0.1.17"),
    }


def test_environments_of_and_beside_the_project_are_found(project: Project):
    make_python(project.private / "env")
    make_python(project.root.parent / "beside")
    (project.root.parent / "no_env/bin").mkdir(parents=True)
    script(project.root.parent / "no_env/bin/python", "exit 0")
    assert found(project) == {"env": ("project", None), "beside": ("venv", None)}


def test_choice_is_the_projects_own_and_outlives_the_setting(project: Project, tmp_path: Path):
    default, mine = conda(tmp_path / "a"), conda(tmp_path / "b")
    assert training_python(project) == Path(sys.executable)
    assert training_python(project, default) == default
    choose_python(project, mine)
    assert training_python(project, default) == mine
    assert set(found(project, default)) == {"a", "b"}
    mine.unlink()
    with pytest.raises(InputError) as caught:
        training_python(project, default)
    assert caught.value.code == "environment.python_gone"


@pytest.mark.parametrize("path", ["relative/python", "/etc/passwd", "/gone/python", "/"])
def test_what_is_no_python_is_not_chosen(project: Project, path: str):
    with pytest.raises(InputError):
        choose_python(project, Path(path))
    assert training_python(project) == Path(sys.executable)


def test_versions_are_read_from_names_alone(tmp_path: Path):
    python = conda(tmp_path / "env", "0.1.23")
    install(python, "flash_attn", "2.5.8", {})
    assert installed_versions(python) == {"flash-attn": "2.5.8", "xtuner": "0.1.23"}
    assert (xtuner_version(python), python_version(python)) == ("0.1.23", "3.10")
    assert python_version(tmp_path / "nothing/bin/python") is None


@pytest.mark.parametrize(
    ("xtuner", "python", "expected"),
    [
        ("0.1.17", "3.10", True),
        ("0.1.23", "3.11", True),
        ("0.2.0", "3.10", True),
        ("0.2.0", "3.11", False),
        ("0.2.0", "3.12", False),
        ("0.2.0rc0", "3.11", True),
        (None, "3.12", False),
    ],
)
def test_what_cannot_run_the_apps_code_is_told_apart(tmp_path: Path, xtuner: str | None, python: str, expected: bool):
    assert is_legacy(conda(tmp_path / "env", xtuner, python)) is expected


def test_old_xtuner_trains_with_its_own_script():
    argv = training_argv("/env/bin/python", Path("/ft/train/run"), world_size=2, port=1234)
    old = legacy_argv(
        argv,
        Path("/ft/train/run/source/a.py"),
        deepspeed="deepspeed_zero2",
        resume="/ft/x.pth",
        seed=7,
        needs_group=True,
    )
    assert old[: old.index("xtuner.tools.train")] == argv[:-2]
    assert old[old.index("xtuner.tools.train") + 1 :] == [
        "/ft/train/run/source/a.py",
        "--work-dir",
        "/ft/train/run",
        "--launcher",
        "pytorch",
        "--seed",
        "7",
        "--deepspeed",
        "deepspeed_zero2",
        "--resume",
        "/ft/x.pth",
    ]
    alone = legacy_argv(argv, Path("/a.py"), deepspeed=None, resume=None, seed=None, needs_group=False)
    assert alone[alone.index("xtuner.tools.train") + 1 :] == [
        "/a.py",
        "--work-dir",
        "/ft/train/run",
        "--launcher",
        "none",
    ]


def test_a_run_with_old_xtuner_is_planned_for_it(tmp_path: Path):
    """As the launch page starts it: the old environment's Python, its own versions, no hooks to wait for."""
    project, config = make_project(tmp_path / "p", write_tiny_llama)
    python = conda(tmp_path / "env", "0.1.17")
    install(python, "transformers", "4.38.2", {})
    spec = plan(project, TrainRequest(config=config, name="old", seed=7, speed="auto", python=str(python)))
    run = project.train / "old"
    assert spec.argv[0] == str(python)
    at = spec.argv.index("xtuner.tools.train")
    assert spec.argv[at + 1 : at + 4] == [str(run / "source/tiny.py"), "--work-dir", str(run)]
    assert spec.stop_seconds == 0
    assert spec.details["speed"] == "off"
    assert spec.details["versions"] == {"python": "3.10", "xtuner": "0.1.17", "transformers": "4.38.2"}
