"""The whole job: environment, rows, worker, check, folder, model card; what goes wrong leaves nothing behind.

The worker is a stand-in that rounds to the nearest; with DANLU_TEST_QUANTIZE set, and the environment built, the real one runs too.
"""

import json
import os
import shutil
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from core.chat.models import find_chat_models, find_served_models
from core.checkpoints.companions import describe
from core.checkpoints.deliverables import list_deliverables
from core.checkpoints.serving import serve_commands
from core.data.generate import Assistant, write_assistant
from core.environment import venv_cache
from core.errors import ConflictError, DanluError, InputError, JobError
from core.files import write_json
from core.messages import Message
from core.project import Project, open_project
from core.quantize import environment
from core.quantize.environment import delete, find_environment, in_use, pinned_version
from core.quantize.export import export_quantized
from core.quantize.start import quantized_target, start_quantization
from core.runs.job import SilentProgress
from core.settings import Settings
from core.xtuner.templates import prompt_templates
from tests import models
from tests.core.environment.fakes import script
from tests.models import write_tiny_llama

ROOT = Path(__file__).parents[3]


@pytest.fixture
def project(tmp_path: Path) -> Project:
    (tmp_path / "project").mkdir()
    made = open_project(tmp_path / "project")
    add_model(made, "iter_4")
    write_assistant(made, Assistant(name="Danlu", author="Ada", rows=80, language="en"))
    return made


