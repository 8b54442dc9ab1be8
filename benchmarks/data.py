"""Checking a 1 GiB data file against loading it: seconds, memory of all processes, and what each of the two notices.

The peers are `datasets.load_dataset` and XTuner's own `check-custom-dataset`, which loads the file and then looks at ten random rows.
All get the same file, in processes of their own, with a cold cache of their own.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, Final

from benchmarks.result import Result

_SIZE_BYTES: Final = 2**30
_BROKEN_EVERY: Final = 100_003
"""One row in so many has an answer that is null: training would stop at it."""
_SAMPLE_EVERY_SECONDS: Final = 0.05
_MEASURED_ROWS: Final = 20_000


def run() -> Result:
    with tempfile.TemporaryDirectory(dir=Path.home()) as home:
        file = Path(home) / "rows.jsonl"
        rows, broken = write_rows(file, _SIZE_BYTES)
        ours = _child("check", file, home)
        peer = _child("load", file, home)
        xtuner = _child("xtuner", file, home)
        few = Path(home) / "few.jsonl"
        write_rows(few, 700 * _MEASURED_ROWS, broken_every=10**9)
        tokens = _child("tokens", few, home)
    megabytes = _SIZE_BYTES / 1e6
    return Result(
        {
            "rows": rows,
            "broken_rows": broken,
            "found_rows": ours["found"],
            "seconds": round(ours["seconds"], 1),
            "megabytes_per_second": round(megabytes / ours["seconds"], 1),
            "megabytes_per_cpu_second": round(megabytes / ours["cpu_seconds"], 1),
            "peak_resident_megabytes": round(ours["peak_bytes"] / 1e6),
            "load_dataset_seconds": round(peer["seconds"], 1),
            "load_dataset_megabytes_per_second": round(megabytes / peer["seconds"], 1),
            "load_dataset_megabytes_per_cpu_second": round(megabytes / peer["cpu_seconds"], 1),
            "load_dataset_peak_resident_megabytes": round(peer["peak_bytes"] / 1e6),
            "load_dataset_found_rows": peer["found"],
            "check_custom_dataset_seconds": round(xtuner["seconds"], 1),
            "check_custom_dataset_megabytes_per_second": round(megabytes / xtuner["seconds"], 1),
            "check_custom_dataset_peak_resident_megabytes": round(xtuner["peak_bytes"] / 1e6),
            "check_custom_dataset_found_rows": xtuner["found"],
            "exact_tokens_per_second": round(tokens["tokens"] / tokens["seconds"]),
            "library_tokens_per_second": round(tokens["tokens"] / tokens["library_seconds"]),
        },
        {
            "megabytes_per_second": (">=", 100.0),
            "peak_resident_megabytes": ("<", 500.0),
            "found_rows": ("==", float(broken)),
        },
    )


def write_rows(file: Path, size_bytes: int, broken_every: int = _BROKEN_EVERY) -> tuple[int, int]:
    """`messages` rows in Chinese and English of some hundred bytes to some kilobytes, no two alike; how many, and how many are bad."""
    chooser = random.Random(0)
    words = [
        "模型",
        "训练",
        "数据",
        "你好",
        "请问",
        "因为",
        "所以",
        "model",
        "train",
        "data",
        "hello",
        "please",
        "because",
    ]
    written = rows = broken = 0
    with open(file, "w", encoding="utf-8") as stream:
        while written < size_bytes:
            rows += 1
            answer: str | None = " ".join(chooser.choices(words, k=chooser.randint(20, 260)))
            if rows % broken_every == 0:
                answer, broken = None, broken + 1
            turns = [
                {"role": "user", "content": f"{rows} {words[rows % 13]}？"},
                {"role": "assistant", "content": answer},
            ]
            line = json.dumps({"messages": turns}, ensure_ascii=False) + "\n"
            written += len(line.encode())
            stream.write(line)
    return rows, broken


def _child(name: str, file: Path, home: str) -> dict[str, Any]:
    """Run one of the functions below in a process of its own; its result, and the peak memory of it and its children."""
    environment = {**os.environ, "HF_HOME": f"{home}/hf_{name}", "HF_DATASETS_OFFLINE": "1"}
    environment["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.data", name, str(file)], stdout=subprocess.PIPE, text=True, env=environment
    )
    peak = [0]
    is_over = threading.Event()
    watcher = threading.Thread(target=_watch, args=(process.pid, peak, is_over))
    watcher.start()
    output, _ = process.communicate()
    is_over.set()
    watcher.join()
    if process.returncode:
        raise RuntimeError(f"{name} ended with code {process.returncode}")
    return {**json.loads(output.splitlines()[-1]), "peak_bytes": peak[0]}


def _watch(pid: int, peak: list[int], is_over: threading.Event) -> None:
    while not is_over.wait(_SAMPLE_EVERY_SECONDS):
        peak[0] = max(peak[0], resident_bytes(pid))


def resident_bytes(pid: int) -> int:
    """Resident memory of a process and its descendants, pages that they share counted for each."""
    import psutil

    try:
        parent = psutil.Process(pid)
        family = [parent, *parent.children(recursive=True)]
    except psutil.Error:
        return 0
    total = 0
    for process in family:
        try:
            total += process.memory_info().rss
        except psutil.Error:
            continue
    return total


def _cpu_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _check(file: Path) -> dict[str, float]:
    from core.data.validate import validate

    before, started = _cpu_seconds(), time.perf_counter()
    report = validate(file)
    seconds = time.perf_counter() - started
    found = sum(finding.count for finding in report.findings)
    return {"seconds": seconds, "cpu_seconds": _cpu_seconds() - before, "found": found}


def _load(file: Path) -> dict[str, float]:
    """As XTuner loads it. It says nothing of the rows."""
    from datasets import load_dataset

    before, started = _cpu_seconds(), time.perf_counter()
    load_dataset("json", data_files=str(file), split="train")
    return {"seconds": time.perf_counter() - started, "cpu_seconds": _cpu_seconds() - before, "found": 0}


def _check_custom_dataset(file: Path) -> dict[str, float]:
    """XTuner's tool on a config of ours for this file. It stops at the first bad row among the ten that it draws, else says nothing."""
    import importlib.util

    from core.config.facts import Machine, read_data, read_model
    from core.config.presets import Wishes, make
    from tests.models import write_tiny_llama

    root = file.parent / "check_custom_dataset"
    model = read_model(write_tiny_llama(root / "tiny"))
    config = root / "config.py"
    config.write_text(make(model, read_data(file), Machine(cpu_count=os.cpu_count() or 1), Wishes(max_length=2048)))
    package = importlib.util.find_spec("xtuner")
    if package is None or not package.submodule_search_locations:
        raise ModuleNotFoundError("xtuner is not installed")
    tool = Path(package.submodule_search_locations[0]) / "tools/check_custom_dataset.py"
    before, started = _cpu_seconds(), time.perf_counter()
    done = subprocess.run([sys.executable, str(tool), str(config)], capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - started
    if done.returncode and "NoneType" not in done.stderr:
        raise RuntimeError(done.stderr[-2000:])
    return {"seconds": seconds, "cpu_seconds": _cpu_seconds() - before, "found": int(done.returncode != 0)}


def _tokens(file: Path) -> dict[str, float]:
    """Lengths of all rows with template and tokenizer, against the same texts given to the tokenizer library alone."""
    from core.data import statistics
    from core.data.formats import detect
    from core.data.reader import Row, read_rows, sample_rows, sniff
    from core.data.tokenizer import load_tokenizer
    from core.project import open_project
    from core.xtuner.templates import prompt_templates
    from tests.models import write_tiny_llama

    root = file.parent / "project"
    root.mkdir(exist_ok=True)
    project = open_project(root)
    model = write_tiny_llama(project.model / "tiny")
    template = prompt_templates()["qwen_chat"]
    detection = detect(sample_rows(sniff(file)))
    tokenizer = load_tokenizer(project, model)
    texts = [
        turn["content"] for item in read_rows(sniff(file)) if isinstance(item, Row) for turn in item.value["messages"]
    ]
    started = time.perf_counter()
    for at in range(0, len(texts), 1000):
        tokenizer.backend.encode_batch_fast(texts[at : at + 1000], add_special_tokens=False)
    library_seconds = time.perf_counter() - started
    started = time.perf_counter()
    lengths = statistics.measure(project, file, detection, model, template)
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "tokens": int(lengths.tokens.sum()), "library_seconds": library_seconds}


if __name__ == "__main__":
    action = {"check": _check, "load": _load, "xtuner": _check_custom_dataset, "tokens": _tokens}[sys.argv[1]]
    print(json.dumps(action(Path(sys.argv[2]))))
