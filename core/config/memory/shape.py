"""The shape of a base model, from config.json and the headers of its weight files. Reads no tensor and needs no torch."""

import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from core.errors import InputError
from core.files import read_json
from core.models.weights import BrokenHeader, read_header

_LAYER: Final = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.(.+)\.weight$")
_HEADS: Final = ("lm_head.weight", "output.weight")
_EMBEDDINGS: Final = ("embed_tokens.weight", "tok_embeddings.weight", "wte.weight", "word_embeddings.weight")
_KNOWN_FAMILIES: Final = frozenset(
    {
        "internlm2",
        "internlm3",
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
        "smollm3",
        "yi",
        "baichuan",
        "deepseek",
    }
)
"""Decoders with RMSNorm, rotary positions and a gated MLP, which is what the formula of the budget describes."""


@dataclass(frozen=True, slots=True)
class Matrix:
    """One linear layer of the decoder."""

    name: str
    """Last part of its name, as LoRA's target_modules names it: `wqkv`, `q_proj`."""
    inputs: int
    outputs: int
    count: int
    """How many layers have it."""

    @property
    def parameters(self) -> int:
        return self.inputs * self.outputs


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What the memory of training depends on."""

    model_type: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    intermediate: int
    vocabulary: int
    matrices: tuple[Matrix, ...]
    parameters: int
    """All of them, embeddings and norms included."""
    head_name: str
    """`output` (InternLM2) or `lm_head`."""
    is_tied: bool
    """The output head is the embedding."""
    weight_bytes_each: int
    """Bytes of a weight as stored."""
    is_from_headers: bool
    """False: the weight files have no headers to read, and the matrices follow from config.json."""

    @property
    def linear_parameters(self) -> int:
        """Of the decoder's linear layers: those that QLoRA packs into 4 bits."""
        return sum(matrix.parameters * matrix.count for matrix in self.matrices)

    @property
    def attention_width(self) -> int:
        return self.heads * self.head_width

    @property
    def is_known(self) -> bool:
        """Whether the formula was made for this kind of model. Mixtures of experts and others are only roughly like it."""
        return self.model_type in _KNOWN_FAMILIES and all(matrix.count == self.layers for matrix in self.matrices)


def read_shape(folder: Path) -> Shape:
    """The shape of a model folder. Raises InputError `budget.no_shape` if config.json does not say it."""
    file = folder / "config.json"
    if not file.is_file():
        raise InputError("budget.no_shape", path=str(folder), lacking="config.json")
    config = read_json(file)
    text = config.get("text_config") if isinstance(config.get("text_config"), dict) else config
    return _shape(folder, text, _tensors(folder))


def shape_of(config: dict[str, Any]) -> Shape:
    """The shape a config.json describes, without weight files."""
    return _shape(Path("config.json"), config, {})


def _shape(folder: Path, config: dict[str, Any], tensors: dict[str, tuple[tuple[int, ...], str]]) -> Shape:
    hidden, layers, heads, vocabulary = (
        _integer(folder, config, *names)
        for names in (
            ("hidden_size", "n_embd"),
            ("num_hidden_layers", "num_layers", "n_layer"),
            ("num_attention_heads", "n_head"),
            ("vocab_size", "padded_vocab_size"),
        )
    )
    intermediate = _integer(folder, config, "intermediate_size", "ffn_hidden_size", "n_inner", default=4 * hidden)
    kv_heads = _integer(folder, config, "num_key_value_heads", "multi_query_group_num", default=heads)
    width = _integer(folder, config, "head_dim", default=hidden // heads)
    model_type = str(config.get("model_type", ""))
    matrices = _matrices(tensors)
    head = next((name for name in tensors if name.endswith(_HEADS)), None)
    is_tied = head is None if tensors else bool(config.get("tie_word_embeddings", False))
    if not matrices:
        matrices = _usual_matrices(model_type, layers, hidden, (heads * width, kv_heads * width), intermediate)
    embedding = next((shape for name, (shape, _) in tensors.items() if name.endswith(_EMBEDDINGS)), None)
    if embedding is not None:
        vocabulary = embedding[0]
    counted = sum(math.prod(shape) for shape, _ in tensors.values())
    linear = sum(matrix.parameters * matrix.count for matrix in matrices)
    computed = linear + vocabulary * hidden * (1 if is_tied else 2) + (2 * layers + 1) * hidden
    return Shape(
        model_type=model_type,
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_width=width,
        intermediate=intermediate,
        vocabulary=vocabulary,
        matrices=matrices,
        parameters=counted or computed,
        head_name="output" if model_type == "internlm2" or (head or "").endswith("output.weight") else "lm_head",
        is_tied=is_tied,
        weight_bytes_each=_stored_bytes(tensors, config),
        is_from_headers=bool(tensors),
    )


def _integer(folder: Path, config: dict[str, Any], *names: str, default: int | None = None) -> int:
    for name in names:
        value = config.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    if default is None:
        raise InputError("budget.no_shape", path=str(folder), lacking=names[0])
    return default


def _tensors(folder: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Name → (shape, dtype) of every tensor in the safetensors files; a file that cannot be read makes it none at all."""
    found: dict[str, tuple[tuple[int, ...], str]] = {}
    try:
        for file in sorted(folder.glob("*.safetensors")):
            for name, entry in read_header(file).items():
                if name != "__metadata__":
                    found[name] = (tuple(int(size) for size in entry["shape"]), str(entry["dtype"]))
    except (BrokenHeader, OSError, KeyError, TypeError, ValueError):
        return {}
    return found


def _matrices(tensors: dict[str, tuple[tuple[int, ...], str]]) -> tuple[Matrix, ...]:
    counts: Counter[tuple[str, int, int]] = Counter()
    for name, (shape, _) in tensors.items():
        found = _LAYER.search(name)
        if found is not None and len(shape) == 2:
            counts[found[2].rpartition(".")[2], shape[1], shape[0]] += 1
    return tuple(Matrix(name, inputs, outputs, count) for (name, inputs, outputs), count in counts.items())


def _usual_matrices(
    model_type: str, layers: int, hidden: int, attention: tuple[int, int], intermediate: int
) -> tuple[Matrix, ...]:
    """The linear layers of a decoder with gated MLP; `attention`: widths of queries and keys. InternLM2 has one for q, k, v."""
    queries, keys = attention
    if model_type == "internlm2":
        sizes = {"wqkv": (hidden, queries + 2 * keys), "wo": (queries, hidden)}
        names = ("w1", "w3", "w2")
    else:
        sizes = {
            "q_proj": (hidden, queries),
            "k_proj": (hidden, keys),
            "v_proj": (hidden, keys),
            "o_proj": (queries, hidden),
        }
        names = ("gate_proj", "up_proj", "down_proj")
    sizes |= dict(zip(names, ((hidden, intermediate), (hidden, intermediate), (intermediate, hidden)), strict=True))
    return tuple(Matrix(name, inputs, outputs, layers) for name, (inputs, outputs) in sizes.items())


def _stored_bytes(tensors: dict[str, tuple[tuple[int, ...], str]], config: dict[str, Any]) -> int:
    kinds = Counter[str]()
    for shape, kind in tensors.values():
        kinds[kind] += math.prod(shape)
    if kinds:
        return 4 if kinds.most_common(1)[0][0] == "F32" else 2
    return 4 if str(config.get("torch_dtype") or config.get("dtype") or "") == "float32" else 2
