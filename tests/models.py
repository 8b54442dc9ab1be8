"""Tiny base models with random weights, written at test time: under a megabyte, real architectures, no torch needed.

Each has a byte-level BPE tokenizer with ChatML tokens, trained here on a few sentences. InternLM2 comes as remote code:
its modeling files are copied from the installed xtuner package and never committed.
"""

import importlib.util
import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any, Final

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

VOCABULARY: Final = 512
HIDDEN: Final = 64
INTERMEDIATE: Final = 128
HEADS: Final = 4
KV_HEADS: Final = 2
SPECIAL: Final = ("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")
"""Ids 0 to 4."""
_CHATML: Final = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_SENTENCES: Final = (
    "Who are you? I am a small assistant, trained by Ada. What can you do? I answer questions and help you.",
    "Please introduce yourself. Hello! My name is Danlu. The quick brown fox jumps over the lazy dog. 0 1 2 3 4 5",
    "你是谁？我是小明训练的人工智能助手。请介绍一下你自己。你好，很高兴为你服务。你能做什么？我可以回答问题，帮助写作。",
    "system user assistant import def return class for while if else print hello world model data config train chat",
)


_DTYPES: Final = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def write_tiny_llama(folder: Path, **options: Any) -> Path:
    """A Llama with its own output head; returns `folder`. Options: see `_write`."""
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": False, "mlp_bias": False}
    return _write(folder, config, _llama_tensors, **options)


def write_tiny_qwen2(folder: Path, **options: Any) -> Path:
    """A Qwen2: biases on q, k, v; input and output embeddings tied."""
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "tie_word_embeddings": True,
        "use_sliding_window": False,
    }
    return _write(folder, config, _qwen2_tensors, **options)


def write_tiny_internlm2(folder: Path, **options: Any) -> Path:
    """An InternLM2 as it is on the hub: `auto_map` and modeling files in the folder (needs trust_remote_code)."""
    package = importlib.util.find_spec("xtuner")
    if package is None or not package.submodule_search_locations:
        raise ModuleNotFoundError("xtuner is not installed")
    source = Path(package.submodule_search_locations[0]) / "_lite/modelings/internlm2"
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("configuration_internlm2.py", "modeling_internlm2.py"):
        shutil.copyfile(source / name, folder / name)
    config = {
        "architectures": ["InternLM2ForCausalLM"],
        "model_type": "internlm2",
        "bias": False,
        "auto_map": {
            "AutoConfig": "configuration_internlm2.InternLM2Config",
            "AutoModel": "modeling_internlm2.InternLM2ForCausalLM",
            "AutoModelForCausalLM": "modeling_internlm2.InternLM2ForCausalLM",
        },
    }
    return _write(folder, config, _internlm2_tensors, **options)


def write_tokenizer(folder: Path) -> None:
    """`tokenizer.json`, `tokenizer_config.json`, `special_tokens_map.json`: no BOS is added by itself."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(_tokenizer_json(), encoding="utf-8")
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
    _write_json(folder / "special_tokens_map.json", tokens)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": 2048,
        "clean_up_tokenization_spaces": False,
        "chat_template": _CHATML,
    }
    _write_json(folder / "tokenizer_config.json", {**tokens, **settings})


def _write(
    folder: Path,
    config: dict[str, Any],
    tensors: Any,
    *,
    layers: int = 2,
    seed: int = 0,
    dtype: str = "float32",
    shards: int = 1,
) -> Path:
    """`dtype`: float32, float16 or bfloat16. `shards` > 1 writes that many weight files and an index."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder)
    base = {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "tie_word_embeddings": False,
        "use_cache": True,
        "torch_dtype": dtype,
    }
    _write_json(folder / "config.json", {**base, **config})
    _write_json(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": [2, 4], "pad_token_id": 2})
    random = np.random.default_rng(seed)
    weights = {name: _values(random, shape) for name, shape in tensors(layers).items()}
    _write_weights(folder, weights, dtype, shards)
    return folder


def _llama_tensors(layers: int) -> dict[str, tuple[int, ...]]:
    head = HIDDEN // HEADS
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        shapes |= {
            f"{prefix}.self_attn.q_proj.weight": (HIDDEN, HIDDEN),
            f"{prefix}.self_attn.k_proj.weight": (KV_HEADS * head, HIDDEN),
            f"{prefix}.self_attn.v_proj.weight": (KV_HEADS * head, HIDDEN),
            f"{prefix}.self_attn.o_proj.weight": (HIDDEN, HIDDEN),
            f"{prefix}.mlp.gate_proj.weight": (INTERMEDIATE, HIDDEN),
            f"{prefix}.mlp.up_proj.weight": (INTERMEDIATE, HIDDEN),
            f"{prefix}.mlp.down_proj.weight": (HIDDEN, INTERMEDIATE),
            f"{prefix}.input_layernorm.weight": (HIDDEN,),
            f"{prefix}.post_attention_layernorm.weight": (HIDDEN,),
        }
    return shapes | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}


