"""The door before the whole server: without a login no page, no WebSocket, no upload. ASGI middleware; knows no framework.

It stands before Streamlit, so a deep link, the upload endpoint and a hand-made WebSocket meet it as well. Only the health check
and the login form are served without a session.
"""

import asyncio
import html
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final
from urllib.parse import parse_qs, quote, urlsplit

from core.access import sign_on
from core.access.policy import Policy
from core.access.sessions import Failures, Sessions, session_name
from core.i18n import Catalog, catalog, guess_language

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

LOGIN: Final = "/danlu/login"
LOGOUT: Final = "/danlu/logout"
COOKIE: Final = "danlu_session"
_OPEN_PATHS: Final = frozenset({"/_stcore/health", LOGIN})
_FORM_BYTES: Final = 4096
_HEADERS: Final = [
    (b"cache-control", b"no-store"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"same-origin"),
    (b"content-security-policy", b"default-src 'none'; style-src 'unsafe-inline'; form-action 'self'"),
]


class Gate:
    """Wraps the server's ASGI application. `on_event(action, address, who)` hears of logins and failed ones."""

    def __init__(
        self,
        application: Application,
        policy: Policy,
        sessions: Sessions | None = None,
        failures: Failures | None = None,
        on_event: Callable[[str, str, str], None] = lambda _action, _address, _who: None,
    ) -> None:
        self._application = application
        self._policy = policy
        self._sessions = sessions or Sessions()
        self._failures = failures or Failures()
        self._on_event = on_event

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket") or self._policy.is_open:
            await self._application(scope, receive, send)
            return
        path = scope["path"]
        if scope["type"] == "http" and path == LOGIN:
            await (
                self._login(scope, receive, send) if self._policy.sign_on is None else self._sign_on_page(scope, send)
            )
        elif scope["type"] == "http" and path == LOGOUT:
            if self._policy.sign_on is not None:
                await _respond(send, 303, b"", [(b"location", sign_on.LOGOUT.encode())])
                return
            self._sessions.end(_cookies(scope).get(COOKIE))
            await _respond(send, 303, b"", [(b"location", LOGIN.encode()), _set_cookie(scope, "", seconds=0)])
        elif path in _OPEN_PATHS or self._is_known(scope):
            await self._application(scope, receive, send)
        elif scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1008})
        elif scope["method"] == "GET" and "text/html" in _header(scope, b"accept"):
            await _respond(send, 303, b"", [(b"location", f"{LOGIN}?next={quote(_place(scope))}".encode())])
        else:
            await _respond(send, 401, b"Log in first.", [])

    def _is_known(self, scope: Scope) -> bool:
        """Whether this request comes from someone who logged in; with a single sign-on its own three paths are open too, to read."""
        one = self._policy.sign_on
        if one is None:
            return self._sessions.is_valid(_cookies(scope).get(COOKIE))
        if scope["path"] in sign_on.PATHS:
            return bool(scope["type"] == "http" and scope["method"] == "GET")
        email = one.email(_cookies(scope), _header(scope, b"host"))
        is_allowed = one.is_allowed(email)
        address = (scope.get("client") or ("?",))[0]
        if email and one.is_first_time(email, address):
            self._on_event("login" if is_allowed else "login_failed", address, email)
        return is_allowed

    async def _sign_on_page(self, scope: Scope, send: Send) -> None:
        """The way to the provider; for someone who is not on the list, who they are and the way to be somebody else."""
        one = self._policy.sign_on
        assert one is not None
        email = one.email(_cookies(scope), _header(scope, b"host"))
        words = catalog(guess_language(_header(scope, b"accept-language").split(",")[0]))
        said = words.text("access.not_on_list", email=email) if email and not one.is_allowed(email) else None
        page = _page(
            words,
            hint=words.text("access.sign_on_hint"),
            problem=said,
            body=_LINK.format(
                place=html.escape(sign_on.LOGOUT if said else one.login_url()),
                label=html.escape(words.text("access.other_account" if said else "access.sign_on")),
            ),
        )
        await _respond(send, 403 if said else 200, page, [])

    async def _login(self, scope: Scope, receive: Receive, send: Send) -> None:
        target = _local(parse_qs(scope["query_string"].decode("latin-1")).get("next", ["/"])[0])
        address = (scope.get("client") or ("?",))[0]
        if scope["method"] != "POST":
            await _respond(send, 200, self._form(scope, target, None), [])
            return
        wait = self._failures.wait_seconds(address)
        if wait:
            page = self._form(scope, target, "access.wait", minutes=int(wait // 60) + 1)
            await _respond(send, 429, page, [(b"retry-after", str(int(wait) + 1).encode())])
            return
        given = parse_qs((await _body(receive)).decode("utf-8", "replace")).get("password", [""])[0]
        if _is_foreign(scope) or not await asyncio.to_thread(self._policy.accepts, given.strip()):
            self._failures.add(address)
            self._on_event("login_failed", address, "")
            await _respond(send, 403, self._form(scope, target, "access.wrong"), [])
            return
        session = self._sessions.start()
        self._on_event("login", address, session_name(session))
        cookie = _set_cookie(scope, session)
        await _respond(send, 303, b"", [(b"location", target.encode()), cookie])

    def _form(self, scope: Scope, target: str, problem: str | None, **params: Any) -> bytes:
        words = catalog(guess_language(_header(scope, b"accept-language").split(",")[0]))
        key = "token" if self._policy.has_token else "password"
        body = _FORM.format(
            label=html.escape(words.text(f"access.{key}")),
            button=html.escape(words.text("access.enter")),
            action=html.escape(f"{LOGIN}?next={quote(target)}"),
        )
        said = words.text(problem, **params) if problem else None
        return _page(words, hint=words.text(f"access.{key}_hint"), problem=said, body=body)


_PAGE: Final = """<!doctype html><html lang={language}><meta charset=utf-8><meta name=viewport content="width=device-width">
<title>{title}</title><style>
body{{font:16px/1.5 system-ui,sans-serif;background:#f7f4f0;color:#1c1917;display:grid;place-items:center;min-height:95vh;margin:0}}
main{{background:#fff;border:1px solid #e4ddd4;border-radius:8px;padding:2rem;width:min(24rem,85vw)}}
h1{{font-size:1.4rem;margin:0 0 .5rem;color:#9a3412}} input,button{{font:inherit;width:100%;box-sizing:border-box;padding:.6rem;
border-radius:6px;border:1px solid #a8a29e;margin-top:.35rem}} button,a{{background:#c2410c;color:#fff;border:0;margin-top:1rem}}
a{{display:block;text-align:center;text-decoration:none;padding:.6rem;border-radius:6px}} p[role=alert]{{color:#9f1239}}</style>
<main><h1>{title}</h1><p>{hint}</p>{problem}{body}</main></html>"""
_FORM: Final = """<form method=post action="{action}">
<label>{label}<input type=password name=password autocomplete=current-password required autofocus></label>
<button>{button}</button></form>"""
_LINK: Final = """<a href="{place}">{label}</a>"""


def _page(words: Catalog, *, hint: str, problem: str | None, body: str) -> bytes:
    """A whole page; `body` is HTML, the rest is text."""
    return _PAGE.format(
        language=words.language,
        title=html.escape(words.text("access.title")),
        hint=html.escape(hint),
        problem=f"<p role=alert>{html.escape(problem)}</p>" if problem else "",
        body=body,
    ).encode()


def _header(scope: Scope, name: bytes) -> str:
    return b",".join(value for key, value in scope["headers"] if key == name).decode("latin-1")


def _cookies(scope: Scope) -> dict[str, str]:
    """Cookies by name, as browsers send them; one that is odd does not hide the others."""
    pairs = (part.partition("=") for part in _header(scope, b"cookie").replace(",", ";").split(";"))
    return {name.strip(): value.strip().strip('"') for name, _, value in pairs}


def _set_cookie(scope: Scope, value: str, seconds: int | None = None) -> tuple[bytes, bytes]:
    """Without a lifetime the browser forgets it when it closes; the server ends it earlier by itself."""
    parts = [f"{COOKIE}={value}", "Path=/", "HttpOnly", "SameSite=Lax"]
    parts += ["Secure"] if scope["scheme"] == "https" else []
    parts += [f"Max-Age={seconds}"] if seconds is not None else []
    return b"set-cookie", "; ".join(parts).encode()


def _place(scope: Scope) -> str:
    query = scope["query_string"].decode("latin-1")
    return f"{scope['path']}?{query}" if query else str(scope["path"])


def _local(target: str) -> str:
    """The place to go to after the login, if it is one of this server: an open redirect would lend our name to others."""
    parts = urlsplit(target.replace("\\", "/"))
    is_local = not parts.scheme and not parts.netloc and target.startswith("/") and not target.startswith("//")
    return quote(target, safe="/?&=%#:") if is_local and target.isprintable() else "/"


def _is_foreign(scope: Scope) -> bool:
    """A form sent from another site: browsers name their origin on a POST."""
    origin = _header(scope, b"origin")
    return bool(origin) and urlsplit(origin).netloc != _header(scope, b"host")


async def _body(receive: Receive) -> bytes:
    """The form that was sent; nothing of one that is larger than a login can be."""
    body = b""
    while len(body) <= _FORM_BYTES:
        event = await receive()
        body += bytes(event.get("body", b""))
        if event["type"] != "http.request" or not event.get("more_body"):
            return body if len(body) <= _FORM_BYTES else b""
    return b""


async def _respond(send: Send, status: int, body: bytes, headers: list[tuple[bytes, bytes]]) -> None:
    length = (b"content-length", str(len(body)).encode())
    kind = (b"content-type", b"text/html; charset=utf-8")
    await send({"type": "http.response.start", "status": status, "headers": [*headers, *_HEADERS, length, kind]})
    await send({"type": "http.response.body", "body": body})
