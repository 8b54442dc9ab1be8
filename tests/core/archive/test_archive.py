"""A project goes into one file and comes out of it as another project; what does not belong there goes neither way."""

import hashlib
import json
import os
import stat
import zipfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.archive.contents import MANIFEST, Choice, group_of, plan_export
from core.archive.masking import masker
from core.archive.pack import export_project
from core.archive.unpack import import_project, inspect_archive, keep_upload, start_import
from core.errors import ConflictError, DanluError, InputError, JobError, MachineError
from core.files import read_json, write_json, write_text
from core.messages import Message
from core.project import Project, create_project, read_mark
from core.runs import processes
from core.runs.again import go_on, retry
from core.runs.directory import RunDirectory
from core.runs.job import SilentProgress
from core.runs.state import Phase, read_status

QUIET = SilentProgress()
TOKEN = "hf_" + "a1B2" * 8


@pytest.fixture
def project(tmp_path: Path) -> Project:
    made = create_project(tmp_path / "home", "ft")
    write_text(made.config / "mine.py", f"# {TOKEN}\nlr = 1e-4\n")
    write_text(made.data / "小助手.jsonl", f'{{"token": "{TOKEN}"}}\n')
    write_text(made.data / "other.json", "[]\n")
    write_text(made.private / "recipes" / "mine.json", "{}")
    write_text(made.private / "chat" / "talk.json", "{}")
    write_json(made.private / "remote_code.json", {"/x": ["hash"]})
    write_json(made.private / "python.json", {"python": "/evil/python"})
    run = RunDirectory(made.train / "train_1")
    spec = {
        "id": run.id,
        "kind": "train",
        "title": "a",
        "argv": ["/bin/sh", "-c", "true"],
        "cwd": "/",
        "created_at": "2026",
    }
    write_json(run.spec_file, {**spec, "env": {"WANDB_API_KEY": "0123456789abcdef"}})
    me = processes.identify(os.getpid())
    process = me.to_json() if me else None
    write_json(run.state_file, {"phase": "running", "supervisor": process, "process": process, "started_at": 1.0})
    write_json(run.watch_file, {"stop_on": ["nan"], "webhook": "https://hooks.example/secret"})
    write_text(run.metrics_file, '{"iteration": 1, "loss": 0.5}\n')
    write_text(run.log_file, f"token {TOKEN}\nvalue correct-horse-battery\n")
    write_text(run.source / "mine.py", "lr = 1e-4\n")
    write_text(run.path / "iter_1.pth" / "config.json", "{}")
    (run.path / "iter_2.pth").write_bytes(b"weights")
    write_text(made.model / "config.json", "{}")
    (made.config / "out.py").symlink_to("/etc/hostname")
    return made


def _export(project: Project, *data: str, conversations: bool = False) -> Path:
    done = export_project(str(project.root), list(data), has_conversations=conversations, progress=QUIET)
    return Path(done["path"])


def _places(archive: Path) -> set[str]:
    with zipfile.ZipFile(archive) as opened:
        return set(opened.namelist()) - {MANIFEST}


def test_an_archive_holds_no_weights_and_only_the_data_that_was_chosen(project: Project) -> None:
    run = {f"train/train_1/{name}" for name in ("run.json", "state.json", "watch.json", "metrics.jsonl", "train.log")}
    always = {"config/mine.py", ".danlu/recipes/mine.json", "train/train_1/source/mine.py", *run}
    assert _places(_export(project)) == always
    chosen = _export(project, "小助手.jsonl", conversations=True)
    assert _places(chosen) == always | {"data/小助手.jsonl", ".danlu/chat/talk.json"}
    plan = plan_export(project, Choice(("小助手.jsonl",), has_conversations=True))
    assert plan.files == len(_places(chosen))
    assert plan.groups["data"].size_bytes == (project.data / "小助手.jsonl").stat().st_size


