"""The model that both sides of the chat benchmark run: InternLM2's shape, weights made here, the same files for both.

Random weights leave bf16 no clear next token: the two largest of 92,544 logits often lie within one rounding step, so any
two programs soon differ. A trained model is surer. So a head is fitted: for 64 prompts, each of the 128 states that
generation goes through gets the row of one token, as in a model that has learned 64 answers by heart.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks.training.case import SHAPES
from core.chat.internlm2 import llama_tensors
from core.chat.weights import DecoderConfig, read_config, tensors, weight_files

PROMPTS: Final = 64
PROMPT_TOKENS: Final = 256
ANSWER_TOKENS: Final = 128
_ROW_NORM: Final = 0.25
"""Length of a fitted row; a random row has about 0.9."""
_SPREAD: Final = 0.02


@dataclass(frozen=True, slots=True)
class Model:
    """A folder with the model, and the prompts (PROMPTS, PROMPT_TOKENS) that its head was fitted to."""

    folder: Path
    prompts: torch.Tensor


def prompts(shape: str) -> torch.Tensor:
    """(PROMPTS, PROMPT_TOKENS) token ids, the same each time."""
    random = torch.Generator().manual_seed(3)
    return torch.randint(5, SHAPES[shape]["vocabulary"], (PROMPTS, PROMPT_TOKENS), generator=random)


def write_model(shape: str, folder: Path, device: torch.device) -> Model:
    """Write config and bf16 weights under InternLM2's own names, head fitted."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(_config(shape)), encoding="utf-8")
    weights = _random_weights(shape, device)
    read = prompts(shape)
    config = read_config(folder)
    assert config is not None
    peer = make_peer(config, weights, torch.bfloat16)
    _fit_head(peer, weights["output.weight"], read.to(device))
    save_file({name: tensor.cpu() for name, tensor in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    return Model(folder, read)


def load_peer(folder: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """The same weights in transformers' Llama."""
    config = read_config(folder)
    assert config is not None
    found = {name: tensor.to(device, dtype) for name, tensor in tensors(weight_files(folder))}
    return make_peer(config, found, dtype)


def make_peer(config: DecoderConfig, weights: dict[str, torch.Tensor], dtype: torch.dtype) -> Any:
    """transformers' Llama on InternLM2's tensors (shared, not copied, where a tensor is not split)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = LlamaConfig(
        vocab_size=config.vocabulary, hidden_size=config.hidden, intermediate_size=_width(weights),
        num_hidden_layers=config.layers, num_attention_heads=config.heads, num_key_value_heads=config.kv_heads,
        max_position_embeddings=config.max_positions, rope_theta=config.rope["rope_theta"],
        rms_norm_eps=config.norm_epsilon, tie_word_embeddings=False, torch_dtype=dtype,
    )  # fmt: skip
    settings._attn_implementation = "sdpa"
    device = next(iter(weights.values())).device
    with torch.device("meta"):
        model = LlamaForCausalLM(settings)
    named: dict[str, torch.Tensor] = {}
    for name, tensor in weights.items():
        named |= llama_tensors(name, tensor, config)
    model.load_state_dict(named, strict=True, assign=True)
    rotary = type(model.model.rotary_emb)(config=settings, device=device)
    model.model.rotary_emb = rotary
    return model.eval()


def generate(model: Any, tokens: torch.Tensor, count: int) -> torch.Tensor:
    """(rows, count) tokens of HF generate, greedy, on whatever device the model is."""
    ids = tokens.to(model.device)
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, min_new_tokens=count, do_sample=False,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    answer: torch.Tensor = out[:, ids.shape[1] :].cpu()
    return answer


def _width(weights: dict[str, torch.Tensor]) -> int:
    return int(weights["model.layers.0.feed_forward.w1.weight"].shape[0])


def _config(shape: str) -> dict[str, Any]:
    sizes = SHAPES[shape]
    return {
        "model_type": "internlm2",
        "vocab_size": sizes["vocabulary"],
        "hidden_size": sizes["hidden"],
        "intermediate_size": sizes["width"],
        "num_hidden_layers": sizes["layers"],
        "num_attention_heads": sizes["heads"],
        "num_key_value_heads": sizes["kv_heads"],
        "max_position_embeddings": 32768,
        "rope_theta": 1000000,
        "rope_scaling": {"type": "dynamic", "factor": 2.0},
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "eos_token_id": 2,
    }


def _random_weights(shape: str, device: torch.device) -> dict[str, torch.Tensor]:
    sizes = SHAPES[shape]
    hidden, width, head = sizes["hidden"], sizes["width"], sizes["hidden"] // sizes["heads"]
    shapes: dict[str, tuple[int, ...]] = {
        "model.tok_embeddings.weight": (sizes["vocabulary"], hidden),
        "model.norm.weight": (hidden,),
        "output.weight": (sizes["vocabulary"], hidden),
    }
    for layer in range(sizes["layers"]):
        prefix = f"model.layers.{layer}"
        shapes |= {
            f"{prefix}.attention.wqkv.weight": ((sizes["heads"] + 2 * sizes["kv_heads"]) * head, hidden),
            f"{prefix}.attention.wo.weight": (hidden, hidden),
            f"{prefix}.feed_forward.w1.weight": (width, hidden),
            f"{prefix}.feed_forward.w3.weight": (width, hidden),
            f"{prefix}.feed_forward.w2.weight": (hidden, width),
            f"{prefix}.attention_norm.weight": (hidden,),
            f"{prefix}.ffn_norm.weight": (hidden,),
        }
    random = torch.Generator(device).manual_seed(5)
    found = {}
    for name, size in shapes.items():
        tensor = torch.ones(size, dtype=torch.bfloat16, device=device)
        found[name] = tensor if len(size) == 1 else tensor.normal_(0.0, _SPREAD, generator=random)
    return found


@torch.inference_mode()  # type: ignore[untyped-decorator]
def _fit_head(model: Any, head: torch.Tensor, tokens: torch.Tensor) -> None:
    """Walk through ANSWER_TOKENS steps of all prompts; each state met becomes the head's row of a token not used before."""
    from transformers import DynamicCache

    vocabulary, steps = head.shape[0], min(ANSWER_TOKENS, (head.shape[0] - 8) // tokens.shape[0])
    fresh = torch.randperm(vocabulary - 8, generator=torch.Generator().manual_seed(4)) + 8
    cache = DynamicCache()
    for step in range(steps):
        states = model.model(input_ids=tokens, past_key_values=cache, use_cache=True).last_hidden_state[:, -1].float()
        chosen = fresh[step * len(states) : (step + 1) * len(states)].to(head.device)
        head[chosen] = (states / states.norm(dim=-1, keepdim=True) * _ROW_NORM).to(head.dtype)
        tokens = chosen[:, None]
