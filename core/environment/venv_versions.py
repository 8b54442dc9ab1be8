"""Just enough of version ranges to ask whether an installed torch will do, before `packaging` is there. Stdlib only."""

import re
from typing import Final

_CLAUSE: Final = re.compile(r"\s*(>=|<=|==|!=|<|>|~=)\s*([0-9][0-9.]*)(\.\*)?\s*$")


def is_in_range(version: str, clauses: str) -> bool:
    """Whether `version` ("2.11.0+cu130") meets `clauses` (">=2.6,<2.15"). A pre-release or an unknown clause does not."""
    match = re.fullmatch(r"(\d+(?:\.\d+)*)(?:\+[\w.]+)?", version)
    return match is not None and all(_meets(_numbers(match[1]), clause) for clause in clauses.split(","))


def _meets(have: "tuple[int, ...]", clause: str) -> bool:
    match = _CLAUSE.match(clause)
    if match is None:
        return False
    want = _numbers(match[2])
    cut = have[: len(want)] if match[3] else have
    return {
        ">=": have >= want,
        "<=": have <= want,
        "==": cut == want,
        "!=": cut != want,
        "<": have < want,
        ">": have > want,
        "~=": have >= want and have[: len(want) - 1] == want[:-1],
    }[match[1]]


def _numbers(text: str) -> "tuple[int, ...]":
    """The release part without trailing zeros: 2.6 and 2.6.0 are the same version."""
    numbers = [int(part) for part in text.strip(".").split(".")]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)
