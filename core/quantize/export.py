"""Model folder → the same model with 4-bit weights, by AWQ or GPTQ, as compressed-tensors writes it and vLLM and LMDeploy serve it.

The work is llm-compressor's, in an environment of its own; here are the way there, the check and the folder.
"""

import json
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any, Final

from core.checkpoints.companions import DESCRIPTION, copy_companions, describe, set_config
from core.checkpoints.staging import stage
from core.environment.known_good import APP_ROOT
from core.errors import DanluError, InputError, JobError, MachineError
from core.files import read_json, write_json
from core.messages import Message, message
from core.project import Project
from core.quantize.calibration import Calibration, collect
from core.quantize.check import check_quantized
from core.quantize.environment import Environment, in_use, prepare
from core.quantize.plan import METHODS, require_plan
from core.runs.child import follow, is_drawing
from core.runs.job import Progress

WORKER: Final = "core.quantize.worker"
_SETTINGS: Final = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
"""It needs nothing that is not here."""
_LAYER: Final = re.compile(r"^\((\d+)/(\d+)\): ")
"""How llm-compressor's progress bars begin: this part of the model, of so many."""
_KILLED: Final = -9
_TAIL_LINES: Final = 6


def export_quantized(
    project: str,
    model: str,
    target: str,
    *,
    method: str,
    data: str,
    rows: int,
    max_length: int,
    may_install: bool,
    progress: Progress,
) -> dict[str, Any]:
    """Write the model folder `target`. A job function. `method`: one of METHODS. `data`: a data set of the project, of which at most `rows`
    rows of at most `max_length` tokens are used. `may_install`: a person agreed that the environment be built.

    Returns {"path", "size_bytes", …} with the figures of danlu.json's `quantized`. Raises those of `require_plan`, `prepare`, `collect` and
    `check_quantized`; JobError `quantize.failed`, MachineError `quantize.killed`.
    """
    if method not in METHODS:
        raise InputError("checkpoints.bad_dtype", dtype=method)
    source, folder = Path(model), Path(target)
    plan = require_plan(source, folder)
    described = _described(source)
    options = {"rows": rows, "max_length": max_length}
    calibration = collect(Project(Path(project)), Path(data), source, described, progress=progress, **options)
    environment = prepare(progress, may_install=may_install)
    with (
        in_use(environment),
        tempfile.TemporaryDirectory() as scratch,
        stage(folder, {method: str(source), "at": source.stat().st_mtime, "data": data, **options}) as part,
    ):
        chosen = {"method": method, "group_size": plan.group_size, "dtype": plan.dtype}
        spec = {"model": str(source), "target": str(part), **chosen}
        found = _run_worker(environment, Path(scratch), spec, calibration, progress)
        settings = read_json(part / "config.json")["quantization_config"]
        (part / "recipe.yaml").unlink(missing_ok=True)
        copy_companions(source, part)
        set_config(part, {"quantization_config": settings})
        for file in part.glob("*.safetensors"):
            shutil.copymode(part / "config.json", file)
        figures = {
            "method": method,
            "bits": 4,
            "group_size": plan.group_size,
            "data": Path(data).name,
            "rows": len(calibration.rows),
            "tokens": calibration.tokens,
            "max_length": max_length,
            "held_out_rows": len(calibration.held_out),
            "template": calibration.template,
            **found,
            **check_quantized(source, part, is_scaled=method == "awq", progress=progress),
        }
        keys = ("run", "checkpoint", "base_model", "prompt_template", "system")
        details = {"source": str(source), "quantized": figures}
        describe(part, kind=method, dtype="W4A16", details=details, **{key: described.get(key) for key in keys})
        size_bytes = sum(file.stat().st_size for file in part.iterdir())
    return {"path": str(folder), "size_bytes": size_bytes, **figures}


def _run_worker(
    environment: Environment, scratch: Path, spec: dict[str, Any], calibration: Calibration, progress: Progress
) -> dict[str, Any]:
    """What the worker wrote as its result. Raises JobError `quantize.failed`, MachineError `quantize.killed`."""
    rows, result, order = (scratch / name for name in ("rows.json", "result.json", "spec.json"))
    write_json(rows, {"calibration": calibration.packed(), "held_out": calibration.held_out})
    write_json(order, {**spec, "rows": str(rows), "result": str(result)})
    lines = _Lines()
    variables = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    command = [str(environment.python), "-m", WORKER, str(order)]
    code = follow(command, lines.read, lambda: lines.report(progress), cwd=APP_ROOT, env={**variables, **_SETTINGS})
    if code == _KILLED:
        raise MachineError("quantize.killed")
    if code:
        raise JobError("quantize.failed", code=code, reason=lines.tail)
    found: dict[str, Any] = read_json(result)
    return found


class _Lines:
    """What the worker prints: its phases, llm-compressor's progress bars, and the end of it should it fail."""

    def __init__(self) -> None:
        self._said: Message = message("quantize.progress.loading")
        self._done: float = 0.0
        self._total: float | None = None
        self._last: list[str] = []

    @property
    def tail(self) -> str:
        return "\n".join(self._last)

    def read(self, line: str) -> None:
        if not is_drawing(line):
            self._last = [*self._last, line.strip()[:300]][-_TAIL_LINES:]
        if line.startswith('{"phase"'):
            self._said = message(f"quantize.progress.{json.loads(line)['phase']}")
            self._done, self._total = 0.0, None
        elif found := _LAYER.match(line):
            self._done, self._total = float(found[1]) - 1, float(found[2])

    def report(self, progress: Progress) -> None:
        progress.update(self._done, self._total, self._said, unit="layers")


def _described(folder: Path) -> dict[str, Any]:
    """danlu.json; empty for a model made elsewhere."""
    try:
        value = read_json(folder / DESCRIPTION)
    except DanluError:
        return {}
    return value if isinstance(value, dict) else {}
