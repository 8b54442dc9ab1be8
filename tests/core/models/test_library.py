"""Models found on a machine, copied with verification, linked; consent to their code."""

import os
from pathlib import Path

import pytest

from core.chat.client import start_worker
from core.errors import ConflictError, InputError, JobError, MachineError
from core.models import library
from core.models.library import copy_model, find_models, free_name, link_model, project_models
from core.models.remote_code import allow, is_allowed, require_allowed
from core.project import Project, open_project
from core.runs.job import SilentProgress
from core.runs.request import TrainRequest
from core.runs.train import plan
from core.settings import Settings
from tests.core.models.test_download import Watched, held
from tests.models import write_tiny_internlm2, write_tiny_llama
from tests.training import make_project


@pytest.fixture
def project(tmp_path: Path) -> Project:
    (tmp_path / "ft").mkdir()
    return open_project(tmp_path / "ft")


def found(project: Project, shared: Path | None = None, **environ: Path) -> list[tuple[str, str]]:
    places = {"HF_HOME": "/nowhere", "MODELSCOPE_CACHE": "/nowhere"} | {key: str(path) for key, path in environ.items()}
    return [(card.source, card.name) for card in find_models(project, Settings(shared_models=shared), places)]


def test_models_of_project_shared_folder_and_caches_are_found(project: Project, tmp_path: Path):
    write_tiny_llama(project.model / "mine")
    write_tiny_llama(tmp_path / "share/Shanghai_AI_Laboratory/internlm2-chat-1_8b")
    (tmp_path / "share/broken").mkdir()
    (tmp_path / "share/broken/config.json").write_text("{", encoding="utf-8")
    repository = tmp_path / "hf/hub/models--Qwen--Qwen2.5-0.5B/snapshots"
    for age, commit in enumerate(("new", "old")):
        write_tiny_llama(repository / commit)
        os.utime(repository / commit, (1000 - age, 1000 - age))
    write_tiny_llama(tmp_path / "ms/hub/models/Qwen/Qwen2___5-1___5B")
    assert found(project, tmp_path / "share", HF_HOME=tmp_path / "hf", MODELSCOPE_CACHE=tmp_path / "ms") == [
        ("project", "mine"),
        ("shared", "internlm2-chat-1_8b"),
        ("cache", "Qwen2.5-0.5B"),
        ("cache", "Qwen2.5-1.5B"),
    ]


def test_model_folder_of_the_guide_is_one_model(project: Project):
    write_tiny_llama(project.model)
    assert project_models(project) == [project.model]
    with pytest.raises(InputError) as caught:
        free_name(project, "second")
    assert caught.value.code == "models.single_model"


@pytest.mark.parametrize("name", ["", "..", ".hidden", "a/b", "/etc"])
def test_names_that_are_no_folder_names(project: Project, name: str):
    with pytest.raises(InputError):
        free_name(project, name)


def test_copy_holds_real_files_and_leaves_the_rest(project: Project, tmp_path: Path):
    """As the hub cache has it: links to blobs."""
    origin = write_tiny_llama(tmp_path / "origin")
    blob = tmp_path / "blob"
    (origin / "model.safetensors").rename(blob)
    (origin / "model.safetensors").symlink_to(blob)
    (origin / ".git").mkdir()
    (origin / ".git/HEAD").write_text("x", encoding="ascii")
    progress = Watched()
    result = copy_model(str(origin), str(project.model / "copy"), progress)
    copied = project.model / "copy"
    assert not (copied / "model.safetensors").is_symlink()
    assert (copied / "model.safetensors").read_bytes() == blob.read_bytes()
    assert ".git/HEAD" not in held(copied)
    assert result["files"] == len(held(copied))
    assert progress.said[-1][0] == progress.said[-1][1] == 2 * result["bytes"]
    assert list(project.model.iterdir()) == [copied]


@pytest.mark.parametrize("moment", [1, 700_000])
def test_cancelled_copy_leaves_nothing(project: Project, tmp_path: Path, moment: int):
    origin = write_tiny_llama(tmp_path / "origin")
    with pytest.raises(JobError):
        copy_model(str(origin), str(project.model / "copy"), Watched(stop_at_bytes=moment))
    assert list(project.model.iterdir()) == []


