"""The worker's HTTP face: OpenAI's chat completions, completions and models. Knows requests and JSON, no tensor.

A request ends when its client goes away, at most one decoding step later.
"""

import asyncio
import json
import secrets
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from core.chat.detokenizer import Detokenizer
from core.chat.generation import Answer, Engine
from core.chat.loading import Loaded
from core.chat.sampling import Sampling
from core.errors import DanluError, InputError
from core.i18n import catalog

BASE_SUFFIX: Final = "@base"
"""With an adapter, the model's name with this at its end answers without it."""
_UNSUPPORTED: Final = ("tools", "functions", "logprobs", "response_format", "suffix", "best_of")
_LOCAL_HOSTS: Final = ("127.0.0.1", "localhost", "[::1]")


@dataclass
class Service:
    """A loaded model under a name, and when it was last used."""

    name: str
    loaded: Loaded
    engine: Engine
    key: str
    created_at: int
    used_at: float

    def touch(self) -> None:
        self.used_at = time.monotonic()


@dataclass(frozen=True, slots=True)
class _Job:
    """One answer on its way: text pieces, then (None, reason)."""

    answer: Answer
    pieces: asyncio.Queue[tuple[str | None, str]]


class ApiError(Exception):
    """An error in OpenAI's format."""

    def __init__(self, status: int, kind: str, text: str, code: str | None = None, param: str | None = None) -> None:
        super().__init__(text)
        self.status = status
        self.body = {"error": {"message": text, "type": kind, "param": param, "code": code}}