def add_model(project: Project, name: str) -> Path:
    folder = write_tiny_llama(project.final_model / name, dtype="bfloat16")
    describe(
        folder,
        kind="merged",
        run="train_1",
        checkpoint="iter_4.pth",
        base_model={"path": "tiny", "fingerprint": "x"},
        prompt_template=prompt_templates()["internlm2_chat"].to_json(),
        system="Be kind.",
        dtype="BF16",
    )
    return folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with an environment that looks whole; its Python runs the stand-in."""
    monkeypatch.setenv("DANLU_CACHE", str(tmp_path / "cache"))
    folder = find_environment().folder
    script(
        folder / "bin" / "python",
        f'cd {ROOT}; [ "$1 $2" = "-m core.quantize.worker" ] || exit 9\nexec {sys.executable} -m tests.core.quantize.fake_worker "$3"',
    )
    write_json(folder / venv_cache.MARK, {})
    return tmp_path / "cache"


class Watched(SilentProgress):
    """Remembers what was said; once `stop_at` is, the job is cancelled."""

    def __init__(self, stop_at: str = "") -> None:
        self.said: list[tuple[str, float, float | None]] = []
        self.stop_at = stop_at

    def update(self, done: float, total: float | None, message: Message, *, unit: str = "") -> None:
        name = message.key.removeprefix("quantize.progress.")
        self.said.append((name, done, total))
        if name == self.stop_at:
            raise JobError("runs.cancelled")


def export(project: Project, name: str = "iter_4", method: str = "gptq", **options: Any) -> dict[str, Any]:
    choices: dict[str, Any] = {"rows": 32, "max_length": 256, "may_install": False, "progress": SilentProgress()}
    return export_quantized(
        str(project.root),
        str(project.final_model / name),
        str(project.final_model / f"{name}-{method}"),
        method=method,
        data=str(project.data / "personal_assistant.json"),
        **{**choices, **options},
    )


def test_a_model_is_written_checked_and_listed_with_its_figures(project: Project, cache: Path) -> None:
    progress = Watched()
    made = export(project, progress=progress)
    folder = project.final_model / "iter_4-gptq"
    assert (made["path"], made["rows"], made["group_size"], made["matrices"]) == (str(folder), 32, 64, 14)
    assert ("quantising", 1.0, 3.0) in progress.said
    phases = list(dict.fromkeys(name for name, _, _ in progress.said if name != "loading"))  # It may be over unseen.
    assert phases == ["calibration", "quantising", "verifying"]
    source = project.final_model / "iter_4"
    assert (folder / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    config = json.loads((folder / "config.json").read_text())
    assert config.pop("quantization_config")["quant_method"] == "compressed-tensors"
    assert config == json.loads((source / "config.json").read_text())
    assert not (folder / "recipe.yaml").exists()
    item = next(item for item in list_deliverables(project) if item.path == folder)
    assert (item.kind, item.run, item.is_model, item.quantized) == ("gptq", "train_1", False, item.quantized)
    assert item.quantized is not None
    assert (item.quantized["loss_after"], item.quantized["template"]) == (1.25, "internlm2_chat")
    card = (folder / "README.md").read_text()
    assert "vllm serve iter_4-gptq" in card
    assert f"32 rows, {made['tokens']} tokens" in card
    assert "1.0000 before, 1.2500 after" in card
    settings = Settings(home=project.root.parent)
    assert folder not in [model.path for model in find_chat_models(project, settings)]
    assert [model.path for model in find_served_models(project)] == [folder]


def leftovers(project: Project) -> set[str]:
    return {path.name for path in project.final_model.iterdir()} - {"iter_4", "broken", "endless"}


def test_a_quantiser_that_fails_is_quoted_and_leaves_nothing(project: Project, cache: Path) -> None:
    add_model(project, "broken")
    with pytest.raises(JobError) as caught:
        export(project, "broken")
    assert caught.value.code == "quantize.failed"
    assert caught.value.params["reason"].endswith("RuntimeError: something is wrong in there")
    assert not leftovers(project)


def test_a_cancelled_export_ends_the_quantiser_and_leaves_nothing(project: Project, cache: Path) -> None:
    add_model(project, "endless")
    with pytest.raises(JobError) as caught:
        export(project, "endless", progress=Watched(stop_at="quantising"))
    assert caught.value.code == "runs.cancelled"
    assert not leftovers(project)
    with in_use(find_environment()):  # the lock is free again
        pass


def test_a_quantiser_that_the_system_kills_is_said_to_be_so(project: Project, cache: Path) -> None:
    script(find_environment().python, "kill -9 $$")
    with pytest.raises(DanluError) as caught:
        export(project)
    assert caught.value.code == "quantize.killed"


def test_weights_that_are_not_the_models_are_thrown_away(project: Project, cache: Path) -> None:
    other = write_tiny_llama(project.root.parent / "other", dtype="bfloat16", seed=5)
    script(
        find_environment().python,
        f"cd {ROOT}; sed -i 's|{project.final_model}/iter_4\"|{other}\"|' $3; exec {sys.executable} -m tests.core.quantize.fake_worker $3",
    )
    with pytest.raises(JobError) as caught:
        export(project)
    assert caught.value.code == "quantize.wrong_tensors"
    assert not leftovers(project)


def test_nothing_is_installed_without_consent(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DANLU_CACHE", str(tmp_path / "cache"))
    with pytest.raises(InputError) as caught:
        export(project)
    assert caught.value.code == "quantize.not_installed"
    built: list[tuple[Any, ...]] = []
    monkeypatch.setattr(environment, "build_environment", lambda *given: built.append(given))
    environment.prepare(SilentProgress(), may_install=True)
    assert built[0][:3] == (sys.executable, environment.REQUIREMENTS, environment.NODEPS)


def test_an_environment_in_use_is_neither_shared_nor_deleted(project: Project, cache: Path) -> None:
    entered, done = threading.Event(), threading.Event()

    def hold() -> None:
        with in_use(find_environment()):
            entered.set()
            done.wait()

    holder = threading.Thread(target=hold)
    holder.start()
    entered.wait()
    try:
        for action, code in ((lambda: export(project), "quantize.environment_busy"), (delete, "environment.in_use")):
            with pytest.raises(ConflictError) as caught:
                action()
            assert caught.value.code == code
    finally:
        done.set()
        holder.join()
    assert venv_cache.list_environments(cache)
    delete()
    assert not venv_cache.list_environments(cache)
    assert not find_environment().is_ready


def test_an_environment_whose_torch_is_gone_is_built_again(cache: Path, tmp_path: Path) -> None:
    site = find_environment().folder / "lib/python3.11/site-packages"
    site.mkdir(parents=True)
    (tmp_path / "parent" / "torch").mkdir(parents=True)
    (site / "_danlu_parent.pth").write_text(f"{tmp_path / 'parent'}\n")
    assert find_environment().is_ready
    shutil.rmtree(tmp_path / "parent")
    assert not find_environment().is_ready


def test_versions_are_exact() -> None:
    for name in ("llmcompressor", "compressed-tensors", "transformers", "auto-round"):
        assert pinned_version(name)[0].isdigit(), name


def test_what_cannot_be_started_is_refused_before_a_job_begins(project: Project) -> None:
    model, data = project.final_model / "iter_4", project.data / "personal_assistant.json"

    def refusal(given: Path = model, method: str = "awq", **options: Any) -> str:
        choices: dict[str, Any] = {"data": data, "rows": 128, "max_length": 512, "may_install": True, **options}
        with pytest.raises(DanluError) as caught:
            start_quantization(project, given, method, **choices)
        return caught.value.code

    assert refusal(method="q4") == "checkpoints.bad_dtype"
    assert refusal(rows=4) == "quantize.bad_rows"
    assert refusal(max_length=100) == "quantize.bad_rows"
    assert refusal(data=project.root / "config.json") == "files.outside"
    assert refusal(write_tiny_llama(project.model / "tiny")) == "files.outside"
    quantized_target(project, model, "awq").mkdir()
    (quantized_target(project, model, "awq") / "config.json").touch()
    assert refusal() == "files.exists"
    assert not list(project.jobs.glob("quantize_*"))


def test_lmdeploy_is_named_only_for_groups_that_it_reads() -> None:
    assert len(serve_commands("x", group_size=128)) == 2
    assert serve_commands("x", group_size=64) == serve_commands("x") == ["vllm serve x"]


@pytest.mark.engine
@pytest.mark.skipif("DANLU_TEST_QUANTIZE" not in os.environ, reason="takes minutes, and llm-compressor's environment")
@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_llm_compressor_itself(method: str, project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "HIDDEN", 128)
    monkeypatch.setattr(models, "INTERMEDIATE", 256)
    shutil.rmtree(project.final_model / "iter_4")
    write_tiny_llama(project.final_model / "iter_4", dtype="bfloat16", layers=1)
    made = export(project, method=method)
    assert (made["group_size"], made["matrices"]) == (128, 7)
    assert made["worst_error"] < 0.3
    assert abs(made["loss_after"] - made["loss_before"]) < 0.5
