"""The door, driven as an ASGI server drives it: no framework, no network."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from core.access.gate import COOKIE, LOGIN, LOGOUT, Gate
from core.access.policy import Policy
from core.access.sessions import (
    FAILURES,
    IDLE_SECONDS,
    LONGEST_SECONDS,
    WINDOW_SECONDS,
    Failures,
    Sessions,
    session_name,
)


@dataclass
class Clock:
    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Answer:
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""


class Door:
    """A gate before an application that says `inside`, and a browser's manners."""

    def __init__(self, policy: Policy) -> None:
        self.clock = Clock()
        self.events: list[tuple[str, str, str]] = []
        self.gate = Gate(
            self._inside,
            policy,
            Sessions(self.clock),
            Failures(self.clock),
            lambda *event: self.events.append(event),
        )

    async def _inside(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.accept"})
            return
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"inside"})

    def ask(
        self,
        path: str,
        *,
        method: str = "GET",
        query: str = "",
        body: bytes = b"",
        cookie: str = "",
        kind: str = "http",
        client: str = "10.0.0.1",
        scheme: str = "http",
        **headers: str,
    ) -> Answer:
        named = {"host": "danlu:6006", "accept": "text/html", **headers} | ({"cookie": cookie} if cookie else {})
        scope = {
            "type": kind,
            "path": path,
            "method": method,
            "query_string": query.encode(),
            "headers": [(name.encode(), value.encode()) for name, value in named.items()],
            "client": (client, 1),
            "scheme": scheme,
        }
        answer, sent = Answer(), iter([{"type": "http.request", "body": body, "more_body": False}])

        async def receive() -> Any:
            return next(sent)

        async def send(event: Any) -> None:
            if event["type"] == "http.response.start":
                answer.status = event["status"]
                answer.headers = {name.decode(): value.decode() for name, value in event["headers"]}
            elif event["type"] == "http.response.body":
                answer.body += event["body"]
            else:
                answer.status = {"websocket.accept": 101, "websocket.close": 403}[event["type"]]

        asyncio.run(self.gate(scope, receive, send))
        return answer

    def log_in(self, password: str, **options: Any) -> Answer:
        return self.ask(LOGIN, method="POST", body=f"password={password}".encode(), **options)


def session(answer: Answer) -> str:
    return answer.headers["set-cookie"].split(";")[0]


@pytest.fixture
def tokens() -> list[str]:
    return []


@pytest.fixture
def door(tokens: list[str]) -> Door:
    return Door(Policy(has_token=True, announce=tokens.append))


@pytest.mark.parametrize("path", ["/", "/chat", "/_stcore/host-config", "/media/x.png", "/anything/../chat"])
def test_every_page_asks_for_a_login(door: Door, path: str) -> None:
    answer = door.ask(path, query="run=1")
    assert answer.status == 303
    assert answer.headers["location"] == f"{LOGIN}?next={path}%3Frun%3D1"
    assert b"inside" not in answer.body


def test_uploads_and_websockets_are_refused(door: Door) -> None:
    assert door.ask("/_stcore/upload_file/session/file", method="PUT", body=b"x").status == 401
    assert door.ask("/_stcore/stream", kind="websocket").status == 403
    assert door.ask("/_stcore/health", accept="*/*").body == b"inside"


def test_a_token_lets_in_once_and_a_new_one_is_announced(door: Door, tokens: list[str]) -> None:
    answer = door.log_in(tokens[0], query="next=/monitor%3Frun%3Da")
    assert (answer.status, answer.headers["location"]) == (303, "/monitor?run=a")
    assert "HttpOnly" in answer.headers["set-cookie"]
    assert "Secure" not in answer.headers["set-cookie"]
    assert door.ask("/chat", cookie=session(answer)).body == b"inside"
    assert door.ask("/_stcore/stream", kind="websocket", cookie=f"other=1; {session(answer)}").status == 101
    assert len(tokens) == 2
    assert door.log_in(tokens[0]).status == 403
    assert door.log_in(tokens[1], scheme="https").headers["set-cookie"].endswith("Secure")
    first = session_name(session(answer).removeprefix(f"{COOKIE}="))
    assert door.events[:2] == [("login", "10.0.0.1", first), ("login_failed", "10.0.0.1", "")]
    assert door.events[2][0] == "login"
    assert door.events[2][2] != first