def test_copy_that_reads_back_differently_is_thrown_away(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    origin = write_tiny_llama(tmp_path / "origin")
    spoiled = project.model / ".copy.partial/model.safetensors"

    class Spoiling(SilentProgress):
        def update(self, done: float, total: float | None, said: object, *, unit: str = "") -> None:
            if "verifying" in str(said) and spoiled.read_bytes()[-1:] != b"\xff":
                spoiled.write_bytes(spoiled.read_bytes()[:-1] + b"\xff")

    with pytest.raises(MachineError) as caught:
        copy_model(str(origin), str(project.model / "copy"), Spoiling())
    assert caught.value.code == "models.copy_differs"
    assert list(project.model.iterdir()) == []


def test_incomplete_model_is_not_copied(project: Project, tmp_path: Path):
    origin = write_tiny_llama(tmp_path / "origin")
    (origin / "model.safetensors").unlink()
    for action in (
        lambda: copy_model(str(origin), str(project.model / "copy"), SilentProgress()),
        lambda: link_model(origin, project.model / "copy"),
    ):
        with pytest.raises(InputError) as caught:
            action()
        assert caught.value.code == "models.incomplete"


def test_nothing_is_overwritten(project: Project, tmp_path: Path):
    origin = write_tiny_llama(tmp_path / "origin")
    goal = project.model / "there"
    goal.mkdir()
    (goal / "mine.txt").write_text("mine", encoding="utf-8")
    for action in (
        lambda: copy_model(str(origin), str(goal), SilentProgress()),
        lambda: link_model(origin, goal),
    ):
        with pytest.raises(ConflictError):
            action()
    assert held(goal) == {"mine.txt": b"mine"}


def test_copy_needs_space(project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    origin = write_tiny_llama(tmp_path / "origin")

    def refuse(folder: Path, needed_bytes: int) -> None:
        assert needed_bytes > sum(file.stat().st_size for file in origin.iterdir())
        raise MachineError("files.no_space", path=str(folder), needed_gib=1, free_gib=0)

    monkeypatch.setattr(library, "require_space", refuse)
    with pytest.raises(MachineError):
        copy_model(str(origin), str(project.model / "copy"), SilentProgress())


def test_link_is_instant_and_mends_itself(project: Project, tmp_path: Path):
    origin, goal = write_tiny_llama(tmp_path / "origin"), project.model / "link"
    assert link_model(origin, goal).resolve() == origin
    assert link_model(origin, goal) == goal
    assert found(project) == [("project", "link")]
    origin.rename(tmp_path / "moved")
    link_model(tmp_path / "moved", goal)
    assert goal.resolve() == tmp_path / "moved"


def test_consent_holds_for_exactly_this_code(project: Project, tmp_path: Path):
    folder = write_tiny_internlm2(project.model / "internlm2")
    with pytest.raises(InputError) as caught:
        require_allowed(project, folder)
    assert caught.value.code == "models.code_not_allowed"
    allow(project, folder)
    require_allowed(project, folder)
    merged = write_tiny_internlm2(project.final_model / "merged")
    assert is_allowed(project, merged)
    (folder / "extra.py").write_text("import os\n", encoding="utf-8")
    assert not is_allowed(project, folder)
    (folder / "extra.py").unlink()
    assert is_allowed(project, folder)


def test_python_files_that_never_run_need_no_consent(project: Project):
    folder = write_tiny_llama(project.model / "llama")
    (folder / "convert.py").write_text("print()\n", encoding="utf-8")
    assert is_allowed(project, folder)


def test_no_training_and_no_chat_without_consent(tmp_path: Path):
    project, config = make_project(tmp_path / "p", write_tiny_internlm2)
    assert plan(project, TrainRequest(config=config)).details["base_model"]["model_type"] == "internlm2"
    (project.model / "tiny/modeling_internlm2.py").write_text("raise SystemExit\n", encoding="utf-8")
    for action in (
        lambda: plan(project, TrainRequest(config=config)),
        lambda: start_worker(project, project.model / "tiny"),
    ):
        with pytest.raises(InputError) as caught:
            action()
        assert caught.value.code == "models.code_not_allowed"
