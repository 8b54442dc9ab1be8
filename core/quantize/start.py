"""Starts the quantisation of a delivered model as a supervised job, and says where it will lie."""

from pathlib import Path
from typing import Final

from core.errors import InputError
from core.files import within
from core.launchers.local import idle_gpu
from core.project import Project
from core.quantize.plan import METHODS, require_plan
from core.runs.directory import RunDirectory
from core.runs.launch import start_job

KIND: Final = "quantize"
ROWS: Final = (16, 1024)
"""Fewest and most rows that can be asked for."""
LENGTHS: Final = (256, 512, 1024, 2048)
"""Tokens of a row, at most."""


def quantized_target(project: Project, model: Path, method: str) -> Path:
    """`final_model/<model>-awq`, `final_model/<model>-gptq`."""
    return project.final_model / f"{model.name}-{method}"


def start_quantization(
    project: Project, model: Path, method: str, *, data: Path, rows: int, max_length: int, may_install: bool
) -> RunDirectory:
    """Start `core.quantize.export:export_quantized`, on a GPU if there is one.

    Raises InputError `checkpoints.bad_dtype`, `quantize.bad_rows`, `files.outside`, and those of require_plan.
    """
    if method not in METHODS:
        raise InputError("checkpoints.bad_dtype", dtype=method)
    if not ROWS[0] <= rows <= ROWS[1] or max_length not in LENGTHS:
        raise InputError("quantize.bad_rows", rows=rows, fewest=ROWS[0], most=ROWS[1], length=max_length)
    target = quantized_target(project, model, method)
    source = within(model, project.huggingface, project.final_model)
    require_plan(source, target)
    arguments = {
        "project": str(project.root),
        "model": str(source),
        "target": str(target),
        "method": method,
        "data": str(within(data, project.data)),
        "rows": rows,
        "max_length": max_length,
        "may_install": may_install,
    }
    function = "core.quantize.export:export_quantized"
    gpu = idle_gpu()
    return start_job(project, function, kind=KIND, title=target.name, arguments=arguments, gpus=[gpu] if gpu else [])