def make_app(service: Service) -> Starlette:
    """The application that serves `service`."""

    def guarded(handle: Callable[[Service, Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        async def endpoint(request: Request) -> Response:
            try:
                _require_key(service, request)
                return await handle(service, request)
            except ApiError as error:
                return JSONResponse(error.body, error.status)
            except DanluError as error:
                failure = _explained(error)
                return JSONResponse(failure.body, failure.status)

        return endpoint

    async def unknown(request: Request, _: Exception) -> Response:
        error = ApiError(404, "invalid_request_error", f"Unknown request: {request.method} {request.url.path}")
        return JSONResponse(error.body, error.status)

    routes = [
        Route("/health", lambda _: JSONResponse({"status": "ok", "busy": service.engine.is_busy})),
        Route("/v1/models", guarded(_models)),
        Route("/v1/chat/completions", guarded(_chat), methods=["POST"]),
        Route("/v1/completions", guarded(_complete), methods=["POST"]),
        Route("/prompt", guarded(_prompt), methods=["POST"]),
    ]
    return Starlette(routes=routes, exception_handlers={404: unknown, 405: unknown})


def _require_key(service: Service, request: Request) -> None:
    """A browser page of another site can reach loopback too: the key, and the host name against DNS rebinding."""
    host = request.headers.get("host", "").rsplit(":", 1)[0]
    given = request.headers.get("authorization", "").removeprefix("Bearer ")
    if host not in _LOCAL_HOSTS or not secrets.compare_digest(given.encode(), service.key.encode()):
        raise ApiError(401, "authentication_error", "Incorrect API key provided.", "invalid_api_key")


async def _models(service: Service, request: Request) -> Response:
    del request
    names = [service.name, service.name + BASE_SUFFIX] if service.loaded.has_adapter else [service.name]
    data = [{"id": name, "object": "model", "created": service.created_at, "owned_by": "danlu"} for name in names]
    return JSONResponse({"object": "list", "data": data})


async def _chat(service: Service, request: Request) -> Response:
    body = await _read_body(service, request)
    prompt = service.loaded.encoder.encode(_plain_messages(body.get("messages")))
    return await _answer(service, request, body, prompt, "chat")


async def _prompt(service: Service, request: Request) -> Response:
    """How messages are given to the model, and what the tokenizer's own template would make of them. Not part of OpenAI's API."""
    body = await _read_body(service, request)
    return JSONResponse(service.loaded.encoder.explain(_plain_messages(body.get("messages"))))


async def _complete(service: Service, request: Request) -> Response:
    body = await _read_body(service, request)
    text = body.get("prompt")
    if isinstance(text, list) and len(text) == 1:
        text = text[0]
    if not isinstance(text, str) or not text:
        raise ApiError(400, "invalid_request_error", "'prompt' must be one non-empty string.", param="prompt")
    ids = service.loaded.encoder.tokenizer.encode(text, add_special_tokens=True)
    return await _answer(service, request, body, [int(token) for token in ids], "text")


async def _answer(
    service: Service, request: Request, body: Mapping[str, Any], prompt: list[int], kind: Literal["chat", "text"]
) -> Response:
    longest = service.loaded.runner.max_tokens
    if len(prompt) >= longest:
        raise InputError("chat.too_long", tokens=len(prompt), max_tokens=longest)
    named = {**body, "max_tokens": body.get("max_completion_tokens") or body.get("max_tokens")}
    job = _submit(service, Sampling.from_json(named), prompt, is_tuned=not _wants_base(service, body))
    form = _Form(
        kind, str(body.get("model") or service.name), f"{'chatcmpl' if kind == 'chat' else 'cmpl'}-{uuid.uuid4().hex}"
    )
    if body.get("stream"):
        with_usage = bool((body.get("stream_options") or {}).get("include_usage"))
        return _EventStream(_events(job, form, with_usage=with_usage), job.answer, request)
    watch = asyncio.create_task(_cancel_on_disconnect(request, job.answer))
    try:
        text, reason = "", ""
        while not reason:
            piece, end = await job.pieces.get()
            text += piece or ""
            reason = end
        _raise_failure(job.answer, reason)
        return JSONResponse(form.whole(text, reason, _usage(job.answer)))
    finally:
        watch.cancel()
        job.answer.cancel()
        service.touch()


def _submit(service: Service, sampling: Sampling, prompt: list[int], *, is_tuned: bool) -> _Job:
    loop = asyncio.get_running_loop()
    pieces: asyncio.Queue[tuple[str | None, str]] = asyncio.Queue()
    loaded = service.loaded
    text = Detokenizer(loaded.encoder.tokenizer, loaded.hidden_tokens, (*loaded.encoder.stop_words, *sampling.stop))

    def put(piece: str | None, reason: str) -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(pieces.put_nowait, (piece, reason))

    def on_token(token: int) -> None:
        if piece := text.add(token):
            put(piece, "")
        if text.is_stopped:
            answer.cancel()

    def on_end(reason: str) -> None:
        is_stopped = text.is_stopped
        put(text.finish() or None, "stop" if is_stopped else reason)
        service.touch()

    answer = Answer(prompt, sampling, loaded.stop_tokens, on_token, on_end, is_tuned=is_tuned)
    service.touch()
    service.engine.submit(answer)
    return _Job(answer, pieces)


async def _events(job: _Job, form: "_Form", *, with_usage: bool) -> AsyncIterator[str]:
    yield form.chunk({"role": "assistant", "content": ""} if form.kind == "chat" else {"text": ""})
    reason = ""
    while not reason:
        piece, reason = await job.pieces.get()
        if piece:
            yield form.chunk({"content": piece} if form.kind == "chat" else {"text": piece})
    try:
        _raise_failure(job.answer, reason)
    except ApiError as error:
        yield f"data: {json.dumps(error.body)}\n\n"
        return
    yield form.chunk({} if form.kind == "chat" else {"text": ""}, reason)
    if with_usage:
        yield form.usage(_usage(job.answer))
    yield "data: [DONE]\n\n"


class _EventStream(StreamingResponse):
    """Server-sent events that stop the answer as soon as the client is gone, not when the next token is sent."""

    def __init__(self, events: AsyncIterator[str], answer: Answer, request: Request) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"cache-control": "no-cache"})
        self._answer, self._request = answer, request

    async def stream_response(self, send: Any) -> None:
        watch = asyncio.create_task(_cancel_on_disconnect(self._request, self._answer))
        try:
            await super().stream_response(send)
        finally:
            watch.cancel()
            self._answer.cancel()


async def _cancel_on_disconnect(request: Request, answer: Answer) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    answer.cancel()


@dataclass(frozen=True, slots=True)
class _Form:
    """The JSON of one response, whole or in chunks."""

    kind: Literal["chat", "text"]
    model: str
    id: str

    def whole(self, text: str, reason: str, usage: dict[str, Any]) -> dict[str, Any]:
        content: dict[str, Any] = (
            {"message": {"role": "assistant", "content": text}} if self.kind == "chat" else {"text": text}
        )
        choice = {"index": 0, **content, "finish_reason": reason, "logprobs": None}
        name = "chat.completion" if self.kind == "chat" else "text_completion"
        return {**self._head(name), "choices": [choice], "usage": usage}

    def chunk(self, content: dict[str, Any], reason: str | None = None) -> str:
        choice = {"index": 0, **({"delta": content} if self.kind == "chat" else content), "finish_reason": reason}
        return self._line({"choices": [choice]})

    def usage(self, usage: dict[str, Any]) -> str:
        return self._line({"choices": [], "usage": usage})

    def _line(self, value: dict[str, Any]) -> str:
        name = "chat.completion.chunk" if self.kind == "chat" else "text_completion"
        return f"data: {json.dumps({**self._head(name), **value}, ensure_ascii=False)}\n\n"

    def _head(self, name: str) -> dict[str, Any]:
        return {"id": self.id, "object": name, "created": int(time.time()), "model": self.model}


def _usage(answer: Answer) -> dict[str, Any]:
    """OpenAI's counts, and under `timings` what it took."""
    count = answer.count
    rate = (count - 1) / answer.decode_seconds if count > 1 and answer.decode_seconds > 0 else None
    return {
        "prompt_tokens": len(answer.prompt),
        "completion_tokens": count,
        "total_tokens": len(answer.prompt) + count,
        "prompt_tokens_details": {"cached_tokens": answer.cached_tokens},
        "timings": {"first_token_seconds": answer.first_token_seconds, "tokens_per_second": rate},
    }


async def _read_body(service: Service, request: Request) -> dict[str, Any]:
    try:
        body = json.loads(await request.body())
    except ValueError as error:
        raise ApiError(400, "invalid_request_error", f"The request is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise ApiError(400, "invalid_request_error", "The request must be a JSON object.")
    known = (service.name, service.name + BASE_SUFFIX) if service.loaded.has_adapter else (service.name,)
    if body.get("model") not in (None, "", *known):
        raise ApiError(
            404, "invalid_request_error", f"The model {body['model']!r} does not exist.", "model_not_found", "model"
        )
    for name in _UNSUPPORTED:
        if body.get(name):
            raise ApiError(400, "invalid_request_error", f"{name!r} is not supported.", "unsupported_parameter", name)
    if body.get("n") not in (None, 1):
        raise ApiError(400, "invalid_request_error", "Only n=1 is supported.", "unsupported_parameter", "n")
    return body


def _plain_messages(messages: Any) -> Any:
    """Content given as a list of text parts, joined."""
    if not isinstance(messages, list):
        return messages
    plain = []
    for message in messages:
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
            message = {**message, "content": "".join(str(part.get("text", "")) for part in content)}  # noqa: PLW2901
        plain.append(message)
    return plain


def _wants_base(service: Service, body: Mapping[str, Any]) -> bool:
    return service.loaded.has_adapter and str(body.get("model") or "").endswith(BASE_SUFFIX)


def _raise_failure(answer: Answer, reason: str) -> None:
    if reason != "error":
        return
    text = str(answer.error)
    is_memory = isinstance(answer.error, MemoryError) or "out of memory" in text.lower()
    raise ApiError(503 if is_memory else 500, "server_error", text, "out_of_memory" if is_memory else None)


def _explained(error: DanluError) -> ApiError:
    what, next_step = catalog("en").explain(error)
    failure = ApiError(400, "invalid_request_error", f"{what} {next_step}", error.code)
    failure.body["error"]["danlu"] = error.to_json()  # type: ignore[assignment]
    return failure
