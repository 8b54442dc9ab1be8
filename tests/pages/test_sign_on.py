"""Streamlit's own signed cookie is read as Streamlit reads it; a server that is not set up for single sign-on does not start.

The last test plays a whole login against a provider on this machine. It needs Authlib, which only single sign-on needs.
"""

import base64
import hashlib
import http.client
import json
import os
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from http.cookies import SimpleCookie
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

import pytest
from streamlit import config
from streamlit.runtime.secrets import secrets_singleton
from streamlit.web.server.starlette.starlette_app_utils import create_signed_value
from streamlit.web.server.starlette.starlette_server_config import USER_COOKIE_NAME

from core.access import audit
from core.errors import DanluError
from pages.ui import sign_on

ROOT = Path(__file__).parents[2]
SECRET = "s" * 40
AUTH = {
    "redirect_uri": "http://127.0.0.1:6006/oauth2callback",
    "cookie_secret": SECRET,
    "client_id": "danlu",
    "client_secret": "client",
    "server_metadata_url": "http://127.0.0.1/.well-known/openid-configuration",
}


def _toml(auth: dict[str, str]) -> str:
    return "[auth]\n" + "".join(f"{name} = {json.dumps(value)}\n" for name, value in auth.items())


@pytest.fixture
def write_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[dict[str, str]], None]]:
    """Makes `[auth]` of the secrets anew."""
    monkeypatch.setattr(sign_on, "is_authlib_installed", lambda: True)
    file, before = tmp_path / "secrets.toml", config.get_option("secrets.files")

    def write(auth: dict[str, str]) -> None:
        file.write_text(_toml(auth), encoding="utf-8")
        secrets_singleton._reset()

    config.set_option("secrets.files", [str(file)])
    write(AUTH)
    yield write
    config.set_option("secrets.files", before)
    secrets_singleton._reset()


def _signed(value: str, secret: str = SECRET, name: str = USER_COOKIE_NAME) -> str:
    return str(create_signed_value(secret, name, value), "ascii")


def _broken(signed: str) -> str:
    """With another first character of the signature; the last one holds bits that do not count."""
    value, _, signature = signed.rpartition(".")
    return f"{value}.{'B' if signature[0] == 'A' else 'A'}{signature[1:]}"


@pytest.mark.usefixtures("write_secrets")
def test_only_a_cookie_that_this_server_signed_is_read() -> None:
    claims = json.dumps({"email": "ada@example.org"})
    assert sign_on.read_claims({USER_COOKIE_NAME: _signed(claims)}) == {"email": "ada@example.org"}
    forged = base64.urlsafe_b64encode(claims.encode()).decode()
    for value in (
        "", claims, forged, f"{forged}.x.y", _signed(claims, "another secret of forty characters ....."),
        _signed(claims, name="_streamlit_user_tokens"), _broken(_signed(claims)), _signed("[]"), _signed("no json"), "é",
    ):  # fmt: skip
        assert sign_on.read_claims({USER_COOKIE_NAME: value}) is None, value
    assert sign_on.read_claims({}) is None


@pytest.mark.usefixtures("write_secrets")
def test_a_cookie_ends_after_seven_days(monkeypatch: pytest.MonkeyPatch) -> None:
    cookies = {USER_COOKIE_NAME: _signed('{"email": "a"}')}
    now = time.time()
    for days, is_read in ((6.9, True), (7.1, False)):
        monkeypatch.setattr("itsdangerous.timed.time.time", lambda days=days: now + days * 86400)
        assert (sign_on.read_claims(cookies) is not None) is is_read


