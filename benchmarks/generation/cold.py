"""A chat from nothing, as a worker does it: `python -m benchmarks.generation.cold FOLDER DEVICE` loads, answers, prints its times."""

import json
import sys
import time
from pathlib import Path

STARTED = time.perf_counter()


def main(folder: Path, device: str) -> int:
    import torch

    from benchmarks.generation.answers import ask
    from core.chat.generation import Engine
    from core.chat.loading import Source, load_decoder
    from core.runs.job import SilentProgress

    imported = time.perf_counter() - STARTED
    source = Source(
        folder=folder, adapter=None, device=torch.device(device), dtype=torch.bfloat16, slots=8, max_tokens=8192,
        total_bytes=sum(file.stat().st_size for file in folder.glob("*.safetensors")),
    )  # fmt: skip
    runner, engine_name = load_decoder(source, SilentProgress())
    loaded = time.perf_counter() - STARTED
    engine = Engine(runner)
    ask(engine, [[5, 6, 7] * 80], 32)
    answered = time.perf_counter() - STARTED
    engine.close()
    times = {"imported": imported, "loaded": loaded, "answered": answered}
    print(json.dumps({"engine": engine_name, **{key: round(value, 1) for key, value in times.items()}}))
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2]))
