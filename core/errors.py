"""The one tree of errors that core raises.

    DanluError
    ├── InputError          what a person gave cannot be used: a path, a file, a value, a config
    ├── MachineError        the machine or an installed package cannot do it: no space, no GPU, port in use
    ├── ConflictError       it would overwrite, or it is in use by something that is running
    └── JobError            a process that we started failed

Each error carries a code `<area>.<name>`. The locale files hold for each code two sentences:
`<area>.errors.<name>.what` (what happened, where) and `<area>.errors.<name>.next` (what to do now).
A test finds every code raised in core and asks both locales for it.
"""

from collections.abc import Mapping
from typing import Any

from core.messages import Message


class DanluError(Exception):
    """An error meant for a person: a code, what happened, and the next step."""

    def __init__(self, code: str, /, **params: Any) -> None:
        area, _, name = code.partition(".")
        if not name:
            raise ValueError(f"error code must be '<area>.<name>', got {code!r}")
        self.code = code
        self.params: dict[str, Any] = params
        self.what = Message(f"{area}.errors.{name}.what", params)
        self.next = Message(f"{area}.errors.{name}.next", params)
        details = ", ".join(f"{key}={value!r}" for key, value in params.items())
        super().__init__(f"{code} ({details})" if details else code)

    def to_json(self) -> dict[str, Any]:
        return {"type": type(self).__name__, "code": self.code, "params": self.params}

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> "DanluError":
        """Rebuild an error that a job wrote to its `error.json`. Raises TypeError, KeyError or ValueError for what is none."""
        if not isinstance(value, Mapping):
            raise TypeError(type(value).__name__)
        kind = {cls.__name__: cls for cls in _LEAVES}.get(str(value.get("type")), DanluError)
        return kind(str(value["code"]), **dict(value.get("params", {})))


class InputError(DanluError):
    """What a person gave cannot be used."""


class MachineError(DanluError):
    """The machine or an installed package cannot do what is asked."""


class ConflictError(DanluError):
    """It would overwrite something, or something that is running holds it."""


class JobError(DanluError):
    """A process that we started failed."""


_LEAVES = (InputError, MachineError, ConflictError, JobError)
