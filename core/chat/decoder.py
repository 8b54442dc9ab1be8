"""Llama's forward pass, lean enough for one token at a time: joined projections, few operations, any cache.

Computes what transformers' Llama, Mistral, Qwen2 and Qwen3 compute (tests compare logits and greedy tokens). A LoRA adapter
stays apart from the weights and is switched per row, so base and tuned answers can share one batch.
"""

from dataclasses import dataclass
from typing import Final

import torch
from torch.nn.functional import embedding, rms_norm, silu

from core.chat.adapter import LowRank
from core.chat.cache import Cache
from core.chat.projection import Layout, Projection, make_projection
from core.chat.weights import DecoderConfig
from core.errors import InputError

_QKV: Final = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_GATE_UP: Final = ("mlp.gate_proj", "mlp.up_proj")


@dataclass(frozen=True, slots=True)
class Block:
    """One layer's weights."""

    attention_norm: torch.Tensor
    qkv: Projection
    query_norm: torch.Tensor | None
    key_norm: torch.Tensor | None
    out: Projection
    mlp_norm: torch.Tensor
    gate_up: Projection
    down: Projection


class Decoder:
    """Token ids → logits. Holds weights; the cache is the caller's."""

    def __init__(
        self,
        config: DecoderConfig,
        weights: dict[str, torch.Tensor],
        adapter: dict[str, LowRank] | None = None,
        layout: Layout | None = None,
    ) -> None:
        """Takes the tensors out of `weights` as it joins them. `layout`: of all matrices but the embedding, see `make_projection`.

        Raises InputError `chat.missing_tensor`.
        """
        self.config, self._layout = config, layout
        self._weights, self._adapter = weights, dict(adapter or {})
        self.embedding = self._take("model.embed_tokens.weight")
        self.dtype, self.device = self.embedding.dtype, self.embedding.device
        self.blocks = [self._block(f"model.layers.{layer}") for layer in range(config.layers)]
        self.norm = self._take("model.norm.weight")
        head = self.embedding if config.tied else self._take("lm_head.weight")
        low_rank = self._low_rank("", ("lm_head",), (head.shape[0],))
        self.head = make_projection(head, None, low_rank, layout)
        if self._adapter:
            raise InputError("chat.adapter_mismatch", module=next(iter(self._adapter)))
        self.angles = _rotations(config, self.device)

    @property
    def rounding_error(self) -> float:
        """Relative error of the matrices as int8, mean over all; 0 where they are as loaded."""
        matrices = [self.head, *(each for b in self.blocks for each in (b.qkv, b.out, b.gate_up, b.down))]
        return sum(matrix.rounding_error for matrix in matrices) / len(matrices)

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def forward(
        self, tokens: torch.Tensor, positions: torch.Tensor, cache: Cache, tuned: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Logits (rows, vocabulary) of the last of `tokens` (rows, n), which stand at `positions` (rows, n)."""
        config = self.config
        rows, count = tokens.shape
        hidden = embedding(tokens, self.embedding)
        cos, sin = (table[positions].unsqueeze(1).to(self.dtype) for table in self.angles)
        for layer, block in enumerate(self.blocks):
            x = rms_norm(hidden, (config.hidden,), block.attention_norm, config.norm_epsilon)
            query, key, value = self._project(block, x, tuned, rows, count)
            attended = cache.extend(layer, _rotate(query, cos, sin), _rotate(key, cos, sin), value)
            hidden = hidden + block.out.apply(attended.transpose(1, 2).reshape(rows, count, -1), tuned)
            x = rms_norm(hidden, (config.hidden,), block.mlp_norm, config.norm_epsilon)
            gate, up = block.gate_up.apply(x, tuned).chunk(2, dim=-1)
            hidden = hidden + block.down.apply(silu(gate) * up, tuned)
        last = rms_norm(hidden[:, -1:], (config.hidden,), self.norm, config.norm_epsilon)
        return self.head.apply(last, tuned)[:, 0]

    def _project(
        self, block: Block, x: torch.Tensor, tuned: torch.Tensor | None, rows: int, count: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        config = self.config
        joined = block.qkv.apply(x, tuned).view(rows, count, -1, config.head_dim).transpose(1, 2)
        query, key, value = joined.split((config.heads, config.kv_heads, config.kv_heads), dim=1)
        if block.query_norm is not None and block.key_norm is not None:
            query = rms_norm(query, (config.head_dim,), block.query_norm, config.norm_epsilon)
            key = rms_norm(key, (config.head_dim,), block.key_norm, config.norm_epsilon)
        return query, key, value

    def _block(self, prefix: str) -> Block:
        return Block(
            attention_norm=self._take(f"{prefix}.input_layernorm.weight"),
            qkv=self._projection(prefix, _QKV),
            query_norm=self._weights.pop(f"{prefix}.self_attn.q_norm.weight", None),
            key_norm=self._weights.pop(f"{prefix}.self_attn.k_norm.weight", None),
            out=self._projection(prefix, ("self_attn.o_proj",)),
            mlp_norm=self._take(f"{prefix}.post_attention_layernorm.weight"),
            gate_up=self._projection(prefix, _GATE_UP),
            down=self._projection(prefix, ("mlp.down_proj",)),
        )

    def _projection(self, prefix: str, names: tuple[str, ...]) -> Projection:
        weights = [self._take(f"{prefix}.{name}.weight") for name in names]
        biases = [self._weights.pop(f"{prefix}.{name}.bias", None) for name in names]
        sizes = tuple(weight.shape[0] for weight in weights)
        held = [bias for bias in biases if bias is not None]
        return make_projection(
            weights[0].contiguous() if len(weights) == 1 else torch.cat(weights),
            torch.cat(held) if len(held) == len(names) else None,
            self._low_rank(f"{prefix}.", names, sizes),
            self._layout,
        )

    def _low_rank(self, prefix: str, names: tuple[str, ...], sizes: tuple[int, ...]) -> LowRank | None:
        """The adapters of joined layers as one: the A stacked, the B on a diagonal of blocks."""
        pairs = [self._adapter.pop(f"{prefix}{name}", None) for name in names]
        held = [pair for pair in pairs if pair is not None]
        if not held:
            return None
        b = held[0].b.new_zeros((sum(sizes), sum(pair.a.shape[0] for pair in held)))
        row = column = 0
        for pair, size in zip(pairs, sizes, strict=True):
            if pair is not None:
                b[row : row + size, column : column + pair.a.shape[0]] = pair.b
                column += pair.a.shape[0]
            row += size
        return LowRank(torch.cat([pair.a for pair in held]), b)

    def _take(self, name: str) -> torch.Tensor:
        tensor = self._weights.pop(name, None)
        if tensor is None:
            raise InputError("chat.missing_tensor", name=name)
        return tensor


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding (arXiv 2104.09864), halves as in Llama. `sin` has its first half negated already."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat((x[..., half:], x[..., :half]), dim=-1) * sin


def _rotations(config: DecoderConfig, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and signed sin (max_positions, head_dim) in float32, frequencies as transformers computes them."""
    frequencies, scale = _frequencies(config)
    angles = torch.arange(config.max_positions).float()[:, None] * frequencies.float()[None]
    cos, sin = angles.cos() * scale, angles.sin() * scale
    return torch.cat((cos, cos), dim=-1).to(device), torch.cat((-sin, sin), dim=-1).to(device)


def _frequencies(config: DecoderConfig) -> tuple[torch.Tensor, float]:
    """(head_dim / 2,) radians a position, and a factor on both cos and sin."""
    scaling = dict(config.rope["rope_scaling"] or {})
    kind = scaling.pop("type", None) or scaling.get("rope_type", "default")
    if kind == "default":  # without transformers, whose import takes longer than all else in a small model's start
        exponents = torch.arange(0, config.head_dim, 2).float() / config.head_dim
        return 1.0 / float(config.rope["rope_theta"]) ** exponents, 1.0
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    llama = LlamaConfig(
        hidden_size=config.hidden,
        num_attention_heads=config.heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_positions,
        rope_theta=config.rope["rope_theta"],
        rope_scaling={**scaling, "rope_type": kind} if scaling else None,
    )
    frequencies, scale = ROPE_INIT_FUNCTIONS[kind](llama, torch.device("cpu"))
    return frequencies, float(scale)
