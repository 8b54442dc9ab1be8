"""Faults of the machine: every JSON file that the app keeps, broken in every way; a disk that is full wherever something is written."""

import errno
import io
import json
import os
import resource
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

from core.archive.pack import export_project
from core.archive.unpack import keep_upload
from core.chat.comparison import Column, Comparison, list_comparisons, load_comparison, save_comparison, vote
from core.chat.conversation import (
    list_conversations,
    load_conversation,
    new_conversation,
    save_conversation,
)
from core.chat.models import find_chat_models
from core.chat.samples import conversation_row
from core.checkpoints.companions import describe
from core.checkpoints.deliverables import list_deliverables
from core.config import own_recipes
from core.config.duration import rate, set_rate
from core.config.library import Draft, add_config, keep_draft, open_draft, save_config
from core.config.memory.measured import Key, correction, remember
from core.data import library as data
from core.data.convert import write_manifest
from core.data.generate import Assistant, write_assistant
from core.data.mix import append
from core.environment.doctor import last_report, report_file
from core.environment.interpreters import choose_python, training_python
from core.environment.report import Line, Report, Status
from core.errors import DanluError, MachineError
from core.files import read_json, write_json, write_text
from core.journey import steps
from core.messages import message
from core.models.remote_code import allow, is_allowed
from core.project import Project, create_project, list_projects, open_project, read_mark, remember_project
from core.runs.bundle import write_bundle
from core.runs.compare import differences
from core.runs.control import delete, list_trash
from core.runs.directory import RunDirectory, RunSpec
from core.runs.failure import explain_failure
from core.runs.job import SilentProgress
from core.runs.jobs import list_jobs, list_runs
from core.runs.launch import launch, now_utc, start_job
from core.runs.metrics import MetricsReader
from core.runs.notes import Notes, read_notes, write_notes
from core.runs.samples import read_answers
from core.runs.speed_table import read_tables
from core.runs.state import read_attempt, read_status
from core.runs.summary import summarize
from core.runs.tensorboard import write_events
from core.runs.watch import project_rules_file, read_alerts, read_rules
from core.settings import Settings

WRITERS = (
    "new project", "list of projects", "notes", "rate", "memory", "draft", "config", "new config", "recipe", "python", "allowed code",
    "conversation", "training sample", "vote", "upload", "copy", "made data", "manifest", "bundle", "curves", "archive",
    "archive upload", "trash", "run", "job",
)  # fmt: skip
BROKEN = (
    b"", b"{", b"null", b"[]", b"[1]", b"[[1, 2], {}]", b"7", b'"text"', b"NaN", b"true", b"\xff\xfe\x00", b"{}", b'{"a": {"b": []}}',
    b'{"schema_version": 99}', b'{"schema_version": "one"}', b'{"x": 1e999, "phase": "running"}',
)  # fmt: skip
OTHERS = (None, [], "text", {}, -1, [None])
"""What each value of a file is replaced by, one at a time."""


@dataclass(frozen=True)
class Kept:
    """A project with one of each file, and its run."""

    home: Path
    project: Project
    run: RunDirectory

    def read_everything(self) -> Iterator[Callable[[], Any]]:
        """All that pages ask when they are opened."""
        project, run, settings = self.project, self.run, Settings(home=self.home)
        yield lambda: list_projects(self.home)
        yield lambda: read_mark(project)
        yield lambda: open_project(project.root)
        yield lambda: steps(project)
        yield lambda: [(one.id, read_status(one)) for one in list_runs(project)]
        yield lambda: [summarize(one, MetricsReader(one.metrics_file).refresh()) for one in list_runs(project)]
        yield lambda: differences(list_runs(project) * 2)
        yield lambda: list_jobs(project, ("copy", "chat"))
        yield run.spec
        yield lambda: (
            read_attempt(run),
            read_notes(run),
            read_rules(run.watch_file),
            read_alerts(run),
            read_answers(run),
        )
        yield lambda: explain_failure(run)
        yield lambda: read_rules(project_rules_file(project.private))
        yield lambda: [one.is_verified for one in list_deliverables(project)]
        yield lambda: find_chat_models(project, settings)
        yield lambda: [load_conversation(project, name) for name, _ in list_conversations(project)]
        yield lambda: [load_comparison(project, name).wins() for name in list_comparisons(project)]
        yield lambda: training_python(project)
        yield lambda: last_report(project.root)
        yield lambda: data.list_datasets(project)
        yield lambda: [data.manifest(project, one.path) for one in data.list_datasets(project)]
        yield lambda: open_draft(project, "mine")
        yield lambda: own_recipes.list_recipes(project)
        yield lambda: rate(project, "A100")
        yield lambda: correction(project, KEY)
        yield lambda: read_tables(project)
        yield lambda: is_allowed(project, project.model)
        yield lambda: list_trash(project)


