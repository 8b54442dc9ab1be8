"""One model in a process of its own: `python -m core.chat.worker RUN_DIR`. Loads it, serves `core.chat.api` on loopback, ends on request.

Writes `endpoint.json` (where and what it serves) and `api_key` (mode 0600) into the run directory once it can answer.
It ends on stop.request, on SIGTERM, after `idle_seconds` without a request, or when it is idle and another run waits for its
card; running out of memory ends only it.
"""

import asyncio
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any, Final

import uvicorn

from core.chat.api import Service, make_app
from core.chat.generation import Engine
from core.chat.keys import KEY_FILE, write_key
from core.chat.loading import Loaded, load
from core.chat.prompt import added_tokens
from core.errors import DanluError, MachineError
from core.files import write_json
from core.i18n import catalog
from core.runs.devices import waiting, wanted
from core.runs.directory import RunDirectory
from core.runs.job import EXIT_EXPLAINED, EXIT_OK, Progress
from core.runs.launch import now_utc

HOST: Final = "127.0.0.1"
ENDPOINT_FILE: Final = "endpoint.json"
_LOOK_SECONDS: Final = 0.1
_IDLE_SECONDS: Final = 1800.0
_YIELD_SECONDS: Final = 3.0
"""A card that another run waits for is given back once nobody has asked anything for this long."""


def serve(run: RunDirectory) -> None:
    """Load and serve until told to end. Raises DanluError if the model cannot be loaded."""
    details = run.spec().details
    _die_first()
    with _listen(int(details.get("port") or 0)) as listener:
        loaded = _load(details, run)
        key = write_key(run.path / KEY_FILE)
        engine = Engine(loaded.runner)
        listener.listen(128)  # before it is announced: who reads endpoint.json may call at once
        name = str(details.get("name") or Path(details["model"]).name)
        service = Service(name, loaded, engine, key, int(time.time()), time.monotonic())
        _announce(run, service, details, listener.getsockname()[1])
        try:
            asyncio.run(_serve(service, run, listener, float(details.get("idle_seconds") or _IDLE_SECONDS)))
        finally:
            (run.path / ENDPOINT_FILE).unlink(missing_ok=True)
            engine.close()


async def _serve(service: Service, run: RunDirectory, listener: socket.socket, idle_seconds: float) -> None:
    config = uvicorn.Config(
        make_app(service), log_level="warning", access_log=False, timeout_graceful_shutdown=1, lifespan="off"
    )
    server = uvicorn.Server(config)
    # uvicorn ends on SIGTERM by itself, but raises the signal again when it is done: the clean-up must still come.
    signal.signal(signal.SIGTERM, lambda *_: None)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    mine = frozenset(wanted(run.spec()))
    while not serving.done():
        idle = 0.0 if service.engine.is_busy else time.monotonic() - service.used_at
        is_in_the_way = idle > _YIELD_SECONDS and any(holder.device in mine for holder in waiting())
        if run.stop_file.exists() or idle > idle_seconds or is_in_the_way:
            service.engine.close()
            server.should_exit = True
            break
        await asyncio.wait([serving], timeout=_LOOK_SECONDS)
    await serving


def _load(details: dict[str, Any], run: RunDirectory) -> Loaded:
    import torch

    try:
        return load(details, Progress(run))
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise MachineError("chat.out_of_memory", model=str(details["model"]), reason=str(error)) from error
    except (RuntimeError, ValueError, KeyError, OSError, ImportError) as error:
        raise MachineError(
            "chat.cannot_load", model=str(details["model"]), reason=f"{type(error).__name__}: {error}"
        ) from error


def _announce(run: RunDirectory, service: Service, details: dict[str, Any], port: int) -> None:
    encoder = service.loaded.encoder
    write_json(
        run.path / ENDPOINT_FILE,
        {
            "url": f"http://{HOST}:{port}",
            "pid": os.getpid(),
            "name": service.name,
            "model": str(details["model"]),
            "adapter": details.get("adapter"),
            "device": service.loaded.device,
            "dtype": service.loaded.dtype,
            "rounding_error": service.loaded.rounding_error,
            "engine": service.loaded.engine,
            "max_tokens": service.loaded.runner.max_tokens,
            "template": (encoder.template.name or "config") if encoder.template else "tokenizer",
            "special_tokens": sorted(added_tokens(encoder.tokenizer)),
            "loaded_at": now_utc(),
        },
    )


def _listen(port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((HOST, port))
    except OSError as error:
        listener.close()
        raise MachineError("chat.port_in_use", port=port) from error
    return listener


def _die_first() -> None:
    """If the machine runs out of memory, the kernel should take this process, not the app or a training run."""
    try:
        Path("/proc/self/oom_score_adj").write_text("800", encoding="ascii")
    except OSError:
        return


def main(argv: list[str]) -> int:
    run = RunDirectory(Path(argv[0]))
    try:
        serve(run)
    except DanluError as error:
        what, next_step = catalog("en").explain(error)
        print(f"{error.code}: {what} {next_step}", file=sys.stderr)
        write_json(run.error_file, error.to_json())
        return EXIT_EXPLAINED
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
