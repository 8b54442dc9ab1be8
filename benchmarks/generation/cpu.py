"""The chat engine on the CPU against HF generate: the embedded SmolLM2, batch 1, the same prompts, whatever the precision.

How fast, how many tokens are the same, what int8 costs, and whether the thirtieth turn of a conversation is still as fast.
"""

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks.generation.answers import ask
from core.chat.cache import RaggedCache
from core.chat.generation import Engine
from core.chat.loading import Source, choose_dtype, load_decoder
from core.chat.runners import DecoderRunner
from core.models.embedded import write_embedded_model
from core.runs.job import SilentProgress

_TOKENS: Final = 48
_ROUNDS: Final = 4
_PROMPTS: Final = (
    "The blast furnace was invented in China. Tell me the story of the people who built the first one, and why.",
    "def fibonacci(n):",
    "Once upon a time there was a small dragon who",
    "To make bread at home, you need flour, water, salt and",
)
_TURNS: Final = 30
_TURN_TOKENS: Final = 60
_CALLS: Final = 60
_CPU: Final = torch.device("cpu")

Figures = dict[str, float | int | str | None]


@dataclass(frozen=True, slots=True)
class _Side:
    """One of those compared, and its fastest round: tokens a second."""

    name: str
    rates: list[float]

    @property
    def best(self) -> float:
        return max(self.rates)


