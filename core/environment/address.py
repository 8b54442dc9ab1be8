"""Where the app listens and how to reach it from elsewhere: the URL and the SSH tunnel. Stdlib only; opens no page."""

import argparse
import errno
import getpass
import os
import socket
import sys

from core.errors import DanluError, MachineError
from core.i18n import catalog, guess_language

GUIDE_PORT = 6006


def tunnel_command(user: str, host: str, *, ssh_port: int = 22, port: int = GUIDE_PORT) -> str:
    """The line to paste on the person's own machine, as in chapter 1.8 of the guide."""
    line = f"ssh -CNg -L {port}:127.0.0.1:{port} {user}@{host}"
    return line if ssh_port == 22 else f"{line} -p {ssh_port}"


def this_machine() -> tuple[str, str, int]:
    """User, host and SSH port as seen from here; behind an SSH login the address that the login came to."""
    connection = os.environ.get("SSH_CONNECTION", "").split()
    host, ssh_port = (connection[2], int(connection[3])) if len(connection) == 4 else (socket.gethostname(), 22)
    return getpass.getuser(), host, ssh_port


def require_free_port(address: str, port: int) -> None:
    """Raises MachineError if something else listens on `port`, or if `address` is not of this machine."""
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise MachineError("address.port_in_use", port=port, other=port + 1) from error
            raise MachineError("address.cannot_listen", address=address, port=port, reason=str(error)) from error


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m core.environment.address", description=__doc__)
    parser.add_argument("--address", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=GUIDE_PORT)
    arguments = parser.parse_args(argv)
    words = catalog(guess_language(os.environ.get("LANG")))
    try:
        require_free_port(arguments.address, arguments.port)
    except DanluError as error:
        print("\n".join(words.explain(error)), file=sys.stderr)
        return 1
    user, host, ssh_port = this_machine()
    print(words.text("address.url", url=f"http://{arguments.address}:{arguments.port}"))
    print(words.text("address.tunnel", line=tunnel_command(user, host, ssh_port=ssh_port, port=arguments.port)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
