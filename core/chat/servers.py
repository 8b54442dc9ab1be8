"""Starts another program's server for a model of the project, if one is installed: vLLM or LMDeploy, on loopback, as a supervised run.

Knows their command lines, nothing of how they work; whether one is ready its list of models says (`core.chat.client.list_models`).
"""

import importlib.util
import sys
from pathlib import Path
from typing import Final

from core.errors import InputError, MachineError
from core.launchers.local import idle_gpu
from core.project import Project
from core.runs.directory import RunDirectory, RunSpec
from core.runs.launch import launch, new_id, now_utc
from core.xtuner.command import free_port

KIND: Final = "server"
_HOST: Final = "127.0.0.1"
_ENGINES: Final[dict[str, tuple[str, ...]]] = {
    "vllm": (
        "-m", "vllm.entrypoints.openai.api_server", "--model", "{model}", "--served-model-name", "{name}",
        "--host", _HOST, "--port", "{port}",
    ),
    "lmdeploy": (
        "-m", "lmdeploy", "serve", "api_server", "{model}", "--model-name", "{name}",
        "--server-name", _HOST, "--server-port", "{port}",
    ),
}  # fmt: skip
"""Package → arguments of the Python that has it. docs.vllm.ai "OpenAI-compatible server", lmdeploy.readthedocs.io "api_server"."""


def installed_engines() -> list[str]:
    """Packages that can serve, of those installed beside the app. Imports none."""
    return [name for name in _ENGINES if importlib.util.find_spec(name) is not None]


def start_server(
    project: Project, engine: str, model: Path, name: str, *, python: str = sys.executable
) -> tuple[RunDirectory, str]:
    """Start `engine` for the model folder; the run, and the address at which it will answer once it has loaded.

    Raises InputError `chat.no_model`, MachineError `chat.no_engine`.
    """
    if not (model / "config.json").is_file():
        raise InputError("chat.no_model", path=str(model))
    if engine not in installed_engines():
        raise MachineError("chat.no_engine", engine=engine)
    port = free_port()
    words = {"model": str(model.absolute()), "name": name, "port": str(port)}
    run = RunDirectory(project.jobs / new_id(KIND, project.jobs))
    spec = RunSpec(
        id=run.id,
        kind=KIND,
        title=f"{engine} · {name}",
        argv=[python, *(argument.format(**words) for argument in _ENGINES[engine])],
        cwd=str(run.path.absolute()),
        env={"HF_HUB_OFFLINE": "1"},
        gpus=[gpu] if (gpu := idle_gpu()) else [],
        created_at=now_utc(),
        stop_seconds=20.0,
        details={"engine": engine, "model": words["model"], "name": name, "url": f"http://{_HOST}:{port}"},
    )
    return launch(project.jobs, spec), str(spec.details["url"])