def run() -> Figures:
    """All sides in turn, several times, the best of each: a busy machine slows every one of them."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "model"
        write_embedded_model(str(folder), SilentProgress())
        prompts = [AutoTokenizer.from_pretrained(folder).encode(text) for text in _PROMPTS]
        saved = str(choose_dtype("auto", _CPU, folder)).removeprefix("torch.")
        runners = {name: _load(folder, name) for name in dict.fromkeys((saved, "float32", "int8"))}
        peers = {
            name: AutoModelForCausalLM.from_pretrained(folder, torch_dtype=getattr(torch, name)).eval()
            for name in ("float32", "bfloat16")
        }
    ours, theirs = _race(runners, peers, prompts[0])
    best = max(theirs, key=lambda side: side.best)
    by_name = {side.name: side.best for side in ours}
    return {
        "cpu_tokens_per_second": round(by_name[saved], 1),
        "cpu_dtype": saved,
        "cpu_hf_tokens_per_second": round(best.best, 1),
        "cpu_hf_dtype": best.name,
        "cpu_times_hf": round(by_name[saved] / best.best, 2),
        "cpu_fp32_times_hf_fp32": round(by_name["float32"] / theirs[0].best, 2),
        "cpu_int8_tokens_per_second": round(by_name["int8"], 1),
        "cpu_int8_times_hf": round(by_name["int8"] / best.best, 2),
        **_accuracy(runners, peers["float32"], prompts, saved),
        **_long_conversation(runners[saved]),
    }


def _load(folder: Path, name: str) -> DecoderRunner:
    is_int8 = name == "int8"
    dtype = torch.bfloat16 if is_int8 else getattr(torch, name)
    source = Source(
        folder=folder, adapter=None, device=_CPU, dtype=dtype, slots=2, max_tokens=4096, total_bytes=1, is_int8=is_int8
    )
    runner, _ = load_decoder(source, SilentProgress())
    assert isinstance(runner, DecoderRunner)
    return runner


def _race(
    runners: dict[str, DecoderRunner], peers: dict[str, Any], prompt: list[int]
) -> tuple[list[_Side], list[_Side]]:
    engines = {name: Engine(runner) for name, runner in runners.items()}
    ours, theirs = [_Side(name, []) for name in engines], [_Side(name, []) for name in peers]
    try:
        for number in range(_ROUNDS + 1):
            text = [*prompt, 30 + number]
            rates = [ask(engines[side.name], [text], _TOKENS)[0].tokens_per_second for side in ours]
            rates += [_peer_rate(peers[side.name], text) for side in theirs]
            for side, rate in zip((*ours, *theirs), rates, strict=True):
                side.rates.append(rate)
    finally:
        for engine in engines.values():
            engine.close()
    return ours, theirs


def _peer_rate(peer: Any, prompt: list[int]) -> float:
    """Tokens a second after the first, of HF generate."""
    seconds = []
    for count in (1, _TOKENS):
        started = time.perf_counter()
        _generate(peer, prompt, count)
        seconds.append(time.perf_counter() - started)
    return (_TOKENS - 1) / (seconds[1] - seconds[0])


def _generate(peer: Any, prompt: list[int], count: int) -> list[int]:
    ids = torch.tensor([prompt])
    out = peer.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, min_new_tokens=count, do_sample=False,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return [int(token) for token in out[0, len(prompt) :]]


def _accuracy(runners: dict[str, DecoderRunner], peer: Any, prompts: list[list[int]], saved: str) -> Figures:
    """Along HF's greedy answers in float32: how often each precision would have chosen the same token, and how far its
    probabilities are off (Kullback-Leibler divergence from float32's, nats a token)."""
    same = dict.fromkeys(runners, 0)
    nats = dict.fromkeys(runners, 0.0)
    for prompt in prompts:
        answer = _generate(peer, prompt, _TOKENS)
        logits = {name: _forced(runner, prompt, answer) for name, runner in runners.items()}
        exact = logits["float32"].log_softmax(-1)
        for name, each in logits.items():
            same[name] += int((each.argmax(-1) == torch.tensor(answer)).sum())
            nats[name] += float((exact.exp() * (exact - each.log_softmax(-1))).sum())
    count = len(prompts) * _TOKENS
    figures: Figures = {
        "cpu_fp32_same_tokens_percent": round(100 * same["float32"] / count, 1),
        "cpu_int8_same_tokens_percent": round(100 * same["int8"] / count, 1),
        "cpu_int8_kl_nats": round(nats["int8"] / count, 5),
        "cpu_int8_rounding_error_percent": round(100 * runners["int8"].rounding_error, 2),
    }
    if saved != "float32":
        figures["cpu_saved_same_tokens_percent"] = round(100 * same[saved] / count, 1)
        figures["cpu_saved_kl_nats"] = round(nats[saved] / count, 5)
    return figures


def _forced(runner: DecoderRunner, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """(tokens, vocabulary) float32 logits before each token of `answer`."""
    rows = [runner.read(0, prompt, 0, tuned=False).float()]
    for at, token in enumerate(answer[:-1]):
        rows.append(runner.step([0], [token], [len(prompt) + at], [False])[0].float())
    return torch.stack(rows)


def _long_conversation(runner: DecoderRunner) -> Figures:
    """Milliseconds a token in the first and the thirtieth turn, and how much longer attention alone takes there."""
    ends = (2 * _TURN_TOKENS, 2 * _TURN_TOKENS * _TURNS)
    runner.read(0, [100 + at % 1000 for at in range(ends[1] + 1)], 0, tuned=False)
    first, last, attention_first, attention_last = _fastest(
        *(lambda end=end: runner.step([0], [100], [end], [False]) for end in ends),
        *(_attention(runner, end) for end in ends),
    )
    more = attention_last - attention_first
    return {
        "cpu_turn_1_ms_per_token": round(1e3 * first, 2),
        "cpu_turn_30_ms_per_token": round(1e3 * last, 2),
        "cpu_attention_ms_more": round(1e3 * more, 2),
        "cpu_turn_30_growth_beyond_attention": round((last - more) / first, 2),
    }


def _attention(runner: DecoderRunner, place: int) -> Callable[[], None]:
    """The attention of one token at `place`, all layers."""
    config = runner.config
    cache = RaggedCache(config, 1, _CPU)
    cache.begin([0], [place], 1)
    query = torch.randn(1, config.heads, config.head_dim)
    key = torch.randn(1, config.kv_heads, config.head_dim)

    def attend() -> None:
        for layer in range(config.layers):
            cache.attend(layer, query, key, key)

    return attend


def _fastest(*calls: Callable[[], object]) -> list[float]:
    """Seconds of the fastest of many rounds of each, in turn: a busy machine slows all of them."""
    found: list[list[float]] = [[] for _ in calls]
    for _ in range(_CALLS):
        for call, seconds in zip(calls, found, strict=True):
            started = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - started)
    return [min(seconds) for seconds in found]
