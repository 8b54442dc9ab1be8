"""Our decoder against transformers: same logits, same greedy tokens, whatever the cache, with and without an adapter."""

from pathlib import Path
from typing import Any

import pytest

from tests.models import VOCABULARY, write_tiny_internlm2, write_tiny_llama, write_tiny_qwen2

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.engine
CPU = torch.device("cpu")
WRITERS = {"llama": write_tiny_llama, "qwen2": write_tiny_qwen2}


def prompt(length: int = 23, seed: int = 1) -> list[int]:
    return torch.randint(5, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def make_decoder(folder: Path, adapter: Path | None = None, layout: Any = None) -> Any:
    from core.chat.adapter import read_adapter
    from core.chat.decoder import Decoder
    from core.chat.weights import read_config, read_weights

    config = read_config(folder)
    assert config is not None
    pairs = (
        read_adapter(adapter, config, torch.float32, CPU, is_internlm2="internlm2" in folder.name) if adapter else {}
    )
    return Decoder(config, read_weights(folder, torch.float32, CPU, lambda _: None), pairs, layout)


def begin(runner: Any, slot: int, tokens: list[int], *, tuned: bool = True, **settings: Any) -> int:
    """Read a prompt and begin its answer; the first token."""
    from core.chat.sampling import Sampler, Sampling

    logits = runner.read(slot, tokens, 0, tuned=tuned)
    sampling = Sampling(**{"temperature": 0.0, **settings})
    sampler = Sampler(sampling, VOCABULARY, tokens, CPU, runner.max_tokens)
    first = sampler.choose(logits)
    runner.begin(slot, first, len(tokens), tuned=tuned, sampler=sampler)
    return first


def decode(
    runner: Any, tokens: list[int], count: int, slot: int = 0, *, tuned: bool = True, **settings: Any
) -> list[int]:
    first = begin(runner, slot, tokens, tuned=tuned, **settings)
    out = [first, *(runner.start_step([slot]).tokens()[0] for _ in range(count - 1))]
    runner.end(slot)
    return out


def reference(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32, trust_remote_code=True).eval()


def generate(model: Any, tokens: list[int], count: int) -> list[int]:
    ids = torch.tensor([tokens])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, min_new_tokens=count, do_sample=False,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return list(out[0, len(tokens) :].tolist())


@pytest.mark.parametrize("family", WRITERS)
@pytest.mark.parametrize("kind", ["ragged", "static"])
def test_same_greedy_tokens_as_hf_generate(tmp_path: Path, family: str, kind: str) -> None:
    from core.chat.graphs import GraphRunner
    from core.chat.runners import DecoderRunner

    folder = WRITERS[family](tmp_path / family)
    make = DecoderRunner if kind == "ragged" else GraphRunner
    runner = make(make_decoder(folder), 3, 512, has_adapter=False)
    model = reference(folder)
    for seed in range(4):
        tokens = prompt(5 + 40 * seed, seed)
        assert decode(runner, tokens, 40) == generate(model, tokens, 40)


def test_internlm2_as_llama_gives_the_logits_of_its_own_code(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    from core.chat.internlm2 import llama_tensors
    from core.chat.runners import DecoderRunner
    from core.chat.weights import read_config, tensors, weight_files

    folder = write_tiny_internlm2(tmp_path / "internlm2")
    config = read_config(folder)
    tokens = torch.tensor([prompt()])
    with torch.no_grad():
        own = reference(folder)(tokens, use_cache=False).logits[0]
    weights: dict[str, Any] = {}
    for name, tensor in tensors(weight_files(folder)):
        weights |= llama_tensors(name, tensor, config)
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=config.hidden, intermediate_size=128, num_hidden_layers=config.layers,
            num_attention_heads=config.heads, num_key_value_heads=config.kv_heads, rms_norm_eps=config.norm_epsilon,
        )
    )  # fmt: skip
    llama.load_state_dict(weights, strict=True)
    with torch.no_grad():
        mapped = llama.eval()(tokens, use_cache=False).logits[0]
    torch.testing.assert_close(mapped, own, atol=2e-5, rtol=1e-4)
    runner = DecoderRunner(make_decoder(folder), 1, 512, has_adapter=False)
    torch.testing.assert_close(runner.read(0, tokens[0].tolist(), 0, tuned=True), own[-1], atol=2e-5, rtol=1e-4)
    assert sum(tensor.numel() for tensor in weights.values()) == sum(
        t.numel() for _, t in tensors(weight_files(folder))
    )


def test_internlm2_generates_what_a_loop_without_cache_does(tmp_path: Path) -> None:
    from core.chat.runners import DecoderRunner

    folder = write_tiny_internlm2(tmp_path / "internlm2")
    model, tokens, expected = reference(folder), prompt(), []
    with torch.no_grad():
        for _ in range(20):
            logits = model(torch.tensor([tokens + expected]), use_cache=False).logits
            expected.append(int(logits[0, -1].argmax()))
    assert decode(DecoderRunner(make_decoder(folder), 1, 512, has_adapter=False), tokens, 20) == expected