def test_secrets_stay_here_and_data_stay_as_they_are(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_PASSWORD", "correct-horse-battery")
    with zipfile.ZipFile(_export(project, "小助手.jsonl")) as archive:
        texts = {place: archive.read(place).decode() for place in archive.namelist()}
    data = texts.pop("data/小助手.jsonl")
    assert data == (project.data / "小助手.jsonl").read_text(encoding="utf-8")
    everything = "".join(texts.values())
    for secret in (TOKEN, "correct-horse-battery", "0123456789abcdef", "hooks.example"):
        assert secret not in everything
    assert json.loads(texts["train/train_1/run.json"])["env"] == {"WANDB_API_KEY": "***"}
    assert json.loads(texts["train/train_1/watch.json"]) == {"stop_on": ["nan"], "webhook": ""}


def test_what_is_no_secret_is_left_alone() -> None:
    line = b'{"eos_token": "</s>", "tokens": 5, "SEED": "7", "key": "sk-1"}'
    assert masker({"HOME": "/root", "X_TOKEN": "short"})(line) == line


def test_the_list_of_hashes_is_true(project: Project) -> None:
    with zipfile.ZipFile(_export(project)) as archive:
        for file in json.loads(archive.read(MANIFEST))["files"]:
            content = archive.read(file["path"])
            assert (len(content), hashlib.sha256(content).hexdigest()) == (file["bytes"], file["sha256"])


def test_a_project_comes_back_as_another_one(project: Project) -> None:
    home = project.root.parent
    archive = _export(project, "小助手.jsonl", conversations=True)
    card = inspect_archive(archive)
    assert (card.name, card.id) == ("ft", read_mark(project)["id"])
    back = Project(Path(import_project(str(archive), str(home), "back", QUIET)["path"]))
    assert (back.data / "小助手.jsonl").read_bytes() == (project.data / "小助手.jsonl").read_bytes()
    assert (back.train / "train_1" / "metrics.jsonl").read_bytes() == RunDirectory(
        project.train / "train_1"
    ).metrics_file.read_bytes()
    assert read_mark(back)["id"] != card.id
    assert read_json(back.private / "imported.json")["id"] == card.id
    assert not list((home / ".danlu" / "importing").iterdir())
    assert not (back.private / "remote_code.json").exists()


def test_an_imported_run_is_to_look_at(project: Project) -> None:
    back = Project(Path(import_project(str(_export(project)), str(project.root.parent), "back", QUIET)["path"]))
    run = RunDirectory(back.train / "train_1")
    assert read_status(RunDirectory(project.train / run.id)).phase is Phase.RUNNING
    assert read_status(run).phase is Phase.LOST
    assert read_json(run.state_file)["process"] is None
    for start in (lambda: go_on(run), lambda: retry(back, run)):
        with pytest.raises(ConflictError) as caught:
            start()
        assert caught.value.code == "runs.imported"


def test_nothing_is_written_over(project: Project) -> None:
    archive = _export(project)
    before = sorted(project.root.rglob("*"))
    for start in (import_project, lambda *a: start_import(project, Path(a[0]), Path(a[1]), a[2])):
        with pytest.raises(ConflictError, match="exists"):
            start(str(archive), str(project.root.parent), "ft", QUIET)
    assert sorted(project.root.rglob("*")) == before


def _forge(target: Path, entries: list[tuple[str | zipfile.ZipInfo, bytes]], **manifest: Any) -> Path:
    """An archive whose list of hashes is right for whatever is in it."""
    named = [(getattr(entry, "filename", entry), content) for entry, content in entries]
    files = [
        {"path": name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()} for name, content in named
    ]
    with zipfile.ZipFile(target, "w") as archive:
        for entry, content in entries:
            archive.writestr(entry, content)
        archive.writestr(MANIFEST, json.dumps({"schema_version": 1, "name": "x", "files": files} | manifest))
    return target


def _link(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    return info


@pytest.mark.parametrize(
    "entry",
    [
        "/etc/passwd", "../x.py", "config/../../x.py", "config/../x.py", "config\\x.py", "C:/x.py", "./config/x.py", "config//x.py",
        "config/", "config/x\n.py", "x.py", ".danlu/python.json", ".danlu/remote_code.json", ".danlu/project.json",
        ".danlu/chat/../python.json", ".danlu/chat/sub/x.json", "model/config.json", "train/a/iter_1.pth", "train/a/.hidden.json",
        "train/a/iter_1.pth/x.json", "data/x.py", "config/x.so", "config/" + "x" * 300 + ".py", _link("config/x.py"),
    ],
    ids=lambda entry: repr(getattr(entry, "filename", entry))[:40],
)  # fmt: skip
def test_what_has_no_place_in_a_project_is_refused_before_anything_is_unpacked(
    tmp_path: Path, entry: str | zipfile.ZipInfo
) -> None:
    archive = _forge(tmp_path / "a.zip", [("config/good.py", b"x = 1\n"), (entry, b"evil")])
    with pytest.raises(InputError) as caught:
        import_project(str(archive), str(tmp_path / "home"), "x", QUIET)
    assert caught.value.code == "archive.unsafe"
    assert not (tmp_path / "home").exists()


@given(st.text(alphabet="./\\ab-\x00é", max_size=12))
def test_no_name_leads_out(name: str) -> None:
    for place in (name, f"config/{name}.py", f"train/a/{name}.json", f".danlu/chat/{name}.json"):
        if group_of(place) is not None:
            assert Path(os.path.normpath(Path("/root") / place)).is_relative_to("/root")
            assert ".." not in Path(place).parts


def test_a_name_that_comes_twice_is_refused(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="Duplicate name"):
        archive = _forge(tmp_path / "a.zip", [("config/a.py", b"1"), ("config/a.py", b"2")])
    with pytest.raises(InputError, match="not_one"):
        inspect_archive(archive)


@pytest.mark.parametrize(
    ("manifest", "code"),
    [
        ({"schema_version": 2}, "files.newer_schema"),
        ({"files": []}, "archive.unsafe"),
        ({"files": [{"path": "config/a.py", "bytes": 2, "sha256": ""}]}, "archive.unsafe"),
        ({"files": [{"path": "config/a.py", "bytes": 1, "sha256": "0" * 64}]}, "archive.damaged"),
        ({"files": "none"}, "archive.not_one"),
        ({"files": [{"path": "config/a.py"}]}, "archive.not_one"),
    ],
)
def test_a_list_of_hashes_that_does_not_fit_is_refused(tmp_path: Path, manifest: dict[str, Any], code: str) -> None:
    archive = _forge(tmp_path / "a.zip", [("config/a.py", b"1")], **manifest)
    with pytest.raises(InputError) as caught:
        import_project(str(archive), str(tmp_path), "x", QUIET)
    assert caught.value.code == code
    assert not (tmp_path / "x").exists()
    assert not list(tmp_path.glob(".danlu/importing/*"))


def test_an_archive_that_would_fill_the_disk_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = _forge(tmp_path / "a.zip", [("data/a.json", b" " * 5000)])
    monkeypatch.setattr("core.archive.unpack.MOST_BYTES", 5000)
    with pytest.raises(InputError, match="too_large"):
        inspect_archive(archive)


def test_a_file_that_lies_about_its_size_is_not_unpacked_further(tmp_path: Path) -> None:
    """The size of the central directory says 3 bytes; the stream holds more."""
    archive = _forge(tmp_path / "a.zip", [("config/a.py", b"abc")])
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as forged:
        forged.writestr("config/a.py", b"a" * 100_000)
        digest = hashlib.sha256(b"a" * 100_000).hexdigest()
        files = [{"path": "config/a.py", "bytes": 3, "sha256": digest}]
        forged.writestr(MANIFEST, json.dumps({"schema_version": 1, "files": files}))
    data = archive.read_bytes()
    archive.write_bytes(data.replace((100_000).to_bytes(4, "little"), (3).to_bytes(4, "little")))
    with pytest.raises(InputError) as caught:
        import_project(str(archive), str(tmp_path), "x", QUIET)
    assert caught.value.code == "archive.damaged"


@pytest.mark.parametrize("content", [b"", b"PK", b"not a zip" * 100, b"PK\x05\x06" + b"\0" * 18])
def test_what_is_no_archive_is_said_to_be_none(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "a.zip"
    file.write_bytes(content)
    with pytest.raises(InputError, match="not_one"):
        inspect_archive(file)
    with pytest.raises(InputError, match="not_one"):
        inspect_archive(tmp_path / "missing.zip")


def test_an_archive_cut_anywhere_is_refused(project: Project, tmp_path: Path) -> None:
    whole = _export(project).read_bytes()
    for length in range(0, len(whole), 97):
        cut = tmp_path / "cut.zip"
        cut.write_bytes(whole[:length])
        with pytest.raises(DanluError):
            import_project(str(cut), str(tmp_path), "x", QUIET)
    assert not (tmp_path / "x").exists()


class _Stopped(SilentProgress):
    def update(self, done: float, total: float | None, message: Message, *, unit: str = "") -> None:
        raise JobError("runs.cancelled")


class _Full(SilentProgress):
    def update(self, done: float, total: float | None, message: Message, *, unit: str = "") -> None:
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize(("progress", "error"), [(_Stopped(), JobError), (_Full(), MachineError)])
def test_a_cancel_or_a_full_disk_leaves_nothing_behind(
    project: Project, progress: SilentProgress, error: type[DanluError]
) -> None:
    archive, home = _export(project), project.root.parent
    with pytest.raises(error):
        export_project(str(project.root), [], has_conversations=False, progress=progress)
    assert list(archive.parent.iterdir()) == [archive]
    with pytest.raises(error):
        import_project(str(archive), str(home), "back", progress)
    assert not (home / "back").exists()
    assert not list((home / ".danlu" / "importing").iterdir())


def test_an_upload_is_kept_under_a_plain_name(project: Project, tmp_path: Path) -> None:
    source = tmp_path / "up"
    source.write_bytes(b"zip")
    for name in ("../../x.zip", "..\\x.zip", ".."):
        with open(source, "rb") as stream:
            kept = keep_upload(project, name, stream)
        assert kept.parent == project.private / "imports"
        assert kept.read_bytes() == b"zip"
