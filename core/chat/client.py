"""Talks to a chat worker, or to any server with OpenAI's API; starts, finds and stops workers. Stdlib only, loads no model."""

import http.client
import json
import socket
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from core.errors import DanluError, InputError, JobError
from core.files import read_json
from core.launchers.local import idle_gpu
from core.models.remote_code import require_allowed
from core.project import Project
from core.runs.control import request_stop
from core.runs.directory import RunDirectory, RunSpec
from core.runs.launch import launch, new_id, now_utc
from core.runs.state import RunStatus, read_status

KIND: Final = "chat"
_APP_ROOT: Final = Path(__file__).parents[2]
_TIMEOUT_SECONDS: Final = 600.0
_REDRAW_SECONDS: Final = 0.1


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a model answers."""

    url: str
    key: str = ""
    model: str = ""
    """Name to ask for; empty: whatever is there."""


@dataclass(frozen=True, slots=True)
class Worker:
    """A chat worker that was started and has not ended. `served` is its endpoint.json once it can answer."""

    run: RunDirectory
    status: RunStatus
    details: Mapping[str, Any]
    served: Mapping[str, Any] | None

    @property
    def name(self) -> str:
        return str(self.details.get("name", ""))

    def endpoint(self) -> Endpoint:
        """Raises JobError `chat.not_ready` while it loads."""
        if self.served is None:
            raise JobError("chat.not_ready", model=self.name)
        key = (self.run.path / "api_key").read_text(encoding="ascii")
        return Endpoint(str(self.served["url"]), key, self.name)

    def target(self) -> "Target | None":
        """To talk to; None while it loads."""
        if self.served is None:
            return None
        longest = int(self.served["max_tokens"])
        return Target(self.endpoint(), bool(self.details.get("adapter")), longest, is_ours=True)


@dataclass(frozen=True, slots=True)
class Target:
    """What a conversation is held with: one of our workers, or a server of another program."""

    endpoint: Endpoint
    has_adapter: bool = False
    """It answers with and without an adapter."""
    max_tokens: int | None = None
    """Longest conversation; None: not known."""
    is_ours: bool = False

    @property
    def name(self) -> str:
        return self.endpoint.model


@dataclass
class Reply:
    """An answer while it streams; `text` grows."""

    text: str = ""
    reason: str | None = None
    """stop, length, cancelled; None while it streams."""
    usage: dict[str, Any] = field(default_factory=dict)
    _socket: socket.socket | None = None
    _cancelled: threading.Event = field(default_factory=threading.Event)

    def cancel(self) -> None:
        """Hang up: the worker stops at once. Safe from any thread and at any time."""
        self._cancelled.set()
        held = self._socket
        if held is not None:
            with suppress(OSError):
                held.shutdown(socket.SHUT_RDWR)


def start_worker(
    project: Project,
    model: Path,
    *,
    name: str = "",
    adapter: Path | None = None,
    prompt_template: Mapping[str, Any] | str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    gpus: Sequence[str] = (),
    idle_seconds: float = 1800.0,
    port: int = 0,
    python: str = sys.executable,
) -> RunDirectory:
    """Start a worker for a model folder and return at once; `find_workers` shows how far it is.

    Raises InputError `chat.no_model` if `model` is no model folder, `models.code_not_allowed` if it needs code that nobody allowed.
    """
    if not (model / "config.json").is_file():
        raise InputError("chat.no_model", path=str(model))
    require_allowed(project, model)
    run = RunDirectory(project.jobs / new_id(KIND, project.jobs))
    spec = RunSpec(
        id=run.id,
        kind=KIND,
        title=name or model.name,
        argv=[python, "-m", "core.chat.worker", str(run.path.absolute())],
        cwd=str(_APP_ROOT),
        env={"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"},
        # A GPU belongs to one run at a time, to a chat too: it waits for training, and training waits for it.
        gpus=list(gpus) or ([gpu] if device != "cpu" and (gpu := idle_gpu()) else []),
        created_at=now_utc(),
        stop_seconds=5.0,
        details={
            "name": name or model.name,
            "model": str(model.absolute()),
            "adapter": str(adapter.absolute()) if adapter else None,
            "prompt_template": dict(prompt_template) if isinstance(prompt_template, Mapping) else prompt_template,
            "device": device,
            "dtype": dtype,
            "idle_seconds": idle_seconds,
            "port": port,
        },
    )
    return launch(project.jobs, spec)


def find_workers(project: Project) -> list[Worker]:
    """Workers of the project that load or serve, oldest first."""
    found = []
    for spec_file in sorted(project.jobs.glob(f"{KIND}_*/run.json")):
        worker = read_worker(RunDirectory(spec_file.parent))
        if worker.status.phase.is_active:
            found.append(worker)
    return found


def read_worker(run: RunDirectory) -> Worker:
    """The worker of `run` as it stands now. Raises InputError if its run.json cannot be read."""
    status = read_status(run)
    served = None
    if status.phase.is_active and (run.path / "endpoint.json").exists():
        try:
            served = read_json(run.path / "endpoint.json")
        except DanluError:
            served = None  # it ended between the two lines
    return Worker(run, status, run.spec().details, served)


def stop_worker(run: RunDirectory) -> None:
    """Ask a worker to end; its memory is free a moment later. One that has ended is left as it is."""
    if read_status(run).phase.is_active:
        request_stop(run, "cancel")


def list_models(endpoint: Endpoint, timeout_seconds: float = 5.0) -> list[str]:
    """Names of the models an endpoint serves. Raises JobError `chat.unreachable`, `chat.refused`."""
    body = _call(endpoint, "GET", "/v1/models", timeout_seconds)
    try:
        return [str(model["id"]) for model in json.loads(body)["data"]]
    except (ValueError, KeyError, TypeError) as error:
        raise JobError("chat.no_api", url=endpoint.url) from error


def read_prompt(
    endpoint: Endpoint, messages: Sequence[Mapping[str, str]], timeout_seconds: float = 5.0
) -> dict[str, Any]:
    """What our worker makes of `messages` (`PromptEncoder.explain`). Raises as `list_models`, and the worker's own DanluError."""
    body = json.dumps({"model": endpoint.model, "messages": list(messages)}).encode()
    value: dict[str, Any] = json.loads(_call(endpoint, "POST", "/prompt", timeout_seconds, body))
    return value