@pytest.mark.usefixtures("write_secrets")
def test_a_cookie_in_pieces_is_put_together() -> None:
    pieces = {f"{USER_COOKIE_NAME}_1": '{"email": ', f"{USER_COOKIE_NAME}_2": '"ada"}', USER_COOKIE_NAME: "chunks-2"}
    cookies = {name: _signed(value, name=name) for name, value in pieces.items()}
    assert sign_on.read_claims(cookies) == {"email": "ada"}
    del cookies[f"{USER_COOKIE_NAME}_2"]
    assert sign_on.read_claims(cookies) is None


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"cookie_secret": "short"}, "access.short_cookie_secret"),
        ({"redirect_uri": "http://127.0.0.1:6006/"}, "access.no_sign_on"),
        ({"redirect_uri": None}, "access.no_sign_on"),
        ({"client_secret": None}, "access.no_sign_on"),
        ({"client_id": None}, "access.no_sign_on"),
        ({"server_metadata_url": None}, "access.no_sign_on"),
    ],
)
def test_half_a_setup_does_not_start(
    write_secrets: Callable[[dict[str, str]], None], change: dict[str, str | None], code: str
) -> None:
    sign_on.make_sign_on(frozenset({"ada@example.org"}), False)
    write_secrets({name: value for name, value in (AUTH | change).items() if value is not None})
    with pytest.raises(DanluError) as caught:
        sign_on.make_sign_on(frozenset({"ada@example.org"}), False)
    assert caught.value.code == code


@pytest.mark.usefixtures("write_secrets")
def test_without_authlib_it_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sign_on, "is_authlib_installed", lambda: False)
    with pytest.raises(DanluError) as caught:
        sign_on.make_sign_on(frozenset({"ada@example.org"}), False)
    assert caught.value.code == "access.no_authlib"


class Provider:
    """An OpenID provider on this machine: discovery, authorisation (at once, as `email`), token and keys."""

    def __init__(self) -> None:
        from joserfc import jwk

        self.email, self.verified = "ada@example.org", True
        self.key = jwk.RSAKey.generate_key(2048, parameters={"kid": "1", "use": "sig", "alg": "RS256"})
        self.asked: dict[str, dict[str, str]] = {}
        provider = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                provider.get(self)

            def do_POST(self) -> None:
                provider.token(self)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def get(self, request: Any) -> None:
        place = urlsplit(request.path)
        if place.path == "/authorize":
            asked = {name: values[0] for name, values in parse_qs(place.query).items()}
            code = secrets.token_hex(8)
            self.asked[code] = asked
            request.send_response(302)
            query = urlencode({"code": code, "state": asked["state"]})
            request.send_header("Location", f"{asked['redirect_uri']}?{query}")
            request.end_headers()
            return
        keys = {"keys": [self.key.as_dict(private=False)]}
        self._json(request, keys if place.path == "/keys" else self._discovery())

    def token(self, request: Any) -> None:
        from joserfc import jwt

        form = parse_qs(request.rfile.read(int(request.headers["Content-Length"])).decode())
        asked = self.asked.pop(form["code"][0])
        challenge = base64.urlsafe_b64encode(hashlib.sha256(form["code_verifier"][0].encode()).digest()).decode()
        assert challenge.rstrip("=") == asked["code_challenge"]
        now = int(time.time())
        claims = {
            "iss": self.url, "aud": "danlu", "sub": "1", "iat": now, "exp": now + 600, "nonce": asked["nonce"],
            "email": self.email, "email_verified": self.verified,
        }  # fmt: skip
        token = jwt.encode({"alg": "RS256", "kid": "1"}, claims, self.key)
        self._json(request, {"access_token": "a", "token_type": "Bearer", "expires_in": 600, "id_token": token})

    def _discovery(self) -> dict[str, Any]:
        return {
            "issuer": self.url,
            "authorization_endpoint": f"{self.url}/authorize",
            "token_endpoint": f"{self.url}/token",
            "jwks_uri": f"{self.url}/keys",
            "response_types_supported": ["code"],
            "subject_types_supported": ["public"],
            "id_token_signing_alg_values_supported": ["RS256"],
            "code_challenge_methods_supported": ["S256"],
        }

    def _json(self, request: Any, value: Any) -> None:
        body = json.dumps(value).encode()
        request.send_response(200)
        request.send_header("Content-Type", "application/json")
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        request.wfile.write(body)


