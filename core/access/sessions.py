"""Who is logged in, and who tried too often. In memory: a restarted server asks again. Knows no request and no page."""

import hashlib
import secrets
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

IDLE_SECONDS: Final = 12 * 3600.0
LONGEST_SECONDS: Final = 7 * 24 * 3600.0
FAILURES: Final = 5
"""So many wrong logins from one address within the window are allowed; from all addresses together ten times as many."""
WINDOW_SECONDS: Final = 300.0


@dataclass(slots=True)
class _Session:
    started_at: float
    seen_at: float


@dataclass(slots=True)
class Sessions:
    """Logins by an unguessable id. A session ends after 12 hours of silence or 7 days."""

    clock: Callable[[], float] = time.monotonic
    _found: dict[str, _Session] = field(default_factory=dict)

    def start(self) -> str:
        self._forget()
        session_id = secrets.token_urlsafe(32)
        now = self.clock()
        self._found[session_id] = _Session(now, now)
        return session_id

    def is_valid(self, session_id: str | None) -> bool:
        """Whether this session lives; being asked keeps it alive."""
        self._forget()
        session = self._found.get(session_id or "")
        if session is None:
            return False
        session.seen_at = self.clock()
        return True

    def end(self, session_id: str | None) -> None:
        self._found.pop(session_id or "", None)

    def _forget(self) -> None:
        now = self.clock()
        ended = [
            key
            for key, session in self._found.items()
            if now - session.seen_at > IDLE_SECONDS or now - session.started_at > LONGEST_SECONDS
        ]
        for key in ended:
            del self._found[key]


def session_name(session_id: str) -> str:
    """A name for one login, for the audit log: it tells nothing of the cookie."""
    return f"login {hashlib.sha256(session_id.encode()).hexdigest()[:8]}"


@dataclass(slots=True)
class Failures:
    """Wrong logins of the last minutes, by address."""

    clock: Callable[[], float] = time.monotonic
    _times: deque[tuple[float, str]] = field(default_factory=deque)

    def add(self, address: str) -> None:
        self._times.append((self.clock(), address))

    def wait_seconds(self, address: str) -> float:
        """How long this address has to wait before it may try again; 0 if it may."""
        now = self.clock()
        while self._times and now - self._times[0][0] > WINDOW_SECONDS:
            self._times.popleft()
        own = [at for at, who in self._times if who == address]
        for times, most in ((own, FAILURES), ([at for at, _ in self._times], 10 * FAILURES)):
            if len(times) >= most:
                return WINDOW_SECONDS - (now - times[-most])
        return 0.0
