"""One decoding step of the decoder on a CPU: few and small operations around the matrices. Same arithmetic as `Decoder.forward`.

What is added up from layer to layer, norms, rotation and attention are float32, whatever the matrices are: for so few numbers
it is the fastest, and the most exact.
"""

import torch
from torch import Tensor
from torch.nn.functional import embedding, rms_norm, silu

from core.chat.cache import RaggedCache
from core.chat.decoder import Block, Decoder


class HostStep:
    """Computes logits for one new token in each row."""

    def __init__(self, decoder: Decoder, cache: RaggedCache) -> None:
        self._decoder, self._cache = decoder, cache
        config = decoder.config
        self._rotated = config.heads + config.kv_heads
        self._half = config.head_dim // 2
        # Attention's 1/√d lies in the rotation of the queries, which are multiplied there anyway.
        self._scale = torch.ones(self._rotated, 1)
        self._scale[: config.heads] = config.head_dim**-0.5
        self._norms = [(_wide(block.attention_norm), _wide(block.mlp_norm)) for block in decoder.blocks]
        self._last_norm = _wide(decoder.norm)

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def forward(self, tokens: list[int], positions: list[int], tuned: Tensor | None) -> Tensor:
        """Float32 logits (rows, vocabulary). The cache knows the rows' slots; tuned (rows, 1) as in `Projection.apply`, or None."""
        decoder, dtype = self._decoder, self._decoder.dtype
        hidden = embedding(torch.tensor(tokens), decoder.embedding).float()
        places = torch.tensor(positions)
        cos, sin = (table[places].unsqueeze(1) * self._scale for table in decoder.angles)
        for layer, (block, norms) in enumerate(zip(decoder.blocks, self._norms, strict=True)):
            joined = block.qkv.apply(self._normed(hidden, norms[0]).to(dtype), tuned)
            attended = self._attend(layer, block, joined.float(), cos, sin)
            hidden.add_(block.out.apply(attended.to(dtype), tuned))
            gate, up = block.gate_up.apply(self._normed(hidden, norms[1]).to(dtype), tuned).chunk(2, dim=-1)
            hidden.add_(block.down.apply(silu(gate).mul_(up), tuned))
        logits: Tensor = decoder.head.apply(self._normed(hidden, self._last_norm).to(dtype), tuned).float()
        return logits

    def _attend(self, layer: int, block: Block, joined: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """`joined` (rows, heads of queries, keys and values · head_dim) → (rows, hidden of the heads)."""
        config, half = self._decoder.config, self._half
        heads = joined.view(joined.shape[0], -1, config.head_dim)
        turned = heads[:, : self._rotated]
        if block.query_norm is not None and block.key_norm is not None:
            query, key = turned.split((config.heads, config.kv_heads), dim=1)
            query = rms_norm(query, (config.head_dim,), _wide(block.query_norm), config.norm_epsilon)
            key = rms_norm(key, (config.head_dim,), _wide(block.key_norm), config.norm_epsilon)
            turned = torch.cat((query, key), dim=1)
        swapped = torch.cat((turned[..., half:], turned[..., :half]), dim=-1)
        turned = torch.addcmul(turned * cos, swapped, sin)
        return self._cache.attend(
            layer, turned[:, : config.heads], turned[:, config.heads :], heads[:, self._rotated :]
        )

    def _normed(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """RMSNorm (arXiv 1910.07467). One row's is a dot product: half the time of torch's own."""
        config = self._decoder.config
        if hidden.shape[0] > 1:
            return rms_norm(hidden, (config.hidden,), weight, config.norm_epsilon)
        row = hidden[0]
        return torch.mul(hidden, weight).mul_((float(row.dot(row)) / config.hidden + config.norm_epsilon) ** -0.5)


def _wide(weight: Tensor) -> Tensor:
    return weight.float()
