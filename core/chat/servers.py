"""Starts another program's server for a model of the project, if one is installed: vLLM or LMDeploy, on loopback, as a supervised run.

Knows their command lines, nothing of how they work; whether one is ready its list of models says (`core.chat.client.list_models`).
`python -m core.chat.servers RUN_DIR` becomes the server: so its key is in a file of mode 0600, and not in run.json.
"""

import importlib.util
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from core.chat.client import Endpoint
from core.chat.keys import KEY_FILE, write_key
from core.errors import InputError, MachineError
from core.launchers.local import idle_gpu
from core.models.remote_code import needs_code, require_allowed
from core.project import Project
from core.runs.directory import RunDirectory, RunSpec
from core.runs.jobs import active_jobs
from core.runs.launch import launch, new_id, now_utc
from core.xtuner.command import free_port

KIND: Final = "server"
_HOST: Final = "127.0.0.1"
_APP_ROOT: Final = Path(__file__).parents[2]
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
_TRUST: Final = "--trust-remote-code"


@dataclass(frozen=True, slots=True)
class Server:
    """A server that was started here and has not ended; it may still be loading."""

    run: RunDirectory
    name: str
    endpoint: Endpoint


def installed_engines() -> list[str]:
    """Packages that can serve, of those installed beside the app. Imports none."""
    return [name for name in _ENGINES if importlib.util.find_spec(name) is not None]


def start_server(
    project: Project, engine: str, model: Path, name: str, *, python: str = sys.executable
) -> tuple[RunDirectory, Endpoint]:
    """Start `engine` for the model folder; the run, and where it will answer once it has loaded.

    Raises InputError `chat.no_model`, `models.code_not_allowed` for code that nobody allowed, MachineError `chat.no_engine`.
    """
    if not (model / "config.json").is_file():
        raise InputError("chat.no_model", path=str(model))
    if engine not in installed_engines():
        raise MachineError("chat.no_engine", engine=engine)
    require_allowed(project, model)
    port = free_port()
    words = {"model": str(model.absolute()), "name": name, "port": str(port)}
    arguments = [argument.format(**words) for argument in _ENGINES[engine]]
    if needs_code(model) and _knows_trust(engine):
        arguments.append(_TRUST)
    run = RunDirectory(project.jobs / new_id(KIND, project.jobs))
    spec = RunSpec(
        id=run.id,
        kind=KIND,
        title=f"{engine} · {name}",
        argv=[python, "-m", "core.chat.servers", str(run.path.absolute())],
        cwd=str(_APP_ROOT),
        env={"HF_HUB_OFFLINE": "1"},
        gpus=[gpu] if (gpu := idle_gpu()) else [],
        created_at=now_utc(),
        stop_seconds=20.0,
        details={"engine": engine, "model": words["model"], "name": name, "url": f"http://{_HOST}:{port}",
                 "arguments": arguments},
    )  # fmt: skip
    run.path.mkdir(parents=True)
    key = write_key(run.path / KEY_FILE)
    return launch(project.jobs, spec), Endpoint(str(spec.details["url"]), key, name)


def find_servers(project: Project) -> list[Server]:
    """Servers of the project that load or serve, the latest first."""
    found = []
    for run in active_jobs(project, (KIND,)):
        details, key = run.spec().details, run.path / KEY_FILE
        if key.is_file():
            endpoint = Endpoint(str(details["url"]), key.read_text(encoding="ascii"), str(details["name"]))
            found.append(Server(run, str(details["name"]), endpoint))
    return found


def _knows_trust(engine: str) -> bool:
    """vLLM runs a model's own code only on request; so does LMDeploy since its pull request 4511, and before it knew no such word."""
    if engine == "vllm":
        return True
    spec = importlib.util.find_spec(engine)
    places = list(spec.submodule_search_locations or []) if spec else []
    files = [Path(place) / "cli" / "serve.py" for place in places]
    return any("trust_remote_code" in file.read_text(encoding="utf-8") for file in files if file.is_file())


def main(argv: list[str]) -> None:
    """Become the server that run.json describes, in the run's folder."""
    run = RunDirectory(Path(argv[0]))
    details = run.spec().details
    key = (run.path / KEY_FILE).read_text(encoding="ascii")
    arguments, environment = list(details["arguments"]), dict(os.environ)
    if details["engine"] == "vllm":
        environment["VLLM_API_KEY"] = key
    else:  # LMDeploy takes it in no other way
        arguments += ["--api-keys", key]
    os.chdir(run.path)
    os.execve(sys.executable, [sys.executable, *arguments], environment)  # noqa: S606 - a list of our own, no shell


if __name__ == "__main__":
    main(sys.argv[1:])
