"""The chat engine on the CPU against HF generate: the embedded SmolLM2, batch 1, the same prompt."""

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks.generation.answers import ask
from core.chat.generation import Engine
from core.chat.loading import Source, choose_dtype, load_decoder
from core.models.embedded import write_embedded_model
from core.runs.job import SilentProgress

_TOKENS: Final = 48
_ROUNDS: Final = 3
_PROMPT: Final = (
    "The blast furnace was invented in China. Tell me the story of the people who built the first one, and why."
)

Figures = dict[str, float | int | str | None]


def run() -> Figures:
    """Both sides in turn, several times, so that a busy machine slows both."""
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "model"
        write_embedded_model(str(folder), SilentProgress())
        return compare(folder)


def compare(folder: Path) -> Figures:
    """HF generate in the precision it is fastest in here, ours in the one that the worker chooses."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    prompt = AutoTokenizer.from_pretrained(folder).encode(_PROMPT)
    dtype = choose_dtype("auto", torch.device("cpu"), folder)
    source = Source(
        folder=folder, adapter=None, device=torch.device("cpu"), dtype=dtype, slots=2, max_tokens=512, total_bytes=1
    )
    runner, _ = load_decoder(source, SilentProgress())
    engine = Engine(runner)
    peers = {
        kind: AutoModelForCausalLM.from_pretrained(folder, torch_dtype=kind).eval()
        for kind in (torch.float32, torch.bfloat16)
    }
    ours: list[float] = []
    theirs: dict[torch.dtype, list[float]] = {kind: [] for kind in peers}
    try:
        for number in range(_ROUNDS + 1):
            asked = ask(engine, [[*prompt, 30 + number]], _TOKENS)[0]
            rates = {kind: _peer_rate(peer, [*prompt, 30 + number]) for kind, peer in peers.items()}
            if number:  # the first round warms both up
                ours.append(asked.tokens_per_second)
                for kind, rate in rates.items():
                    theirs[kind].append(rate)
    finally:
        engine.close()
    medians = {kind: statistics.median(rates) for kind, rates in theirs.items()}
    best = max(medians, key=medians.__getitem__)
    rate = statistics.median(ours)
    return {
        "cpu_tokens_per_second": round(rate, 1),
        "cpu_dtype": str(dtype).removeprefix("torch."),
        "cpu_hf_tokens_per_second": round(medians[best], 1),
        "cpu_hf_dtype": str(best).removeprefix("torch."),
        "cpu_times_hf": round(rate / medians[best], 2),
    }


def _peer_rate(peer: Any, prompt: list[int]) -> float:
    """Tokens a second after the first, of HF generate."""
    seconds = []
    ids = torch.tensor([prompt])
    for count in (1, _TOKENS):
        started = time.perf_counter()
        peer.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, min_new_tokens=count, do_sample=False,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        seconds.append(time.perf_counter() - started)
    return (_TOKENS - 1) / (seconds[1] - seconds[0])
