"""Downloads from a hub on loopback that cuts, lies, refuses and waits."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from core.errors import ConflictError, DanluError, InputError, JobError, MachineError
from core.messages import Message
from core.models import download, transfer
from core.models.download import discard, download_model, unfinished_downloads
from core.models.inspect import inspect_model
from core.models.library import find_models, project_models
from core.project import Project, open_project
from core.runs.job import SilentProgress
from core.settings import Settings
from tests.core.models.hub_server import COMMIT, REPO, FakeHub, model_files, reach_loopback, serve
from tests.models import write_tiny_llama

APP_ROOT = Path(__file__).parents[3]
WANTED = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "assets/notes.md"}


class Watched(SilentProgress):
    """Remembers what was said; stops at a given moment."""

    def __init__(self, stop_at_bytes: float = float("inf")) -> None:
        self.said: list[tuple[float, float | None, str]] = []
        self.stop_at_bytes = stop_at_bytes

    def update(self, done: float, total: float | None, message: Message, *, unit: str = "") -> None:
        self.said.append((done, total, message.key))
        if done >= self.stop_at_bytes:
            raise JobError("runs.cancelled")


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return open_project(tmp_path)


@pytest.fixture
def hub(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    reach_loopback(monkeypatch)
    monkeypatch.setattr(transfer, "_WAIT_SECONDS", 0.001)
    with serve(model_files(write_tiny_llama(tmp_path_factory.mktemp("origin") / "tiny"))) as found:
        yield found


def bring(server: FakeHub, project: Project, progress: SilentProgress | None = None, /, **more: str) -> dict[str, Any]:
    arguments = {"hub": "huggingface", "endpoint": server.url, "repo": REPO, "revision": "", **more}
    return download_model(**arguments, target=str(project.model / "tiny"), progress=progress or SilentProgress())


def held(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("name", ["huggingface", "modelscope"])
def test_model_arrives_whole_and_without_clutter(hub: FakeHub, project: Project, name: str):
    progress = Watched()
    result = bring(hub, project, progress, hub=name)
    folder = project.model / "tiny"
    assert held(folder) == {name: data for name, data in hub.files.items() if name in held(folder)}
    assert set(held(folder)) >= WANTED
    assert not set(held(folder)) & {".gitattributes", "model.gguf", "onnx/model.onnx", "pytorch_model.bin"}
    assert inspect_model(folder).problems == ()
    assert (result["path"], result["unverified"]) == (str(folder), [])
    assert result["bytes"] == sum(map(len, held(folder).values()))
    assert [card.name for card in find_models(project, Settings(), {"HF_HOME": "/nowhere"})] == ["tiny"]
    assert unfinished_downloads(project) == []
    assert list(project.model.iterdir()) == [folder]
    done = [done for done, total, _ in progress.said if total]
    assert done == sorted(done)
    assert done[-1] == result["bytes"]


def test_size_is_known_before_a_byte_of_weights_comes(hub: FakeHub):
    from core.models.hubs import open_hub

    listing = open_hub("huggingface", hub.url).listing(REPO)
    assert listing.revision == COMMIT
    assert listing.total_bytes == sum(file.size_bytes for file in listing.files) > 0
    assert listing.left_out_bytes == 999 + 999 + 99 + 1
    assert hub.sent_bytes == 0


def test_connection_that_breaks_goes_on_where_it_was(hub: FakeHub, project: Project, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(transfer, "_CHUNK_BYTES", 1024)
    hub.cut_after_bytes = 20_000
    bring(hub, project)
    assert (project.model / "tiny/model.safetensors").read_bytes() == hub.files["model.safetensors"]
    ranges = [asked for name, asked in hub.downloads() if name == "model.safetensors"]
    assert len(ranges) == -(-len(hub.files["model.safetensors"]) // 20_000)
    assert ranges[0] is None
    assert all(ranges[1:])


def test_server_without_ranges_starts_the_file_again(hub: FakeHub, project: Project, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(transfer, "_CHUNK_BYTES", 1024)
    hub.cut_after_bytes, hub.cuts_left, hub.knows_ranges = 20_000, 2, False
    bring(hub, project)
    assert (project.model / "tiny/model.safetensors").read_bytes() == hub.files["model.safetensors"]


def test_busy_server_is_asked_again(hub: FakeHub, project: Project):
    hub.errors_left = 3
    bring(hub, project)
    assert inspect_model(project.model / "tiny").is_usable


def test_server_that_never_answers_is_given_up_and_what_came_is_kept(hub: FakeHub, project: Project):
    hub.cut_after_bytes = 0
    with pytest.raises(MachineError) as caught:
        bring(hub, project)
    assert caught.value.code == "models.connection_lost"
    assert project_models(project) == []
    assert [item.repo for item in unfinished_downloads(project)] == [REPO]


def test_wrong_bytes_are_fetched_again(hub: FakeHub, project: Project):
    hub.wrong_answers = 1
    bring(hub, project)
    assert inspect_model(project.model / "tiny").is_usable
    first = hub.downloads()[0][0]
    assert [name for name, _ in hub.downloads()].count(first) == 2


@pytest.mark.parametrize("name", ["huggingface", "modelscope"])
def test_wrong_bytes_twice_never_become_a_model(hub: FakeHub, project: Project, name: str):
    hub.wrong_answers = 10**6
    with pytest.raises(MachineError) as caught:
        bring(hub, project, hub=name)
    assert caught.value.code == "models.wrong_bytes"
    assert project_models(project) == []
    assert not (project.model / "tiny").exists()
    hub.wrong_answers = 0
    bring(hub, project, hub=name)
    assert inspect_model(project.model / "tiny").is_usable


def test_bytes_damaged_between_two_attempts_are_noticed(hub: FakeHub, project: Project):
    with pytest.raises(JobError):
        bring(hub, project, Watched(stop_at_bytes=60_000))
    [unfinished] = unfinished_downloads(project)
    whole = next(file for file in (unfinished.path / "files").rglob("*") if not file.name.endswith(".part"))
    whole.write_bytes(bytes(len(whole.read_bytes())))
    download_model(**unfinished.arguments(), progress=SilentProgress())
    assert held(project.model / "tiny").keys() >= WANTED
    assert all(data == hub.files[name] for name, data in held(project.model / "tiny").items())


def test_cancelled_download_goes_on(hub: FakeHub, project: Project, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(transfer, "_CHUNK_BYTES", 1024)
    with pytest.raises(JobError):
        bring(hub, project, Watched(stop_at_bytes=60_000))
    [unfinished] = unfinished_downloads(project)
    assert 60_000 <= unfinished.have_bytes < unfinished.total_bytes
    assert project_models(project) == []
    before = hub.sent_bytes
    progress = Watched()
    download_model(**unfinished.arguments(), progress=progress)
    assert unfinished.total_bytes - unfinished.have_bytes == hub.sent_bytes - before
    assert inspect_model(project.model / "tiny").is_usable


def test_unfinished_download_can_be_thrown_away(hub: FakeHub, project: Project):
    with pytest.raises(JobError):
        bring(hub, project, Watched(stop_at_bytes=1))
    [unfinished] = unfinished_downloads(project)
    with download._locked(unfinished.path), pytest.raises(ConflictError):
        discard(project, unfinished.path)
    discard(project, unfinished.path)
    discard(project, project.data)
    assert list(project.model.iterdir()) == []
    assert project.data.is_dir()


def test_killed_download_goes_on(hub: FakeHub, project: Project):
    """SIGKILL in the middle of the weights: nothing that looks like a model, and only the rest is fetched again."""
    hub.hold_after_bytes = 3 * len(hub.files["model.safetensors"]) // 4
    arguments = {
        "hub": "huggingface",
        "endpoint": hub.url,
        "repo": REPO,
        "revision": "",
        "target": str(project.model / "tiny"),
    }
    program = (
        "import json, sys; from core.models import download, transfer; from core.runs.job import SilentProgress;"
        "transfer._CHUNK_BYTES = 1024; download.download_model(**json.loads(sys.argv[1]), progress=SilentProgress())"
    )
    process = subprocess.Popen([sys.executable, "-c", program, json.dumps(arguments)], cwd=APP_ROOT)
    try:
        deadline = time.monotonic() + 240
        while not (found := unfinished_downloads(project)) or found[0].have_bytes < found[0].total_bytes // 2:
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert project_models(project) == []
    [unfinished] = unfinished_downloads(project)
    part = (unfinished.path / "files/model.safetensors.part").stat().st_size
    hub.hold_after_bytes = None
    hub.go.set()
    hub.requests.clear()
    download_model(**unfinished.arguments(), progress=SilentProgress())
    assert hub.downloads() == [("model.safetensors", f"bytes={part}-")]
    assert inspect_model(project.model / "tiny").is_usable


def test_too_little_space_is_said_first(hub: FakeHub, project: Project, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(download, "SPARE_BYTES", 10**18)
    with pytest.raises(MachineError) as caught:
        bring(hub, project)
    assert caught.value.code == "files.no_space"
    assert hub.sent_bytes == 0


def test_second_download_of_the_same_waits_for_nobody(hub: FakeHub, project: Project):
    from core.models.hubs import open_hub

    listing = open_hub("huggingface", hub.url).listing(REPO)
    staging = download.staging_folder(project.model / "tiny", listing)
    with download._locked(staging), pytest.raises(ConflictError) as caught:
        bring(hub, project)
    assert caught.value.code == "models.download_running"


def test_model_that_is_there_is_not_touched(hub: FakeHub, project: Project):
    (project.model / "tiny").mkdir()
    (project.model / "tiny/mine.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(ConflictError):
        bring(hub, project)
    assert held(project.model / "tiny") == {"mine.txt": b"mine"}


def test_hub_without_hashes_is_told(hub: FakeHub, project: Project):
    hub.has_hashes = False
    result = bring(hub, project, hub="modelscope")
    assert len(result["unverified"]) == len(held(project.model / "tiny"))


REFUSALS = [
    ("huggingface", (401, "GatedRepo"), InputError, "models.hub_gated"),
    ("huggingface", (401, "RepoNotFound"), InputError, "models.hub_not_found"),
    ("huggingface", (500, "x"), MachineError, "models.hub_unreachable"),
    ("modelscope", (404, "x"), InputError, "models.hub_not_found"),
    ("modelscope", (200, "x"), MachineError, "models.hub_said"),
    ("modelscope", (502, "x"), MachineError, "models.hub_unreachable"),
]


@pytest.mark.parametrize(
    ("name", "refusal", "kind", "code"), REFUSALS, ids=[f"{r[0]}_{r[1][0]}_{r[1][1]}" for r in REFUSALS]
)
def test_refusals_say_why(
    hub: FakeHub, project: Project, name: str, refusal: tuple[int, str], kind: type[DanluError], code: str
):
    hub.refuses = refusal
    with pytest.raises(kind) as caught:
        bring(hub, project, hub=name)
    assert caught.value.code == code
    assert list(project.model.iterdir()) == []


@pytest.mark.parametrize(
    ("more", "code"),
    [
        ({"revision": "v9"}, "models.hub_no_revision"),
        ({"repo": "../etc/passwd"}, "models.bad_repo"),
        ({"repo": "tiny"}, "models.bad_repo"),
        ({"hub": "elsewhere"}, "models.unknown_hub"),
        ({"endpoint": "file:///etc"}, "models.bad_endpoint"),
        ({"endpoint": "http://127.0.0.1:9"}, "models.hub_unreachable"),
        ({"endpoint": "http://127.0.0.1:9", "hub": "modelscope"}, "models.hub_unreachable"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_requests_say_why(hub: FakeHub, project: Project, more: dict[str, str], code: str):
    with pytest.raises(DanluError) as caught:
        bring(hub, project, **more)
    assert caught.value.code == code


@pytest.mark.parametrize("name", ["../../evil.json", "/etc/evil.json", "a/../../evil.json", "a\\..\\evil.json"])
def test_names_that_lead_out_are_refused(hub: FakeHub, project: Project, name: str):
    hub.files[name] = b"{}"
    with pytest.raises(InputError) as caught:
        bring(hub, project)
    assert caught.value.code == "models.unsafe_name"
    assert hub.sent_bytes == 0


def test_repository_without_usable_weights_is_refused(hub: FakeHub, project: Project):
    hub.files = {"config.json": b"{}", "model.gguf": b"G"}
    with pytest.raises(InputError) as caught:
        bring(hub, project)
    assert caught.value.code == "models.not_a_model"


def test_token_goes_to_no_mirror(hub: FakeHub, project: Project, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    bring(hub, project)
    assert hub.requests
    assert not any("authorization" in headers for _, _, headers in hub.requests)


def test_offline_is_said(hub: FakeHub, project: Project, monkeypatch: pytest.MonkeyPatch):
    from huggingface_hub import constants
    from huggingface_hub.utils import reset_sessions

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    reset_sessions()
    with pytest.raises(MachineError) as caught:
        bring(hub, project)
    reset_sessions()
    assert caught.value.code == "models.hub_offline"