KEY = Key("model", "A100", "qlora/deepspeed")


def _run(project: Project, name: str) -> RunDirectory:
    run = RunDirectory(project.train / name)
    details = {"config": {"name": "mine", "sha256": "0"}, "base_model": {"path": "model", "fingerprint": "0"}}
    spec = RunSpec(
        id=name, kind="train", title="t", argv=[sys.executable], cwd="/", created_at=now_utc(), gpus=["0"],
        details={**details, "data": [{"path": "data/rows.jsonl", "sha256": "0", "rows": 1}], "versions": {"torch": "2"}},
    )  # fmt: skip
    write_json(run.spec_file, spec.to_json())
    identity = {"pid": 2**22, "started_ticks": 1, "boot_id": "other"}
    state = {
        "phase": "failed",
        "supervisor": identity,
        "process": identity,
        "started_at": 1.0,
        "ended_at": 2.0,
        "exit_code": 3,
    }
    write_json(run.state_file, {**state, "stop": {"mode": "save", "requested_at": 1.5}, "waits_for": []})
    return run


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Kept:
    home = tmp_path_factory.mktemp("broken")
    root = home / "ft"
    root.mkdir()
    project = open_project(root)
    remember_project(home, root)
    run = _run(project, "train_1")
    delete(project, _run(project, "train_2"))
    write_notes(run, Notes(("good",), "a note"))
    write_json(run.attempt_file, {"number": 2, "resume": "x", "iteration": 1, "log_offset": 0, "at": now_utc()})
    write_json(run.watch_file, {"stop_on": ["nan"], "webhook": "", "language": "en"})
    write_json(project_rules_file(project.private), {"stop_on": ["nan"], "webhook": "", "language": "en"})
    alert = {"kind": "nan", "level": "error", "since": 1.0, "until": None, "iteration": 1, "params": {"first": 1}}
    write_json(run.alerts_file, {"alerts": [alert], "webhook": {"sent": 0, "failed": 0, "reason": None}})
    write_json(run.error_file, {"type": "InputError", "code": "files.missing", "params": {"path": "x"}})
    conversation = new_conversation()
    conversation.ask("Who?")
    conversation.begin_answer("m").content = "I."
    save_conversation(project, conversation)
    columns = [Column(label=name, model="/m", adapter=None, is_base=False, prompt_template=None) for name in "ab"]
    comparison = Comparison(
        id="compare_1", created_at=now_utc(), questions=["?"], columns=columns, settings={}, system=""
    )
    save_comparison(project, comparison)
    vote(project, "compare_1", 0, 1)
    write_json(project.huggingface / "iter_1" / "adapter_config.json", {"base_model_name_or_path": "model"})
    describe(
        project.huggingface / "iter_1", kind="adapter", run="train_1", checkpoint="iter_1.pth", dtype="float16", system=None,
        base_model={"path": "model", "fingerprint": "0"}, prompt_template={"name": "default"},
    )  # fmt: skip
    choose_python(project, Path(sys.executable))
    line = Line("gpu", "GPU", Status.GREEN, message("environment.gpu.cpu_only"))
    write_json(report_file(root), Report(sys.executable, now_utc(), (line,)).to_json())
    write_text(project.config / "mine.py", "lr = 1\n")
    keep_draft(project, Draft("mine", "lr = 2\n", "lr = 1\n"))
    write_json(project.private / "recipes" / "mine.json", {"schema_version": 1, "name": "mine", "edits": []})
    set_rate(project, "A100", 2.0)
    remember(project, KEY, run="train_1", estimated_bytes=10, measured_bytes=11)
    write_json(project.private / "speed.json", {"key": {"rows": [], "applied": True}})
    write_json(project.private / "remote_code.json", {"model": ["hash"]})
    write_json(project.model / "config.json", {"auto_map": {"AutoModel": "x.Y"}})
    write_text(project.model / "x.py", "")
    rows = project.data / "rows.jsonl"
    write_text(rows, '{"conversation": [{"input": "a", "output": "b"}]}\n')
    data.check_job(str(root), str(rows), SilentProgress())
    write_manifest(project, rows, {"source": "a", "filters": []})
    return Kept(home, project, run)


