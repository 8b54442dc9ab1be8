"""The chat engine on a GPU against HF generate: speed, first token, eight at once, the same tokens, and how near the roofline.

Each section runs by itself: one that breaks prints its traceback and leaves its figures out, so that one run tells everything.
"""

import gc
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks.generation.answers import ask
from benchmarks.generation.model import ANSWER_TOKENS, PROMPT_TOKENS, Model, generate, load_peer, write_model
from core.chat.decoder import Decoder
from core.chat.generation import Engine
from core.chat.graphs import GraphRunner
from core.chat.loading import make_graphs
from core.chat.weights import read_config, read_weights

SHAPE: Final = "1.8b"
SLOTS: Final = 8
MAX_TOKENS: Final = 8192
_ROOT: Final = Path(__file__).parents[2]
_PEER_TOKENS: Final = 33
_COPY_BYTES: Final = 2**31

Figures = dict[str, float | int | str | None]


class Bench:
    """What the sections share: the model, the runner, and the figures so far."""

    def __init__(self, shape: str, device: torch.device) -> None:
        self.shape, self.device = shape, device
        self.figures: Figures = {}
        self._folder = tempfile.TemporaryDirectory()
        self.model: Model = write_model(shape, Path(self._folder.name), device)
        self.runner: GraphRunner = self.make_runner(torch.bfloat16)

    def make_runner(self, dtype: torch.dtype) -> GraphRunner:
        config = read_config(self.model.folder)
        assert config is not None
        decoder = Decoder(config, read_weights(self.model.folder, dtype, self.device, lambda _: None))
        return make_graphs(decoder, SLOTS, MAX_TOKENS, has_adapter=False)

    def prompt(self, number: int, length: int = PROMPT_TOKENS) -> list[int]:
        """A prompt that no slot has seen, so that nothing of it is reused."""
        random = torch.Generator().manual_seed(1000 + number)
        return [int(token) for token in torch.randint(5, 500, (length,), generator=random)]

    def section(self, run: Callable[["Bench"], Figures]) -> None:
        started = time.perf_counter()
        try:
            self.figures |= run(self)
        except Exception:  # noqa: BLE001 - whatever breaks, the other sections must still be measured
            print(f"--- {run.__name__} broke", file=sys.stderr)
            traceback.print_exc()
            self.figures[f"{run.__name__}_broke"] = 1
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        print(f"{run.__name__}: {time.perf_counter() - started:.1f} s", file=sys.stderr, flush=True)


def run(shape: str = SHAPE, device: str = "cuda") -> Figures:
    started = time.perf_counter()
    bench = Bench(shape, torch.device(device))
    print(f"model written and loaded: {time.perf_counter() - started:.1f} s", file=sys.stderr, flush=True)
    for part in (kernels_agree, speed, peer_speed, eight_at_once, same_tokens_bf16, same_tokens_fp32, cold_start):
        bench.section(part)
    return bench.figures


def kernels_agree(bench: Bench) -> Figures:
    """The captured step against the decoder's own operations, on one prompt: which path it is, and how far apart the logits are."""
    runner = bench.runner
    figures: Figures = {"engine": "kernels" if runner.is_fused else "graphs", "graphs_captured": len(runner._graphs)}
    decoder = runner._decoder
    plain = GraphRunner(decoder, 1, 1024, has_adapter=False)
    prompt = bench.prompt(0)
    plain.read(0, prompt, 0, tuned=True)
    runner.read(0, prompt, 0, tuned=True)
    with torch.inference_mode():
        for each in (plain, runner):
            each._tokens[0], each._positions[0] = 7, len(prompt)
        order = torch.zeros(1, dtype=torch.long, device=bench.device)
        at = runner._positions[order]
        expected, got = plain.logits(order, at, 1024).float(), runner.logits(order, at, MAX_TOKENS).float()
        runner._positions[0] = runner.max_tokens
    figures["kernel_logit_difference"] = round(float((got - expected).norm() / expected.norm()), 5)
    return figures


def speed(bench: Bench) -> Figures:
    """Batch 1: decoding, first token (warm), sampled, and far into a long conversation; and the share of the roofline."""
    engine = Engine(bench.runner)
    try:
        ask(engine, [bench.prompt(1)], 64)
        rates = [ask(engine, [bench.prompt(number)], 512)[0] for number in (2, 3, 4)]
        firsts = [ask(engine, [bench.prompt(number)], 2)[0].first_token_seconds for number in range(10, 17)]
        sampled = ask(engine, [bench.prompt(20)], 256, temperature=0.7, top_p=0.8, seed=1)[0]
        far = ask(engine, [bench.prompt(21, 6000)], 128)[0]
    finally:
        engine.close()
    rate = statistics.median(asked.tokens_per_second for asked in rates)
    figures: Figures = {
        "tokens_per_second": round(rate, 1),
        "first_token_milliseconds": round(statistics.median(firsts) * 1000, 1),
        "sampled_tokens_per_second": round(sampled.tokens_per_second, 1),
        "after_6000_tokens_per_second": round(far.tokens_per_second, 1),
    }
    if bench.device.type == "cuda":
        bandwidth = _copy_bandwidth(bench.device)
        limit = bandwidth / _bytes_per_token(bench.runner)
        figures["bandwidth_terabytes_per_second"] = round(bandwidth / 1e12, 2)
        figures["roofline_tokens_per_second"] = round(limit, 1)
        figures["share_of_roofline_percent"] = round(100 * rate / limit, 1)
    return figures


