"""Says why a run failed: finds the decisive lines of its log, not its tail. Knows what XTuner, torch and the kernel say."""

import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from core.errors import DanluError
from core.files import read_json
from core.messages import Message, message
from core.runs.directory import RunDirectory
from core.runs.logs import log_file, read_head, read_tail
from core.runs.state import Phase, RunStatus, read_attempt, read_status

_EVIDENCE_LINES: Final = 12
_SEARCHED_BYTES: Final = 4 * 2**20


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a run ended as it did."""

    cause: str
    """`cuda_oom`, `oom_killer`, `disk_full`, …, `traceback`, `signal` or `unknown`."""
    what: Message
    next: Message
    evidence: list[str]
    """The decisive lines of the log, in their order."""


# The order is that of certainty: what can be a consequence of something above stands below it.
_SIGNS: Final[Sequence[tuple[str, str]]] = (
    ("cuda_oom", r"CUDA out of memory|torch\.(?:cuda\.)?OutOfMemoryError|CUBLAS_STATUS_ALLOC_FAILED"),
    ("disk_full", r"No space left on device|Disk quota exceeded|PytorchStreamWriter failed|unexpected pos \d+ vs"),
    ("weights_only", r"Weights only load failed|weights_only.*(?:UnpicklingError|Unpickl)|UnpicklingError.*[Ww]eights"),
    ("world_size", r"world size.{0,80}(?:mismatch|different|changed)|(?:DP|data parallel) world size|dp world size"),
    ("port_in_use", r"EADDRINUSE|[Aa]ddress already in use"),
    ("missing_module", r"(?:ModuleNotFoundError|ImportError): (?P<detail>.+)"),
    ("model_files", r"(?:OSError|EnvironmentError): (?P<detail>.*(?:config\.json|safetensors|pytorch_model\.bin|tokenizer).*)"),
    ("nan", r"[Ll]oss (?:is |became |: *)(?:nan|inf)\b|FloatingPointError: (?P<detail>.+)"),
    ("empty_data", r"AssertionError.*(?:dataset|empty|num_samples)|num_samples=0|Dataset is empty|IndexError: Invalid key: 0"),
    ("missing_column", r"KeyError: ['\"]?(?P<detail>(?:conversation|messages|input|output|instruction|system|text|role|content)s?)\b"),
    ("bus_error", r"Bus error|insufficient shared memory|\(SIGBUS\)|/dev/shm"),
    ("nccl", r"NCCL (?:error|WARN|timeout)|ncclSystemError|ncclUnhandledCudaError|Watchdog caught collective"),
    ("cuda_broken", r"CUDA error: (?P<detail>.+)|CUDA driver version is insufficient|no kernel image is available"),
)  # fmt: skip
_LAST_FRAME: Final = re.compile(r'^(?:\[rank\d+\]: ?)?\s*File "(?P<file>[^"]+)", line (?P<line>\d+)')
_EXCEPTION: Final = re.compile(
    r"^(?:\[rank\d+\]: ?)?(?P<name>[A-Za-z_][\w.]*(?:Error|Exception|Interrupt|Exit))(?:: (?P<text>.*))?$"
)
_NOISE: Final = ("ChildFailedError", "torch.distributed.elastic", "SignalException")
"""What torchrun says after a worker died: never the cause."""


def explain_failure(run: RunDirectory, status: RunStatus | None = None) -> Failure | None:
    """Why `run` failed or was lost; None if it did neither."""
    status = status or read_status(run)
    if status.phase is Phase.LOST:
        return _failure("lost", read_tail(log_file(run)).lines[-3:])
    if status.phase is not Phase.FAILED:
        return None
    explained = _explained_by_job(run)
    if explained:
        return explained
    path = log_file(run)
    # A run that went on in its own folder: what an earlier attempt said is no cause of this end.
    first_byte = int(read_attempt(run).get("log_offset") or 0)
    lines = read_tail(path, _SEARCHED_BYTES, first_byte).lines or read_head(path)
    return explain_lines(lines, status)


def explain_lines(lines: list[str], status: RunStatus) -> Failure:
    """The cause that the log and the way the process ended speak for."""
    for cause, pattern in _SIGNS:
        expression = re.compile(pattern)
        for number, line in enumerate(lines):
            if found := expression.search(line):
                detail = (found.groupdict().get("detail") or "").strip()[:200]
                return _failure(cause, _around(lines, number), detail=detail)
    killed = [line for line in lines if "SIGKILL" in line or "exitcode: -9" in line or "exitcode  : -9" in line]
    if status.signal == signal.SIGKILL or killed or (status.oom_kills and status.exit_code != 0):
        cause = "oom_killer" if status.oom_kills else "killed"
        return _failure(cause, killed[:3] or lines[-3:], count=status.oom_kills)
    traceback = _last_traceback(lines)
    if traceback:
        return traceback
    if status.signal is not None:
        return _failure("signal", lines[-3:], signal=_signal_name(status.signal))
    return _failure("unknown", lines[-5:], code=status.exit_code)


def _explained_by_job(run: RunDirectory) -> Failure | None:
    try:
        error = DanluError.from_json(read_json(run.error_file))
    except (DanluError, KeyError, TypeError, ValueError):
        return None
    return Failure("explained", error.what, error.next, [])


def _last_traceback(lines: list[str]) -> Failure | None:
    """The first exception that is not torchrun's own, and the last frame above it."""
    for number, line in enumerate(lines):
        found = _EXCEPTION.match(line)
        if not found or found["name"].split(".")[-1] in _NOISE or any(noise in line for noise in _NOISE):
            continue
        frames = [frame for above in lines[:number] if (frame := _LAST_FRAME.match(above))]
        if not frames:
            continue
        last = frames[-1]
        return _failure(
            "traceback",
            _around(lines, number),
            error=found["name"].split(".")[-1],
            text=(found["text"] or "")[:300],
            file=last["file"],
            line=int(last["line"]),
        )
    return None


def _around(lines: list[str], number: int) -> list[str]:
    """The decisive line, with the frame that raised it above and what explains it below."""
    first = number
    while first > 0 and number - first < 3 and lines[first - 1].startswith((" ", "[rank")):
        first -= 1
    return [line[:500] for line in lines[first : min(number + 3, first + _EVIDENCE_LINES)]]


def _failure(cause: str, evidence: list[str], **params: object) -> Failure:
    area = f"runs.failures.{cause}"
    return Failure(cause, message(f"{area}.what", **params), message(f"{area}.next", **params), evidence)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return str(number)
