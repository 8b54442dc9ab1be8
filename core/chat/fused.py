"""One decoding step of the decoder with few, large kernels: what a CUDA graph of it replays. Same arithmetic as `Decoder.forward`.

One conversation alone gets six kernels a layer; several at once share the usual matrix products.
"""

from torch import Tensor
from torch.nn.functional import embedding, rms_norm, silu

from core.chat.cache import StaticCache
from core.chat.decoder import Block, Decoder
from core.chat.kernels import Attention, matvec
from core.chat.projection import Projection


class FusedStep:
    """Computes logits for one new token in each row."""

    def __init__(self, decoder: Decoder, cache: StaticCache, rows: int) -> None:
        """`rows`: most rows of a step."""
        self._decoder, self._cache = decoder, cache
        config = decoder.config
        self._epsilon, self._hidden = config.norm_epsilon, config.hidden
        self._attention = Attention(
            rows=rows, heads=config.heads, kv_heads=config.kv_heads, head_dim=config.head_dim,
            epsilon=config.norm_epsilon, device=decoder.device,
        )  # fmt: skip

    def forward(self, tokens: Tensor, order: Tensor, positions: Tensor, tuned: Tensor | None) -> Tensor:
        """Logits (rows, vocabulary). tokens (rows,) stand at positions (rows,) of the slots order (rows,); tuned (rows, 1) or None."""
        hidden = embedding(tokens, self._decoder.embedding)
        step = self._alone if tokens.shape[0] == 1 else self._together
        return step(hidden, order, positions, tuned)

    def _attend(self, layer: int, block: Block, qkv: Tensor, order: Tensor, positions: Tensor) -> Tensor:
        return self._attention.attend(
            qkv=qkv, cache=self._cache.layer(layer), order=order, positions=positions, angles=self._decoder.angles,
            norms=(block.query_norm, block.key_norm),
        )  # fmt: skip

    def _alone(self, hidden: Tensor, order: Tensor, positions: Tensor, tuned: Tensor | None) -> Tensor:
        for layer, block in enumerate(self._decoder.blocks):
            qkv = self._product(hidden, block.qkv, tuned, norm=block.attention_norm)
            attended = self._attend(layer, block, qkv, order, positions)
            hidden = self._product(attended, block.out, tuned, residual=hidden)
            inner = self._product(hidden, block.gate_up, tuned, norm=block.mlp_norm, is_gated=True)
            hidden = self._product(inner, block.down, tuned, residual=hidden)
        return self._product(hidden, self._decoder.head, tuned, norm=self._decoder.norm)

    def _product(
        self,
        x: Tensor,
        projection: Projection,
        tuned: Tensor | None,
        *,
        norm: Tensor | None = None,
        residual: Tensor | None = None,
        is_gated: bool = False,
    ) -> Tensor:
        pair, low, low_b = projection.low_rank, None, None
        if pair is not None and tuned is not None:
            low = matvec(x, pair.a, norm=norm, epsilon=self._epsilon, scale=tuned)
            low_b = pair.b
        return matvec(
            x, projection.weight, norm=norm, epsilon=self._epsilon, bias=projection.bias, residual=residual,
            low=low, low_b=low_b, is_gated=is_gated,
        )  # fmt: skip

    def _together(self, hidden: Tensor, order: Tensor, positions: Tensor, tuned: Tensor | None) -> Tensor:
        for layer, block in enumerate(self._decoder.blocks):
            qkv = block.qkv.apply(self._normed(hidden, block.attention_norm), tuned)
            attended = self._attend(layer, block, qkv, order, positions)
            hidden = hidden + block.out.apply(attended, tuned)
            gate, up = block.gate_up.apply(self._normed(hidden, block.mlp_norm), tuned).chunk(2, dim=-1)
            hidden = hidden + block.down.apply(silu(gate) * up, tuned)
        return self._decoder.head.apply(self._normed(hidden, self._decoder.norm), tuned)

    def _normed(self, hidden: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(hidden, (self._hidden,), weight, self._epsilon)
