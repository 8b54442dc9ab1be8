"""Who has to log in, and what a password looks like at rest."""

import json
import stat
from pathlib import Path

import pytest

from core.access import audit
from core.access.passwords import hash_password, is_password
from core.access.policy import HASH_VARIABLE, PASSWORD_VARIABLE, choose_policy, is_loopback
from core.errors import InputError


@pytest.mark.parametrize("address", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_loopback_is_open(address: str) -> None:
    assert is_loopback(address)
    assert choose_policy(address, {}).is_open


@pytest.mark.parametrize("address", ["0.0.0.0", "", "::", "192.168.1.5", "danlu.example", "127.0.0.1.evil.example"])
def test_any_other_address_needs_a_token(address: str) -> None:
    tokens: list[str] = []
    policy = choose_policy(address, {}, tokens.append)
    assert not policy.is_open
    assert not policy.accepts("")
    assert not policy.accepts("é")
    assert policy.accepts(tokens[0])


@pytest.mark.parametrize("address", ["127.0.0.1", "0.0.0.0"])
def test_a_password_is_asked_for_everywhere(address: str) -> None:
    for environ in (
        {PASSWORD_VARIABLE: "correct horse battery"},
        {HASH_VARIABLE: hash_password("correct horse battery")},
    ):
        policy = choose_policy(address, environ)
        assert policy.accepts("correct horse battery")
        assert not policy.accepts("correct horse batterz")
        assert not policy.accepts("")


def test_hashes_are_salted_and_tell_nothing() -> None:
    first, second = hash_password("correct horse"), hash_password("correct horse")
    assert first != second
    assert "horse" not in first
    assert is_password("correct horse", second)


@pytest.mark.parametrize(
    ("environ", "code"),
    [
        ({PASSWORD_VARIABLE: "short"}, "access.weak_password"),
        ({HASH_VARIABLE: "correct horse battery"}, "access.bad_hash"),
        ({HASH_VARIABLE: "md5$1$1$1$YQ==$YQ=="}, "access.bad_hash"),
        ({HASH_VARIABLE: "scrypt$99999999999$8$1$YQ==$YQ=="}, "access.bad_hash"),
        ({PASSWORD_VARIABLE: "correct horse battery", HASH_VARIABLE: "x"}, "access.two_passwords"),
    ],
)
def test_a_lock_that_cannot_close_is_refused(environ: dict[str, str], code: str) -> None:
    with pytest.raises(InputError) as caught:
        choose_policy("0.0.0.0", environ)
    assert caught.value.code == code


def test_the_audit_log_is_appended_and_private(tmp_path: Path) -> None:
    audit.record(tmp_path, "login", address="10.0.0.1")
    audit.record(tmp_path, "delete", who=audit.system_user(), target="训练")
    file = tmp_path / audit.FILE
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert [line["action"] for line in lines] == ["login", "delete"]
    assert lines[1]["target"] == "训练"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_an_audit_log_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / ".danlu").write_text("a file where the folder should be")
    audit.record(tmp_path, "stop", target="run")
    assert (tmp_path / ".danlu").read_text() == "a file where the folder should be"


def test_the_log_is_read_from_its_end_and_broken_lines_are_passed_over(tmp_path: Path) -> None:
    assert audit.read(tmp_path) == []
    audit.record(tmp_path, "start", who="ada@example.org", project="ft", target="train_1", address="10.0.0.1")
    with open(tmp_path / audit.FILE, "ab") as stream:
        stream.write(b'{"at": 1}\n[1]\nnull\n\xff\xfe\n{"half": ')
    with open(tmp_path / audit.FILE, "ab") as stream:
        stream.write(b"\n")
    audit.record(tmp_path, "stop", target="train_1")
    latest, first = audit.read(tmp_path)
    assert (latest.action, latest.who, latest.target) == ("stop", "", "train_1")
    assert (first.who, first.project, first.address) == ("ada@example.org", "ft", "10.0.0.1")