def _state_files(kept: Kept) -> list[Path]:
    foreign = {kept.project.model / "config.json", kept.project.huggingface / "iter_1" / "adapter_config.json"}
    deleted = kept.project.private / "trash" / "train_2"
    found = {file for file in kept.home.rglob("*.json") if not file.is_relative_to(deleted)}
    return sorted({*found, deleted / ".danlu_origin"} - foreign)


def _variants(content: bytes) -> Iterator[bytes]:
    yield from BROKEN
    yield content[: len(content) // 2]
    value = json.loads(content)
    for name in value if isinstance(value, dict) else ():
        for other in OTHERS:
            yield json.dumps({**value, name: other}).encode()


def test_what_is_whole_is_read(kept: Kept) -> None:
    for read in kept.read_everything():
        read()
    assert len(_state_files(kept)) >= 24


def test_no_broken_file_breaks_more_than_itself(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing but a DanluError comes out of whoever reads it."""
    monkeypatch.setattr(
        "core.runs.processes.all_processes", list
    )  # a look at every process, each time that a state is broken
    monkeypatch.setattr("os.fsync", lambda _descriptor: None)
    readers = list(kept.read_everything())
    opened = [_opened(read) for read in readers]
    failures = set()
    for file in _state_files(kept):
        content = file.read_bytes()
        asked = [read for read, files in zip(readers, opened, strict=True) if file in files]
        assert asked, f"nobody reads {file}"
        for variant in dict.fromkeys(_variants(content)):
            file.write_bytes(variant)
            failures |= {f"{file.relative_to(kept.home)} {failure}: {variant[:80]!r}" for failure in _failures(asked)}
        file.write_bytes(content)
    assert not failures, "\n".join(sorted(failures))


def _opened(read: Callable[[], Any]) -> set[Path]:
    """Files that a reader opens."""
    seen, plain = set(), io.open

    def watched(file: Any, *arguments: Any, **options: Any) -> Any:
        seen.add(Path(str(file)))
        return plain(file, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(io, "open", watched)
        read()
    return seen


def _failures(readers: list[Callable[[], Any]]) -> Iterator[str]:
    for read in readers:
        try:
            read()
        except DanluError:
            continue
        except Exception as error:  # noqa: BLE001 - all of them are gathered
            last = traceback.extract_tb(error.__traceback__)[-1]
            yield f"{Path(last.filename).name}:{last.lineno} {type(error).__name__} {error}"


@contextmanager
def full_disk() -> Iterator[None]:
    """No file of this process may grow: the kernel refuses each write, as it does when the disk is full (EFBIG for ENOSPC)."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def _writers(kept: Kept) -> dict[str, Callable[[], Any]]:
    """Whatever a person can have the app write, by a name."""
    project, run = kept.project, kept.run
    conversation = load_conversation(project, list_conversations(project)[0][0])
    recipe = own_recipes.OwnRecipe("other", (own_recipes.Change("lr", "1"),))
    table = BytesIO(b'[{"conversation": []}]')
    spec = replace(run.spec(), id="train_9")
    exported = project.private / "exports"
    return {
        "new project": lambda: create_project(kept.home, "other"),
        "list of projects": lambda: remember_project(kept.home, kept.home / "else"),
        "notes": lambda: write_notes(run, Notes(("bad",), "x" * 100)),
        "rate": lambda: set_rate(project, "H100", 3.0),
        "memory": lambda: remember(project, KEY, run="new", estimated_bytes=10, measured_bytes=12),
        "draft": lambda: keep_draft(project, Draft("mine", "lr = 3\n", "lr = 1\n")),
        "config": lambda: save_config(project, Draft("mine", "lr = 3\n", "lr = 1\n")),
        "new config": lambda: add_config(project, "new", "lr = 1\n"),
        "recipe": lambda: own_recipes.save_recipe(project, recipe),
        "python": lambda: choose_python(project, Path(sys.executable)),
        "allowed code": lambda: allow(project, project.model),
        "conversation": lambda: save_conversation(project, conversation),
        "training sample": lambda: append(project, None, [conversation_row(conversation)], "samples", source="a talk"),
        "vote": lambda: vote(project, "compare_1", 0, 0),
        "upload": lambda: data.add_file(project, "new.json", table, 22),
        "copy": lambda: data.copy_file(str(project.root), str(project.data / "rows.jsonl"), SilentProgress()),
        "made data": lambda: write_assistant(project, Assistant(name="Danlu", author="Lin", language="en")),
        "manifest": lambda: write_manifest(project, project.data / "rows.jsonl", {"source": "b"}),
        "bundle": lambda: write_bundle(run, exported / "run.zip"),
        "curves": lambda: write_events(MetricsReader(run.metrics_file).refresh(), exported / "events"),
        "archive": lambda: export_project(str(project.root), [], has_conversations=False, progress=SilentProgress()),
        "archive upload": lambda: keep_upload(project, "a.zip", BytesIO(b"zip")),
        "trash": lambda: delete(project, run),
        "run": lambda: launch(project.train, spec),
        "job": lambda: start_job(project, "core.files:tree_size_bytes", kind="copy", title="t", arguments={}),
    }


def _tree(kept: Kept) -> dict[str, bytes]:
    """What lies on the disk but for empty files and folders."""
    files = (file for file in kept.home.rglob("*") if file.is_file())
    return {str(file): content for file in files if (content := file.read_bytes())}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_is_said_and_costs_nothing_that_was_there(kept: Kept, name: str) -> None:
    before, write = _tree(kept), _writers(kept)[name]
    with full_disk(), pytest.raises(MachineError):
        write()
    assert _tree(kept) == before
    assert not (kept.home / "other").exists()


def test_every_writer_is_tried(kept: Kept) -> None:
    assert set(_writers(kept)) == set(WRITERS)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EIO, errno.EDQUOT])
@pytest.mark.parametrize("step", ["os.mkdir", "tempfile.mkstemp", "os.fdopen", "os.fsync", "os.replace"])
def test_each_step_of_a_write_may_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, code: int) -> None:
    file = tmp_path / "state.json"
    write_json(file, {"old": 1})

    def refuse(*arguments: Any, **_: Any) -> None:
        if step == "os.fdopen":
            os.close(arguments[0])
        raise OSError(code, os.strerror(code))

    target = tmp_path / "new" / "state.json" if step == "os.mkdir" else file
    with monkeypatch.context() as patch:
        patch.setattr(step, refuse)
        with pytest.raises(MachineError) as caught:
            write_json(target, {"new": 2})
    assert caught.value.params["reason"] == os.strerror(code)
    assert [path.name for path in tmp_path.iterdir()] == ["state.json"]
    assert read_json(file) == {"old": 1}
