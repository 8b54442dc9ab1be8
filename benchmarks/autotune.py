"""The search for the fastest setting, as the launch page's button starts it: what it finds for LoRA on this card, and what it takes.

InternLM2-1.8B's shape with random weights, r = 64, effective batch 16 × 2048; `python -m benchmarks.autotune tiny` runs a small one
on the CPU.
"""

import json
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.result import NoGpu, Result
from benchmarks.training.case import Case, config_source, make_model_folder
from benchmarks.training.ranks import SAVE_MODEL, in_child
from core.files import write_text
from core.gpu import devices
from core.project import create_project
from core.runs.autotune import measure
from core.runs.job import SilentProgress


def run() -> Result:
    """Raises NoGpu without a GPU."""
    cards = devices()
    if not cards:
        raise NoGpu("needs an NVIDIA GPU")
    return tuned("1.8b", cards[0].uuid)


def tuned(shape: str, gpu: str | None) -> Result:
    """Each setting's figures go to stderr; gpu None: on the CPU."""
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        model = make_model_folder(shape, home / "model")
        in_child(SAVE_MODEL, str(model))  # trials read weights, as a run does
        case = Case(side="stock", shape=shape, windows=10, length=64 if shape == "tiny" else 2048)
        text = config_source(case, model, home).replace("type=random_llm", "type=AutoModelForCausalLM.from_pretrained")
        text = text.replace("launcher = 'pytorch'", "launcher = 'none'")
        config = home / "lora.py"
        write_text(config, text)
        project = create_project(home, "project")
        began = time.perf_counter()
        table = measure(str(project.root), str(config), gpu, sys.executable, SilentProgress())
        seconds = time.perf_counter() - began
    rows = table["rows"]
    for row in rows:
        print(json.dumps(row), file=sys.stderr, flush=True)
    rates = [row["tokens_per_second"] for row in rows]
    known = [rate for rate in rates if rate]
    figures: dict[str, float | int | str | None] = {
        "card": next((device.name for device in devices()), "cpu"),
        "settings": len(rows),
        "failed": rates.count(None),
        "measured_seconds": round(sum(row["measured_seconds"] for row in rows), 1),
        "seconds": round(seconds, 1),
        "as_configured_tokens_per_second": round(rates[0]) if rates[0] else None,
        "fastest_tokens_per_second": round(max(known)) if known else None,
        "gain": round(max(known) / rates[0], 2) if rates[0] else None,
    }
    return Result(figures, {"measured_seconds": ("<", 90.0), "gain": (">=", 1.0)})


if __name__ == "__main__":
    found = tuned(sys.argv[1], None)
    print(json.dumps({"figures": found.figures, "missed": found.missed}))
    sys.exit(0 if found.ok else 1)
