"""Single sign-on: who may come in, and that nothing but the login itself is open to anybody else."""

from collections.abc import Mapping
from typing import Any

import pytest

from core.access.gate import LOGIN, LOGOUT
from core.access.policy import EMAILS_VARIABLE, PASSWORD_VARIABLE, TRUST_VARIABLE, Policy, choose_policy
from core.access.sign_on import SignOn, read_list
from core.errors import InputError
from tests.core.access.test_gate import Door

ADA = {
    "is_logged_in": True,
    "origin": "http://danlu:6006",
    "email": "Ada@Example.org",
    "email_verified": True,
}
ALLOWED = frozenset({"ada@example.org", "@lab.example.org"})


def _sign_on(claims: Mapping[str, Any] | None, *, trusts: bool = False) -> SignOn:
    """Whoever shows the cookie `id=1` is who `claims` says."""
    return SignOn(
        ALLOWED,
        lambda cookies: claims if cookies.get("id") == "1" else None,
        lambda: "/auth/login?provider=p&x=<y>",
        trusts,
    )


def _door(claims: Mapping[str, Any] | None, *, trusts: bool = False) -> Door:
    return Door(Policy(sign_on=_sign_on(claims, trusts=trusts)))


def test_who_is_on_the_list_comes_in_everywhere() -> None:
    door = _door(ADA)
    assert door.ask("/chat", cookie="a=b; id=1").body == b"inside"
    assert door.ask("/_stcore/stream", kind="websocket", cookie="id=1").status == 101
    assert door.ask("/_stcore/upload_file/a/b", method="PUT", cookie="id=1").body == b"inside"
    assert door.events == [("login", "10.0.0.1", "ada@example.org")]
    door.ask("/", cookie="id=1", client="10.0.0.2")
    assert len(door.events) == 2


@pytest.mark.parametrize(
    "change",
    [
        {"email": "eve@example.org"},
        {"email": "ada@example.org.evil.example"},
        {"email": "ada@example.org@evil.example"},
        {"email": "eve@sub.lab.example.org"},
        {"email": "@lab.example.org"},
        {"email": None},
        {"email": ["ada@example.org"]},
        {"email": ""},
        {"email_verified": False},
        {"email_verified": "true"},
        {"email_verified": None},
        {"is_logged_in": False},
        {"is_logged_in": "yes"},
        {"origin": "http://other:6006"},
        {"origin": None},
    ],
)
def test_anybody_else_stays_outside(change: dict[str, Any]) -> None:
    door = _door({**ADA, **change})
    answer = door.ask("/chat", cookie="id=1")
    assert answer.status == 303
    assert answer.headers["location"].startswith(LOGIN)
    assert door.ask("/_stcore/stream", kind="websocket", cookie="id=1").status == 403
    assert door.ask("/_stcore/upload_file/a/b", method="PUT", cookie="id=1").status == 401
    assert all(action == "login_failed" for action, _, _ in door.events)


def test_a_provider_of_one_organisation_need_not_say_that_it_verified() -> None:
    unsaid = {name: value for name, value in ADA.items() if name != "email_verified"}
    assert _door(unsaid).ask("/", cookie="id=1").status == 303
    assert _door(unsaid, trusts=True).ask("/", cookie="id=1").body == b"inside"
    assert _door({**ADA, "email_verified": False}, trusts=True).ask("/", cookie="id=1").status == 303


def test_a_whole_domain_may_come_in() -> None:
    assert _door({**ADA, "email": "bob@lab.example.org"}).ask("/", cookie="id=1").body == b"inside"


def test_only_the_login_itself_is_open_and_only_to_read() -> None:
    door = _door(None)
    for path in ("/auth/login", "/auth/logout", "/oauth2callback", "/_stcore/health"):
        assert door.ask(path).body == b"inside"
    for path in ("/auth/login", "/auth/logout", "/oauth2callback"):
        assert door.ask(path, method="POST").status == 401
        assert door.ask(path, kind="websocket").status == 403
    for path in ("/auth", "/auth/", "/auth/login/", "/auth/login/x", "/oauth2callback/..", "/_stcore/host-config", "/"):
        assert door.ask(path).status == 303
        assert door.ask(path, accept="*/*").status == 401


def test_the_page_leads_to_the_provider_and_tells_a_stranger_who_they_are() -> None:
    answer = _door(None).ask(LOGIN)
    assert answer.status == 200
    assert b'href="/auth/login?provider=p&amp;x=&lt;y&gt;"' in answer.body
    answer = _door({**ADA, "email": "<eve>@example.org"}).ask(LOGIN, cookie="id=1", **{"accept-language": "zh-CN"})
    assert answer.status == 403
    assert "&lt;eve&gt;@example.org 不在允许进入的名单中" in answer.body.decode()
    assert b'href="/auth/logout"' in answer.body
    assert _door(ADA).ask(LOGIN, method="POST", body=b"password=x").status == 200
    assert _door(ADA).ask(LOGOUT).headers["location"] == "/auth/logout"


def test_the_list_is_read_strictly() -> None:
    assert read_list(" Ada@Example.org, @lab.example.org ") == ALLOWED
    for text in ("", " ,", "ada", "@", "ada@", "ada@localhost", "a@b@c.org", "ada@example.org;bob@example.org"):
        with pytest.raises(InputError) as caught:
            read_list(text)
        assert caught.value.code == "access.bad_list"


@pytest.mark.parametrize("address", ["127.0.0.1", "0.0.0.0"])
def test_a_list_that_is_set_always_counts(address: str) -> None:
    made: list[tuple[frozenset[str], bool]] = []

    def make(allowed: frozenset[str], trusts: bool) -> SignOn:
        made.append((allowed, trusts))
        return _sign_on(None)

    environ = {EMAILS_VARIABLE: "ada@example.org"}
    assert not choose_policy(address, environ, make_sign_on=make).is_open
    choose_policy(address, environ | {TRUST_VARIABLE: "1"}, make_sign_on=make)
    assert made == [(frozenset({"ada@example.org"}), False), (frozenset({"ada@example.org"}), True)]
    for broken, code in (
        ({EMAILS_VARIABLE: ""}, "access.bad_list"),
        (environ | {PASSWORD_VARIABLE: "correct horse battery"}, "access.two_ways"),
    ):
        with pytest.raises(InputError) as caught:
            choose_policy(address, broken, make_sign_on=make)
        assert caught.value.code == code
    with pytest.raises(InputError, match="no_sign_on"):
        choose_policy(address, environ)