@pytest.mark.parametrize("kind", ["ragged", "static"])
def test_rows_of_a_batch_do_not_touch_each_other(tmp_path: Path, kind: str) -> None:
    from core.chat.graphs import GraphRunner
    from core.chat.runners import DecoderRunner

    folder = write_tiny_llama(tmp_path / "llama")
    decoder = make_decoder(folder)
    alone = DecoderRunner(decoder, 1, 512, has_adapter=False)
    make = DecoderRunner if kind == "ragged" else GraphRunner
    runner = make(decoder, 4, 512, has_adapter=False)
    prompts = [prompt(9 + 7 * slot, slot) for slot in range(4)]
    out = [[begin(runner, slot, tokens)] for slot, tokens in enumerate(prompts)]
    for at in range(15):
        if at == 9:
            runner.end(1)
            runner.end(2)
        slots = [0, 3] if at >= 9 else [0, 1, 2, 3]
        for slot, token in zip(slots, runner.start_step(slots).tokens(), strict=True):
            out[slot].append(token)
    for tokens, got in zip(prompts, out, strict=True):
        assert got == decode(alone, tokens, len(got))


@pytest.mark.parametrize("family", ["llama", "internlm2"])
def test_an_adapter_is_switched_per_row(tmp_path: Path, family: str) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    from core.chat.graphs import GraphRunner
    from core.chat.runners import DecoderRunner

    folder = (write_tiny_llama if family == "llama" else write_tiny_internlm2)(tmp_path / family)
    targets = (
        ["q_proj", "v_proj", "down_proj", "gate_proj", "lm_head"]
        if family == "llama"
        else ["wqkv", "wo", "w1", "w2", "output"]
    )
    model = get_peft_model(
        reference(folder), LoraConfig(r=4, lora_alpha=12, target_modules=targets, task_type="CAUSAL_LM")
    )
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=family == "llama")
    tuned = PeftModel.from_pretrained(reference(folder), str(tmp_path / "adapter")).eval()
    tokens = prompt()
    with torch.no_grad():
        expected = tuned(torch.tensor([tokens]), use_cache=False).logits[0, -1]
        with tuned.disable_adapter():
            base = tuned(torch.tensor([tokens]), use_cache=False).logits[0, -1]
    runner = DecoderRunner(make_decoder(folder, tmp_path / "adapter"), 2, 512, has_adapter=True)
    runner.read(0, tokens[:-1], 0, tuned=True)
    runner.read(1, tokens[:-1], 0, tuned=False)
    last = len(tokens) - 1
    both = runner.step([0, 1], [tokens[-1]] * 2, [last, last], [True, False])
    torch.testing.assert_close(both[0], expected, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(both[1], base, atol=1e-4, rtol=1e-3)
    assert not torch.allclose(expected, base, atol=1e-2)
    graphs = GraphRunner(make_decoder(folder, tmp_path / "adapter"), 2, 512, has_adapter=True)
    answers = [[begin(graphs, slot, tokens, tuned=slot == 0)] for slot in (0, 1)]
    for _ in range(10):
        for answer, token in zip(answers, graphs.start_step([0, 1]).tokens(), strict=True):
            answer.append(token)
    assert answers == [decode(runner, tokens, 11, tuned=tuned) for tuned in (True, False)]


@pytest.mark.parametrize("rows", [1, 2])
def test_a_step_gives_what_reading_gives_with_norms_of_queries_and_keys(tmp_path: Path, rows: int) -> None:
    """Qwen3's attention: reading a prompt goes through `Decoder.forward`, a step through `HostStep`."""
    from core.chat.decoder import Decoder
    from core.chat.runners import DecoderRunner
    from core.chat.weights import read_config, read_weights

    folder = write_tiny_llama(tmp_path / "llama")
    config = read_config(folder)
    assert config is not None
    weights = read_weights(folder, torch.float32, CPU, lambda _: None)
    for layer in range(config.layers):
        for number, name in enumerate(("q_norm", "k_norm")):
            random = torch.Generator().manual_seed(10 * layer + number)
            weights[f"model.layers.{layer}.self_attn.{name}.weight"] = (
                torch.rand(config.head_dim, generator=random) + 0.5
            )
    runner = DecoderRunner(Decoder(config, weights), 2, 512, has_adapter=False)
    slots = list(range(rows))
    prompts = [prompt(12 + slot, slot) for slot in slots]
    expected = [runner.read(slot, prompts[slot], 0, tuned=False) for slot in slots]
    for slot in slots:
        runner.read(slot, prompts[slot][:-1], 0, tuned=False)
    got = runner.step(slots, [each[-1] for each in prompts], [len(each) - 1 for each in prompts], [False] * rows)
    torch.testing.assert_close(got, torch.stack(expected), atol=2e-5, rtol=1e-4)


SETTINGS = [
    {"temperature": 1.0},
    {"temperature": 0.7, "top_p": 0.8},
    {"temperature": 1.5, "top_p": 0.95, "top_k": 40, "min_p": 0.02, "repetition_penalty": 1.3},
    {"temperature": 0.0, "repetition_penalty": 1.5},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_same_seed_gives_the_same_tokens_on_the_host_and_in_a_graph(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    from core.chat.graphs import GraphRunner
    from core.chat.runners import DecoderRunner

    decoder = make_decoder(write_tiny_llama(tmp_path / "llama"))
    hosted, graphs = DecoderRunner(decoder, 2, 512, has_adapter=False), GraphRunner(decoder, 2, 512, has_adapter=False)
    expected = decode(hosted, prompt(), 30, seed=5, **settings)
    assert decode(graphs, prompt(), 30, slot=1, seed=5, **settings) == expected
    if settings["temperature"]:
        assert decode(graphs, prompt(), 30, seed=6, **settings) != expected


def test_an_answer_on_a_runner_that_runs_ahead_ends_where_it_should(tmp_path: Path) -> None:
    """Stop tokens, length and the next turn's reuse, with a step on its way whenever an answer ends."""
    import threading

    from core.chat.generation import Answer, Engine
    from core.chat.graphs import GraphRunner
    from core.chat.runners import DecoderRunner
    from core.chat.sampling import Sampling

    decoder = make_decoder(write_tiny_llama(tmp_path / "llama"))
    expected = decode(DecoderRunner(decoder, 1, 128, has_adapter=False), prompt(), 41)
    engine = Engine(GraphRunner(decoder, 2, 64, has_adapter=False))

    def ask(tokens: list[int], stop: frozenset[int], longest: int | None) -> tuple[list[int], str, Answer]:
        out: list[int] = []
        ended, reasons = threading.Event(), []

        def on_end(reason: str) -> None:
            reasons.append(reason)
            ended.set()

        answer = Answer(tokens, Sampling(temperature=0.0, max_tokens=longest), stop, out.append, on_end)
        engine.submit(answer)
        assert ended.wait(600)
        return out, reasons[0], answer

    try:
        assert ask(prompt(), frozenset(), 10)[:2] == (expected[:10], "length")
        end = expected.index(expected[7])
        assert ask(prompt(), frozenset({expected[7]}), None)[:2] == (expected[:end], "stop")
        assert ask(prompt(), frozenset(), None)[:2] == (expected[: 64 - len(prompt())], "length")
        out, _, answer = ask(prompt() + expected[:5], frozenset(), 5)
        assert out == expected[5:10]
        assert answer.cached_tokens >= len(prompt()) + 4
    finally:
        engine.close()


def test_a_cancelled_answer_gets_no_further_token(tmp_path: Path) -> None:
    import threading

    from core.chat.generation import Answer, Engine
    from core.chat.runners import DecoderRunner
    from core.chat.sampling import Sampling

    engine = Engine(DecoderRunner(make_decoder(write_tiny_llama(tmp_path / "llama")), 1, 128, has_adapter=False))
    out, reasons, ended = list[int](), list[str](), threading.Event()

    def on_token(token: int) -> None:
        out.append(token)
        if len(out) == 5:
            answer.cancel()

    def on_end(reason: str) -> None:
        reasons.append(reason)
        ended.set()

    answer = Answer(prompt(), Sampling(temperature=0.0, max_tokens=60, ignore_eos=True), frozenset(), on_token, on_end)
    try:
        engine.submit(answer)
        assert ended.wait(600)
    finally:
        engine.close()
    assert (len(out), reasons) == (5, ["cancelled"])


@pytest.mark.parametrize("held", ["bfloat16", "float32"])
def test_bfloat16_on_the_cpu_is_what_transformers_computes(tmp_path: Path, held: str) -> None:
    """Packed weights where the machine has them; and only weights that are bfloat16 are taken so without being asked."""
    from core.chat.decoder import Decoder
    from core.chat.loading import choose_dtype
    from core.chat.projection import can_pack
    from core.chat.runners import DecoderRunner
    from core.chat.weights import read_config, read_weights

    folder = write_tiny_llama(tmp_path / "llama", dtype=held)
    config = read_config(folder)
    assert config is not None
    weights = read_weights(folder, torch.bfloat16, CPU, lambda _: None)
    decoder = Decoder(config, dict(weights))
    assert (decoder.head.layout == "packed") == can_pack(torch.bfloat16, CPU)
    with torch.no_grad():
        expected = reference(folder)(torch.tensor([prompt()]), use_cache=False).logits[0, -1]
    rounded = Decoder(config, weights, layout="int8")
    assert rounded.head.layout == "int8"
    assert decoder.rounding_error == 0.0 < rounded.rounding_error < 0.02
    for each, most in ((decoder, 0.02), (rounded, 0.04)):
        runner = DecoderRunner(each, 1, 512, has_adapter=False)
        whole = runner.read(0, prompt(), 0, tuned=True)  # many rows at once, then one
        runner.read(0, prompt()[:-1], 0, tuned=True)
        stepped = runner.step([0], prompt()[-1:], [len(prompt()) - 1], [True])[0]
        for got in (whole, stepped):
            assert float((got.float() - expected).norm() / expected.norm()) < most
    chosen = choose_dtype("auto", CPU, folder)
    assert chosen == torch.float32 or (held == "bfloat16" and decoder.head.layout == "packed")