class Browser:
    """Follows redirects between the app and the provider and keeps the app's cookies."""

    def __init__(self, port: int) -> None:
        self.port, self.cookies = port, dict[str, str]()

    def ask(self, path: str, **headers: str) -> "Reply":
        return self._ask(self.port, path, {"Accept": "text/html", **headers})

    def follow(self, path: str) -> tuple[int, str]:
        """Status and text of where `path` ends."""
        port = self.port
        while True:
            answer = self._ask(port, path, {"Accept": "text/html"})
            if answer.status not in (302, 303, 307):
                return answer.status, answer.text
            place = urlsplit(answer.location)
            port = place.port or port
            path = f"{place.path}?{place.query}" if place.query else place.path

    def websocket(self) -> int:
        headers = {
            "Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13",
            "Sec-WebSocket-Key": base64.b64encode(b"0" * 16).decode(), "Origin": f"http://127.0.0.1:{self.port}",
        }  # fmt: skip
        return self._ask(self.port, "/_stcore/stream", headers).status

    def _ask(self, port: int, path: str, headers: dict[str, str]) -> "Reply":
        if port == self.port and self.cookies:
            headers["Cookie"] = "; ".join(f"{name}={value}" for name, value in self.cookies.items())
        with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=240)) as connection:
            connection.request("GET", path, headers=headers)
            with connection.getresponse() as answer:
                if port == self.port:
                    self._keep(answer.headers.get_all("Set-Cookie") or [])
                text = "" if answer.status == 101 else answer.read().decode()
                return Reply(answer.status, answer.headers["Location"] or "", text)

    def _keep(self, headers: list[str]) -> None:
        for header in headers:
            for name, morsel in SimpleCookie(header).items():
                self.cookies[name] = morsel.value
                if morsel["max-age"] == "0":
                    del self.cookies[name]


@dataclass(frozen=True)
class Reply:
    status: int
    location: str
    text: str


@pytest.fixture
def signed_on(tmp_path: Path) -> Iterator[tuple[Browser, Provider]]:
    from tests.e2e.conftest import Server

    provider, server = Provider(), Server(tmp_path / "home")
    url = f"{server.url}/oauth2callback"
    metadata = f"{provider.url}/.well-known/openid-configuration"
    (tmp_path / "secrets.toml").write_text(_toml({**AUTH, "redirect_uri": url, "server_metadata_url": metadata}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DANLU_OIDC_EMAILS", "ada@example.org")
        patch.setenv("STREAMLIT_SECRETS_FILES", str(tmp_path / "secrets.toml"))
        server.start()
    try:
        yield Browser(server.port), provider
    finally:
        server.kill()
        provider.server.shutdown()
        provider.server.server_close()


def test_a_whole_login(signed_on: tuple[Browser, Provider], tmp_path: Path) -> None:
    browser, provider = signed_on
    assert browser.ask("/monitor").status == 303
    assert browser.ask("/_stcore/host-config", Accept="*/*").status == 401
    assert browser.websocket() == 403
    login = browser.ask("/danlu/login").text.split('href="')[1].split('"')[0]
    provider.email = "eve@example.org"
    status, page = browser.follow(login)
    assert status == 403
    assert "eve@example.org" in page
    assert browser.websocket() == 403
    browser.follow("/auth/logout")
    assert USER_COOKIE_NAME not in browser.cookies
    provider.email, provider.verified = "ada@example.org", False
    assert "danlu/login" in browser.ask("/").location
    assert "Streamlit" not in browser.follow(login)[1]
    provider.verified = True
    status, page = browser.follow(login)
    assert status == 200
    assert "<title>Streamlit</title>" in page
    assert browser.websocket() == 101
    assert [entry.action for entry in audit.read(tmp_path / "home")] == ["login", "login_failed"]
    whole = dict(browser.cookies)
    browser.cookies[USER_COOKIE_NAME] = _broken(whole[USER_COOKIE_NAME])
    assert browser.websocket() == 403
    browser.cookies = whole
    browser.follow("/danlu/logout")
    assert browser.websocket() == 403


def test_a_server_without_its_setup_ends_in_words(tmp_path: Path) -> None:
    environ = {**os.environ, "DANLU_OIDC_EMAILS": "ada@example.org", "LANG": "en", "DANLU_HOME": str(tmp_path)}
    environ["STREAMLIT_SECRETS_FILES"] = str(tmp_path / "none.toml")
    done = subprocess.run(
        [sys.executable, "-c", "from pages.ui import door; door.policy()"], cwd=ROOT, env=environ, capture_output=True,
        text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "Single sign-on" in done.stderr