def _qwen2_tensors(layers: int) -> dict[str, tuple[int, ...]]:
    shapes = _llama_tensors(layers)
    del shapes["lm_head.weight"]
    for layer in range(layers):
        for name in ("q_proj", "k_proj", "v_proj"):
            key = f"model.layers.{layer}.self_attn.{name}"
            shapes[f"{key}.bias"] = shapes[f"{key}.weight"][:1]
    return shapes


def _internlm2_tensors(layers: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"model.tok_embeddings.weight": (VOCABULARY, HIDDEN)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        shapes |= {
            f"{prefix}.attention.wqkv.weight": ((HEADS + 2 * KV_HEADS) * (HIDDEN // HEADS), HIDDEN),
            f"{prefix}.attention.wo.weight": (HIDDEN, HIDDEN),
            f"{prefix}.feed_forward.w1.weight": (INTERMEDIATE, HIDDEN),
            f"{prefix}.feed_forward.w3.weight": (INTERMEDIATE, HIDDEN),
            f"{prefix}.feed_forward.w2.weight": (HIDDEN, INTERMEDIATE),
            f"{prefix}.attention_norm.weight": (HIDDEN,),
            f"{prefix}.ffn_norm.weight": (HIDDEN,),
        }
    return shapes | {"model.norm.weight": (HIDDEN,), "output.weight": (VOCABULARY, HIDDEN)}


def _values(random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Norms around 1, all else normal with a spread that makes different tokens give clearly different logits."""
    values = random.normal(0.0, 0.1, shape)
    return (values + 1.0 if len(shape) == 1 else values).astype(np.float32)


def _write_weights(folder: Path, weights: dict[str, np.ndarray], dtype: str, shards: int) -> None:
    names = list(weights)
    groups = [names[number::shards] for number in range(shards)]
    files = (
        ["model.safetensors"]
        if shards == 1
        else [f"model-{n + 1:05d}-of-{shards:05d}.safetensors" for n in range(shards)]
    )
    for file, group in zip(files, groups, strict=True):
        _write_safetensors(folder / file, {name: weights[name] for name in group}, dtype)
    if shards > 1:
        place = {name: file for file, group in zip(files, groups, strict=True) for name in group}
        size = sum(len(_bytes(value, dtype)) for value in weights.values())
        _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": place})


def _write_safetensors(file: Path, weights: dict[str, np.ndarray], dtype: str) -> None:
    """The format itself (8 bytes of length, a JSON header, the data): numpy's writer knows no bfloat16."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = bytearray()
    for name, value in weights.items():
        start = len(data)
        data += _bytes(value, dtype)
        header[name] = {"dtype": _DTYPES[dtype], "shape": list(value.shape), "data_offsets": [start, len(data)]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)


def _bytes(values: np.ndarray, dtype: str) -> bytes:
    if dtype == "bfloat16":  # the upper half of a float32; numpy has no such type
        return (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    return values.astype(dtype).tobytes()


@cache
def _tokenizer_json() -> str:
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_SENTENCES * 4, trainer)
    return str(tokenizer.to_str())


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