def peer_speed(bench: Bench) -> Figures:
    """HF generate on the same weights, batch 1, the same prompt length; its best of three, since other processes slow it most."""
    peer = load_peer(bench.model.folder, torch.bfloat16, bench.device)
    prompt = bench.model.prompts[:1]
    generate(peer, prompt, _PEER_TOKENS)
    seconds = {}
    for count in (1, _PEER_TOKENS):
        times = []
        for _ in range(3):
            started = time.perf_counter()
            generate(peer, prompt, count)
            times.append(time.perf_counter() - started)
        seconds[count] = min(times)
    rate = (_PEER_TOKENS - 1) / (seconds[_PEER_TOKENS] - seconds[1])
    figures: Figures = {
        "hf_tokens_per_second": round(rate, 1),
        "hf_first_token_milliseconds": round(seconds[1] * 1000, 1),
    }
    ours = bench.figures.get("tokens_per_second")
    if isinstance(ours, float):
        figures["times_hf"] = round(ours / rate, 1)
    return figures


def eight_at_once(bench: Bench) -> Figures:
    """Tokens a second of eight conversations together, from the first question to the last answer's end."""
    engine = Engine(bench.runner)
    try:
        ask(engine, [bench.prompt(30 + number) for number in range(SLOTS)], 8)
        started = time.perf_counter()
        asked = ask(engine, [bench.prompt(40 + number) for number in range(SLOTS)], 512)
        seconds = time.perf_counter() - started
    finally:
        engine.close()
    return {"eight_chats_tokens_per_second": round(sum(len(each.tokens) for each in asked) / seconds, 1)}


def same_tokens_bf16(bench: Bench) -> Figures:
    """Greedy tokens of all prompts against HF generate's."""
    ours = _all_answers(bench, bench.runner)
    peer = load_peer(bench.model.folder, torch.bfloat16, bench.device)
    theirs = generate(peer, bench.model.prompts, ANSWER_TOKENS)
    return {"bf16_same_tokens_percent": _same_percent(ours, theirs)}


def same_tokens_fp32(bench: Bench) -> Figures:
    """The same in float32; and how far each side's bf16 logits are from float32's, which says more than tokens can."""
    peer = load_peer(bench.model.folder, torch.float32, bench.device)
    theirs = generate(peer, bench.model.prompts, ANSWER_TOKENS)
    exact = _next_logits(peer, bench.model.prompts)
    del peer
    runner = bench.make_runner(torch.float32)
    ours = _all_answers(bench, runner)
    mine = _read_logits(runner, bench.model.prompts)
    half = load_peer(bench.model.folder, torch.bfloat16, bench.device)
    errors = {
        "fp32_logit_error": mine,
        "bf16_logit_error": _read_logits(bench.runner, bench.model.prompts),
        "hf_bf16_logit_error": _next_logits(half, bench.model.prompts),
    }
    relative = {key: round(float((value - exact).norm() / exact.norm()), 7) for key, value in errors.items()}
    return {"fp32_same_tokens_percent": _same_percent(ours, theirs), **relative}


def cold_start(bench: Bench) -> Figures:
    """A fresh process: interpreter, imports, weights from disk, kernels, graphs, one answer of 32 tokens."""
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.generation.cold", str(bench.model.folder), bench.device.type],
        cwd=_ROOT, capture_output=True, text=True, check=False, timeout=150,
    )  # fmt: skip
    seconds = time.perf_counter() - started
    if done.returncode != 0:
        raise RuntimeError(done.stdout[-2000:] + done.stderr[-6000:])
    return {"cold_start_seconds": round(seconds, 1), "cold_start_said": done.stdout.strip().splitlines()[-1]}


def _all_answers(bench: Bench, runner: GraphRunner) -> torch.Tensor:
    engine = Engine(runner)
    try:
        asked = ask(engine, bench.model.prompts.tolist(), ANSWER_TOKENS)
    finally:
        engine.close()
    return torch.tensor([each.tokens for each in asked])


def _same_percent(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Share of tokens that are the same at the same place; after a first difference a whole answer may count as different."""
    differing = (ours != theirs).any(dim=1)
    for row in differing.nonzero()[:, 0].tolist()[:3]:
        place = int((ours[row] != theirs[row]).nonzero()[0, 0])
        print(f"prompt {row} differs from token {place}", file=sys.stderr)
    return round(float((ours == theirs).float().mean()) * 100, 3)


def _next_logits(peer: Any, prompts: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        logits = [peer(row[None].to(peer.device)).logits[0, -1].float().cpu() for row in prompts[:8]]
    return torch.stack(logits)


def _read_logits(runner: GraphRunner, prompts: torch.Tensor) -> torch.Tensor:
    """The logits after each prompt, its last token given as a decoding step so that the step's own arithmetic is seen."""
    found = []
    for row in prompts[:8].tolist():
        runner.read(0, row[:-1], 0, tuned=True)
        with torch.inference_mode():
            runner._tokens[0], runner._positions[0] = row[-1], len(row) - 1
            order = torch.zeros(1, dtype=torch.long, device=runner.device)
            logits = runner.logits(order, runner._positions[order], runner.max_tokens)
            runner._positions[0] = runner.max_tokens
        found.append(logits[0].float().cpu())
    return torch.stack(found)


def _bytes_per_token(runner: GraphRunner) -> int:
    """Weights that one token must read: all but the rows of the embedding that are other tokens'."""
    decoder = runner._decoder
    products = [part for block in decoder.blocks for part in (block.qkv, block.out, block.gate_up, block.down)]
    return sum(part.weight.numel() * part.weight.element_size() for part in (*products, decoder.head))


def _copy_bandwidth(device: torch.device) -> float:
    """Bytes a second of a device-to-device copy, read and written both counted: what this card's memory gives."""
    source = torch.ones(_COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(10):
        target.copy_(source)
    end.record()
    torch.cuda.synchronize()
    return 10 * 2 * _COPY_BYTES / (float(start.elapsed_time(end)) / 1000)
