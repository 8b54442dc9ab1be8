"""Finds the parts of a causal language model (InternLM2, Llama, Qwen2, Mistral; plain or under peft) that the fast pass computes with.

Reads module names and shapes; changes nothing. What it does not know, it names in an UnsupportedModelError.
"""

from dataclasses import dataclass
from typing import Any, Final

from torch import nn

from core.i18n import catalog
from core.messages import Message, message
from core.xtuner.runtime.speed.linear import Adapter, LinearGroup
from core.xtuner.runtime.speed.weights import FrozenWeight, is_4bit

_LLAMA_FAMILY: Final = frozenset({"LlamaForCausalLM", "Qwen2ForCausalLM", "MistralForCausalLM"})
_INTERNLM2: Final = "InternLM2ForCausalLM"


class UnsupportedModelError(Exception):
    """This model cannot take the fast pass; `why` says why not."""

    def __init__(self, why: Message) -> None:
        super().__init__(catalog("en").say(why))
        self.why = why


@dataclass(frozen=True, slots=True)
class Norm:
    weight: nn.Parameter
    eps: float


@dataclass(frozen=True, slots=True)
class Layer:
    """One decoder layer. `projection`: query, key and value; `gate_up`: both, stacked in this order."""

    attention_norm: Norm
    projection: LinearGroup
    output: LinearGroup
    mlp_norm: Norm
    gate_up: LinearGroup
    down: LinearGroup

    @property
    def groups(self) -> tuple[LinearGroup, ...]:
        return (self.projection, self.output, self.gate_up, self.down)


@dataclass(frozen=True, slots=True)
class Decoder:
    """A model as the fast pass sees it."""

    embedding: nn.Module
    layers: tuple[Layer, ...]
    norm: Norm
    head: LinearGroup
    rotary: nn.Module
    config: Any
    heads: int
    kv_heads: int
    dim: int
    interleaved: bool
    """Whether query, key and value are stacked per KV head (InternLM2), not one after the other."""
    tied: bool
    """Whether the head's weight is the embedding's."""

    @property
    def groups(self) -> tuple[LinearGroup, ...]:
        return (*(group for layer in self.layers for group in layer.groups), self.head)

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self.groups for parameter in group.parameters]


def read_decoder(llm: nn.Module) -> Decoder:
    """The decoder inside `llm` (a causal model or a PeftModel around one). Raises UnsupportedModelError."""
    causal = llm.get_base_model() if hasattr(llm, "get_base_model") else llm
    kind = type(causal).__name__
    config: Any = causal.config
    if kind not in _LLAMA_FAMILY | {_INTERNLM2}:
        raise UnsupportedModelError(message("speed.left.architecture", name=kind))
    _check(config)
    if any(hasattr(parameter, "ds_tensor") for parameter in llm.parameters()):
        raise UnsupportedModelError(message("speed.left.zero3"))
    is_internlm2 = kind == _INTERNLM2
    numbers = iter(range(10**6))
    body: Any = causal.model
    layers = tuple((_internlm2_layer if is_internlm2 else _llama_layer)(layer, numbers) for layer in body.layers)
    embedding: Any = body.tok_embeddings if is_internlm2 else body.embed_tokens
    head: Any = causal.output if is_internlm2 else causal.lm_head
    base = head.base_layer if hasattr(head, "base_layer") else head
    decoder = Decoder(
        embedding=embedding,
        layers=layers,
        norm=_norm(body.norm),
        head=_group(numbers, head),
        rotary=body.layers[0].attention.rotary_emb if is_internlm2 else body.rotary_emb,
        config=config,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        interleaved=is_internlm2,
        tied=getattr(base, "weight", None) is getattr(embedding, "weight", None),
    )
    _check_trained(llm, decoder)
    return decoder


def _check(config: Any) -> None:
    activation = getattr(config, "hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise UnsupportedModelError(message("speed.left.activation", name=str(activation)))
    window = getattr(config, "sliding_window", None)
    if window is not None and getattr(config, "use_sliding_window", True):
        raise UnsupportedModelError(message("speed.left.sliding_window", tokens=window))
    if getattr(config, "attention_dropout", 0.0):
        raise UnsupportedModelError(message("speed.left.attention_dropout"))
    if getattr(config, "pretraining_tp", 1) > 1:
        raise UnsupportedModelError(message("speed.left.pretraining_tp"))


def _check_trained(llm: nn.Module, decoder: Decoder) -> None:
    known = {id(parameter) for parameter in decoder.parameters}
    for name, parameter in llm.named_parameters():
        if parameter.requires_grad and id(parameter) not in known:
            raise UnsupportedModelError(message("speed.left.trained_outside", name=name))
    if not known:
        raise UnsupportedModelError(message("speed.left.no_adapter"))


def _internlm2_layer(layer: Any, numbers: Any) -> Layer:
    return Layer(
        attention_norm=_norm(layer.attention_norm),
        projection=_group(numbers, layer.attention.wqkv),
        output=_group(numbers, layer.attention.wo),
        mlp_norm=_norm(layer.ffn_norm),
        gate_up=_group(numbers, layer.feed_forward.w1, layer.feed_forward.w3),
        down=_group(numbers, layer.feed_forward.w2),
    )


def _llama_layer(layer: Any, numbers: Any) -> Layer:
    attention, mlp = layer.self_attn, layer.mlp
    return Layer(
        attention_norm=_norm(layer.input_layernorm),
        projection=_group(numbers, attention.q_proj, attention.k_proj, attention.v_proj),
        output=_group(numbers, attention.o_proj),
        mlp_norm=_norm(layer.post_attention_layernorm),
        gate_up=_group(numbers, mlp.gate_proj, mlp.up_proj),
        down=_group(numbers, mlp.down_proj),
    )


def _norm(module: Any) -> Norm:
    return Norm(module.weight, float(module.variance_epsilon))


def _group(numbers: Any, *modules: Any) -> LinearGroup:
    adapters = [_adapter(module) for module in modules]
    bases = [module.base_layer if hasattr(module, "base_layer") else module for module in modules]
    for base in bases:
        if not is_4bit(base) and type(base) is not nn.Linear:
            raise UnsupportedModelError(message("speed.left.layer", name=type(base).__name__))
    if len({is_4bit(base) for base in bases}) > 1:
        raise UnsupportedModelError(message("speed.left.mixed_layers"))
    try:
        return LinearGroup(FrozenWeight(bases), adapters, next(numbers))
    except ValueError as error:
        raise UnsupportedModelError(message("speed.left.unlike_adapters")) from error


def _adapter(module: Any) -> Adapter | None:
    if not hasattr(module, "base_layer"):
        return None
    active = list(module.active_adapters)
    if len(active) != 1 or active[0] not in getattr(module, "lora_A", {}):
        raise UnsupportedModelError(message("speed.left.adapter", name=", ".join(active)))
    name = active[0]
    if getattr(module, "lora_variant", {}).get(name) is not None or getattr(module, "use_dora", {}).get(name):
        raise UnsupportedModelError(message("speed.left.lora_variant"))
    if getattr(module, "merged", False) or getattr(module, "disable_adapters", False):
        raise UnsupportedModelError(message("speed.left.adapter_off"))
    pair_b = module.lora_B[name]
    if pair_b.bias is not None or getattr(module, "fan_in_fan_out", False):
        raise UnsupportedModelError(message("speed.left.lora_bias"))
    probability = module.lora_dropout[name]
    return Adapter(
        a=module.lora_A[name].weight,
        b=pair_b.weight,
        scale=float(module.scaling[name]),
        dropout=float(probability.p) if isinstance(probability, nn.Dropout) else 0.0,
    )
