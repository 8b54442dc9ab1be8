import socket

import pytest

from core.environment.address import main, require_free_port, this_machine, tunnel_command
from core.errors import MachineError


def test_the_tunnel_line_is_the_guides() -> None:
    line = tunnel_command("root", "ssh.intern-ai.org.cn", ssh_port=35000)
    assert line == "ssh -CNg -L 6006:127.0.0.1:6006 root@ssh.intern-ai.org.cn -p 35000"
    assert tunnel_command("me", "box", port=8000) == "ssh -CNg -L 8000:127.0.0.1:8000 me@box"


def test_behind_a_login_the_address_is_the_one_that_was_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSH_CONNECTION", "10.0.0.9 51234 10.0.0.5 2222")
    assert this_machine()[1:] == ("10.0.0.5", 2222)


def test_a_port_in_use_is_said_with_another_to_try(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(MachineError, match="port_in_use"):
            require_free_port("127.0.0.1", port)
        assert main(["--port", str(port)]) == 1
    assert str(port) in capsys.readouterr().err


def test_an_address_of_another_machine_is_refused() -> None:
    with pytest.raises(MachineError, match="cannot_listen"):
        require_free_port("192.0.2.1", 6006)