def stream_chat(
    endpoint: Endpoint, messages: Sequence[Mapping[str, str]], settings: Mapping[str, Any], reply: Reply
) -> Iterator[str]:
    """Pieces of the answer as they come; `reply` is filled in place, so what has come survives a stop.

    `settings`: fields of the request (temperature, top_p, max_tokens, …). Raises JobError `chat.unreachable`,
    `chat.refused`, `chat.cut_off` if the server ends in the middle, or the worker's own DanluError.
    """
    connection, path = _connect(endpoint, _TIMEOUT_SECONDS)
    body = {"model": endpoint.model, "messages": list(messages), "stream": True, **settings}
    body["stream_options"] = {"include_usage": True}
    try:
        connection.request("POST", f"{path}/v1/chat/completions", json.dumps(body).encode(), _headers(endpoint))
        # Kept here: the connection lets go of it as soon as it hears that the server will close it.
        reply._socket = connection.sock
        if reply._cancelled.is_set():
            return
        response = connection.getresponse()
        if response.status != http.client.OK:
            _require_ok(response.status, response.read(), endpoint)
        for line in response:
            if reply._cancelled.is_set():
                break
            yield from _take(line, reply, endpoint)
        if reply.reason is None and not reply._cancelled.is_set():
            raise JobError("chat.cut_off", model=endpoint.model, url=endpoint.url)
    except (OSError, http.client.HTTPException) as error:
        if not reply._cancelled.is_set():
            raise JobError("chat.unreachable", url=endpoint.url, reason=str(error)) from error
    finally:
        if reply.reason is None and reply._cancelled.is_set():
            reply.reason = "cancelled"
        connection.close()


def stream_together(
    endpoints: Sequence[Endpoint],
    messages: Sequence[Mapping[str, str]],
    settings: Mapping[str, Any],
    replies: Sequence[Reply],
) -> Iterator[None]:
    """Fill one reply per endpoint at the same time; yields about ten times a second until all have ended.

    Leaving the iteration hangs up. Raises the first error of any endpoint after all have ended.
    """
    errors: list[DanluError] = []

    def follow(endpoint: Endpoint, reply: Reply) -> None:
        try:
            for _ in stream_chat(endpoint, messages, settings, reply):
                pass
        except DanluError as error:
            errors.append(error)
            reply.reason = reply.reason or "error"

    threads = [threading.Thread(target=follow, args=pair, daemon=True) for pair in zip(endpoints, replies, strict=True)]
    try:
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            for thread in threads:
                thread.join(_REDRAW_SECONDS / len(threads))
            yield
    finally:
        for reply in replies:
            reply.cancel()
    if errors:
        raise errors[0]


def _call(endpoint: Endpoint, method: str, place: str, timeout_seconds: float, body: bytes | None = None) -> bytes:
    connection, path = _connect(endpoint, timeout_seconds)
    try:
        connection.request(method, path + place, body, _headers(endpoint))
        response = connection.getresponse()
        answer = response.read()
    except (OSError, http.client.HTTPException) as error:
        raise JobError("chat.unreachable", url=endpoint.url, reason=str(error)) from error
    finally:
        connection.close()
    _require_ok(response.status, answer, endpoint)
    return answer


def _take(line: bytes, reply: Reply, endpoint: Endpoint) -> Iterator[str]:
    """One line of server-sent events."""
    if not line.startswith(b"data:"):
        return
    data = line[5:].strip()
    if data == b"[DONE]":
        return
    value = json.loads(data)
    if "error" in value:
        _require_ok(http.client.INTERNAL_SERVER_ERROR, data, endpoint)
    reply.usage = value.get("usage") or reply.usage
    for choice in value.get("choices", []):
        piece = (choice.get("delta") or {}).get("content")
        if piece:
            reply.text += piece
            yield piece
        reply.reason = choice.get("finish_reason") or reply.reason


def _connect(endpoint: Endpoint, timeout_seconds: float) -> tuple[http.client.HTTPConnection, str]:
    try:
        parts = urlsplit(endpoint.url)
        port = parts.port
    except ValueError as error:
        raise InputError("chat.bad_url", url=endpoint.url) from error
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InputError("chat.bad_url", url=endpoint.url)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    return kind(parts.hostname, port, timeout=timeout_seconds), parts.path.rstrip("/").removesuffix("/v1")


def _headers(endpoint: Endpoint) -> dict[str, str]:
    headers = {"Content-Type": "application/json", "Accept": "text/event-stream, application/json"}
    return {**headers, "Authorization": f"Bearer {endpoint.key}"} if endpoint.key else headers


def _require_ok(status: int, body: bytes, endpoint: Endpoint) -> None:
    if status == http.client.OK:
        return
    try:
        error = json.loads(body)["error"]
        explained, reason = error.get("danlu"), str(error.get("message"))
    except (ValueError, KeyError, TypeError, AttributeError):
        explained, reason = None, body[:500].decode("utf-8", "replace")
    if explained:
        raise DanluError.from_json(explained)
    raise JobError("chat.refused", url=endpoint.url, status=status, reason=reason)