def test_a_forged_cookie_is_no_session(door: Door) -> None:
    for cookie in (f"{COOKIE}=guess", f"{COOKIE}=", 'a="b', "=;=;"):
        assert door.ask("/", cookie=cookie).status == 303


def test_leaving_ends_the_session(door: Door, tokens: list[str]) -> None:
    cookie = session(door.log_in(tokens[0]))
    assert door.ask(LOGOUT, cookie=cookie).status == 303
    assert door.ask("/", cookie=cookie).status == 303


@pytest.mark.parametrize(("seconds", "visits"), [(IDLE_SECONDS + 1, 1), (LONGEST_SECONDS + 1, 20)])
def test_sessions_end_by_silence_and_by_age(door: Door, tokens: list[str], seconds: float, visits: int) -> None:
    cookie = session(door.log_in(tokens[0]))
    for _ in range(visits):
        door.clock.now += seconds / visits
        last = door.ask("/", cookie=cookie)
    assert last.status == 303


def test_guessing_is_slowed_down(door: Door, tokens: list[str]) -> None:
    for _ in range(FAILURES):
        assert door.log_in("guess").status == 403
    answer = door.log_in(tokens[0])
    assert answer.status == 429
    assert int(answer.headers["retry-after"]) > 0
    assert door.log_in("guess", client="10.0.0.2").status == 403
    door.clock.now += WINDOW_SECONDS + 1
    assert door.log_in(tokens[0]).status == 303


def test_guessing_from_many_addresses_is_slowed_down(door: Door) -> None:
    for number in range(FAILURES * 10):
        assert door.log_in("guess", client=f"10.1.0.{number}").status == 403
    assert door.log_in("guess", client="10.2.0.1").status == 429


@pytest.mark.parametrize(
    "target", ["https://evil.example", "//evil.example", "/\\evil.example", "evil", "/a%0d%0ab: c"]
)
def test_the_login_leads_to_this_server_only(door: Door, tokens: list[str], target: str) -> None:
    location = door.log_in(tokens[0], query=f"next={target}").headers["location"]
    assert location.startswith("/")
    assert "evil" not in location
    assert "\r" not in location


def test_a_form_of_another_site_is_refused(door: Door, tokens: list[str]) -> None:
    assert door.log_in(tokens[0], origin="https://evil.example").status == 403
    assert door.log_in(tokens[0], origin="http://danlu:6006").status == 303


def test_a_huge_form_is_not_read_to_its_end(door: Door, tokens: list[str]) -> None:
    assert door.log_in(tokens[0] + "&x=" + "y" * 10_000).status == 403


@pytest.mark.parametrize(("language", "word"), [("zh-CN,zh;q=0.9", "登录"), ("en-GB", "Log in"), ("", "Log in")])
def test_the_form_speaks_the_browsers_language(door: Door, language: str, word: str) -> None:
    answer = door.ask(LOGIN, query='next=/"><script>', **{"accept-language": language})
    assert word in answer.body.decode()
    assert b"<script>" not in answer.body


def test_an_open_policy_leaves_all_to_the_application() -> None:
    door = Door(Policy())
    assert door.ask("/").body == b"inside"
    assert door.ask("/_stcore/stream", kind="websocket").status == 101


def test_the_lifespan_passes(door: Door) -> None:
    seen: list[str] = []

    async def inside(scope: Any, _receive: Callable[[], Any], _send: Callable[[Any], Any]) -> None:
        seen.append(scope["type"])

    asyncio.run(Gate(inside, Policy(has_token=True, announce=lambda _: None))({"type": "lifespan"}, None, None))  # type: ignore[arg-type]
    assert seen == ["lifespan"]
