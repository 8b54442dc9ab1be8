"""Each known cause is recognised by its decisive line; sentences exist for all of them."""

import signal

import pytest

from core.i18n import catalog
from core.runs.failure import _SIGNS, explain_lines
from core.runs.logs import Level, clean, read_tail, select
from core.runs.state import Phase, RunStatus

FAILED = RunStatus(Phase.FAILED, exit_code=1)
LOGS = {
    "cuda_oom": "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.",
    "disk_full": "OSError: [Errno 28] No space left on device",
    "weights_only": "_pickle.UnpicklingError: Weights only load failed. This file can still be loaded",
    "world_size": "The checkpoint being loaded used a DP world size of 2 but the current world size is 1",
    "port_in_use": "RuntimeError: The server socket has failed to listen. EADDRINUSE, Address already in use",
    "missing_module": "ModuleNotFoundError: No module named 'bitsandbytes'",
    "model_files": "OSError: /m does not appear to have a file named config.json.",
    "nan": "FloatingPointError: Loss is nan at iteration 12",
    "empty_data": "ValueError: num_samples should be a positive integer value, but got num_samples=0",
    "missing_column": "KeyError: 'conversation'",
    "bus_error": "RuntimeError: DataLoader worker (pid 7) is killed by signal: Bus error.",
    "nccl": "torch.distributed.DistBackendError: NCCL error in: ProcessGroupNCCL.cpp, unhandled system error",
    "cuda_broken": "RuntimeError: CUDA error: device-side assert triggered",
}


def test_every_sign_has_a_log() -> None:
    assert {cause for cause, _ in _SIGNS} == set(LOGS)


@pytest.mark.parametrize("cause", LOGS)
@pytest.mark.parametrize("language", ["zh", "en"])
def test_cause_by_its_line(cause: str, language: str) -> None:
    noise = ["E1124 torch/distributed/elastic/multiprocessing/api.py: failed (exitcode: 1)", "ChildFailedError:"]
    failure = explain_lines(["loading", '  File "/x/a.py", line 3, in f', LOGS[cause], *noise], FAILED)
    assert failure.cause == cause
    assert LOGS[cause] in failure.evidence
    for part in (failure.what, failure.next):
        said = catalog(language).say(part)
        assert said != part.key
        assert "{" not in said


def test_killed_by_the_oom_killer() -> None:
    status = RunStatus(Phase.FAILED, signal=signal.SIGKILL, oom_kills=1)
    assert explain_lines(["step 3"], status).cause == "oom_killer"
    assert explain_lines(["step 3"], RunStatus(Phase.FAILED, signal=signal.SIGKILL)).cause == "killed"


def test_torchruns_word_for_a_killed_worker() -> None:
    log = ["Root Cause", "  exitcode  : -9 (pid: 81)", "  traceback : Signal 9 (SIGKILL) received by PID 81"]
    assert explain_lines(log, FAILED).cause == "killed"


def test_unknown_traceback_tells_its_last_frame_not_torchruns() -> None:
    log = [
        "[rank0]: Traceback (most recent call last):",
        '[rank0]:   File "/x/train.py", line 3, in main',
        '[rank0]:   File "/x/deep.py", line 42, in inner',
        "[rank0]:     raise ValueError('odd')",
        "[rank0]: ValueError: odd",
        "Traceback (most recent call last):",
        '  File "/site/torch/distributed/run.py", line 1, in main',
        "torch.distributed.elastic.multiprocessing.errors.ChildFailedError:",
    ]
    failure = explain_lines(log, FAILED)
    assert failure.cause == "traceback"
    assert failure.what.params["error"] == "ValueError"
    assert (failure.what.params["file"], failure.what.params["line"]) == ("/x/deep.py", 42)


def test_no_reason_at_all() -> None:
    assert explain_lines(["a", "b"], FAILED).cause == "unknown"
    assert explain_lines([], RunStatus(Phase.FAILED, signal=signal.SIGSEGV)).what.params["signal"] == "SIGSEGV"


def test_log_lines_as_a_terminal_leaves_them() -> None:
    assert clean("\x1b[31mred\x1b[0m\n 10%\r 50%\r100%\n\n") == ["red", "100%"]


def test_log_filter() -> None:
    lines = [
        "step 1",
        "UserWarning: old",
        "Traceback (most recent call last):",
        '  File "a"',
        "ValueError: x",
        "step 2",
    ]
    assert select(lines, level=Level.ERROR) == lines[2:5]
    assert select(lines, level=Level.WARNING) == lines[1:5]
    assert select(lines, "STEP") == ["step 1", "step 2"]


def test_log_tail_begins_with_a_whole_line(tmp_path) -> None:  # type: ignore[no-untyped-def]
    file = tmp_path / "train.log"
    file.write_text("".join(f"line {n}\n" for n in range(1000)), encoding="utf-8")
    tail = read_tail(file, 100)
    assert tail.is_cut
    assert tail.lines[-1] == "line 999"
    assert all(line.startswith("line ") for line in tail.lines)
