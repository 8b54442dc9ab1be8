"""Stands in for `core.quantize.worker` where llm-compressor is not: same order, same lines, same folder; rounds to the nearest."""

import json
import sys
import time
from pathlib import Path

from tests.core.quantize.packed import write_packed


def main(order: Path) -> None:
    spec = json.loads(order.read_text())
    rows = json.loads(Path(spec["rows"]).read_text())
    print('{"phase": "loading"}', flush=True)
    print('{"phase": "quantising"}', flush=True)
    print("(2/3): Calibrating:  50%|#####     | 1/2 [00:00<00:00,  8.24it/s]", flush=True)
    if Path(spec["model"]).name == "endless":
        while True:
            time.sleep(0.05)
    if Path(spec["model"]).name == "broken":
        sys.exit("RuntimeError: something is wrong in there")
    write_packed(Path(spec["model"]), Path(spec["target"]))
    (Path(spec["target"]) / "recipe.yaml").write_text("{}")
    (order.parent / "given").write_text(json.dumps(rows))
    found = {"loss_before": 1.0, "loss_after": 1.25, "versions": {"llmcompressor": "0.14.0.1"}, "device": "CPU"}
    Path(spec["result"]).write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
