"""What of a config and its start decides how much memory a rank takes. Reads the source, runs nothing."""

from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

from core.config.deepspeed import Zero, zero_of_choice
from core.config.edits import method_of
from core.config.source import ConfigSource
from core.config.values import Code
from core.xtuner.runtime.speed import parts
from core.xtuner.runtime.speed.parts import Wish

_XTUNER_DEFAULT_RANK: Final = 8
"""peft's own default for `r`."""
_STOCK: Final = Wish(frozenset())


class Engine(StrEnum):
    """Who drives the steps. It decides in which precision frozen weights and residuals lie."""

    AMP = "amp"
    """XTuner's runner with AmpOptimWrapper: peft lifts all 16-bit weights of a LoRA base to float32, autocast casts them at each use."""
    DEEPSPEED = "deepspeed"
    """DeepSpeed's engine: everything in 16 bits, float32 masters of what is trained."""
    PLAIN = "plain"
    """XTuner's runner with OptimWrapper: no autocast, all in the dtype of the weights."""


class Attention(StrEnum):
    SDPA = "sdpa"
    FLASH = "flash_attention_2"
    EAGER = "eager"


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """The numbers of one training."""

    method: str = "lora"
    """`qlora`, `lora` or `full`."""
    batch_size: int = 1
    length: int = 2048
    """Tokens of one sample on this rank: the maximum, which packed samples have."""
    accumulation: int = 1
    accumulation_step: int = 1
    """What the accumulation is a multiple of: configs multiply it by the sequence-parallel size."""
    is_checkpointing: bool = True
    attention: Attention = Attention.SDPA
    rank: int = 64
    dropout: float = 0.1
    targets: tuple[str, ...] | None = None
    """Names of the linear layers that get an adapter; None: XTuner looks for all, the head of InternLM2 included."""
    bits: int = 4
    """Of a quantised base."""
    is_double_quantized: bool = True
    engine: Engine = Engine.AMP
    weights: str = "float32"
    """dtype the base is loaded in: `float32`, `float16`, `bfloat16`."""
    world_size: int = 1
    stage: int = 0
    """ZeRO stage; 0 without DeepSpeed."""
    is_offloaded: bool = False
    """Optimizer states lie in RAM."""
    offloads_parameters: bool = False
    """So do the weights between their uses; stage 3 only."""
    bucket_elements: int = 500_000_000
    """DeepSpeed's reduce_bucket_size."""
    overlaps: bool = True
    """`overlap_comm`, which XTuner's settings switch on: stages 1 and 2 hold two buckets."""
    live_elements: int = 1_000_000_000
    """ZeRO-3's stage3_max_live_parameters."""
    wish: Wish = _STOCK
    """What the speed layer is asked for."""

    @property
    def is_fast(self) -> bool:
        return parts.FAST_PASS in self.wish

    @property
    def tokens(self) -> int:
        """Of one micro-batch."""
        return self.batch_size * self.length

    @property
    def is_adapted(self) -> bool:
        return self.method != "full"

    def has_adapter(self, name: str) -> bool:
        """Whether the linear layer of this name gets an adapter."""
        return self.is_adapted and (self.targets is None or name in self.targets)


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """How training will be started, as far as memory depends on it."""

    world_size: int = 1
    deepspeed: str | None = None
    zero: Zero | None = None
    """Of the DeepSpeed JSON; None: what XTuner's setting of that name says."""
    has_flash_attention: bool = False
    wish: Wish = _STOCK
    """What the speed layer is asked for."""
    is_patched: bool = True
    """Our runtime starts it, which gives InternLM2 sdpa where the config says nothing; False for a bare `xtuner train`."""


def read_setup(source: ConfigSource, start: Start, *, model_type: str = "", stored: str = "bfloat16") -> Setup:
    """The setup of a config and its start. `stored`: dtype of the weight files, which `torch_dtype="auto"` takes."""
    deepspeed = start.deepspeed or ""
    zero = start.zero or zero_of_choice(deepspeed)
    setup = Setup(
        method=method_of(source),
        batch_size=_whole(source, "batch_size", 1),
        length=max(1, _whole(source, "max_length", 2048) // _whole(source, "sequence_parallel_size", 1)),
        accumulation=_whole(source, "accumulative_counts", 1),
        accumulation_step=_step(source),
        is_checkpointing=source.get("model.use_activation_checkpointing", True) is not False,
        attention=_attention(source, model_type, start),
        engine=_engine(source, deepspeed),
        weights=_weights(source, stored),
        world_size=start.world_size,
        stage=zero.stage,
        is_offloaded=zero.offloads_optimizer,
        offloads_parameters=zero.offloads_parameters,
        bucket_elements=zero.bucket_elements,
        overlaps=zero.overlaps,
        live_elements=zero.live_elements,
        wish=start.wish,
    )
    if setup.method == "full":
        return setup
    targets = source.get("model.lora.target_modules", None)
    names = tuple(str(name) for name in targets) if isinstance(targets, list | tuple) else None
    quantization = "model.llm.quantization_config"
    is_in_8_bits = source.get(f"{quantization}.load_in_8bit", False) is True
    return replace(
        setup,
        rank=_whole(source, "model.lora.r", _XTUNER_DEFAULT_RANK),
        dropout=float(_number(source, "model.lora.lora_dropout", 0.0)),
        targets=names,
        bits=8 if is_in_8_bits and source.get(f"{quantization}.load_in_4bit", False) is not True else 4,
        is_double_quantized=source.get(f"{quantization}.bnb_4bit_use_double_quant", False) is True,
    )


def _step(source: ConfigSource) -> int:
    written, used = source.get("accumulative_counts", 1), source.effective("accumulative_counts", 1)
    return max(1, used // written) if isinstance(written, int) and isinstance(used, int) and written > 0 else 1


def _engine(source: ConfigSource, deepspeed: str) -> Engine:
    if deepspeed:
        return Engine.DEEPSPEED
    return Engine.AMP if source.type_name("optim_wrapper") == "AmpOptimWrapper" else Engine.PLAIN


def _weights(source: ConfigSource, stored: str) -> str:
    """dtype that transformers loads the weights in; where the config is silent it is float32 (transformers 4)."""
    written = source.get("model.llm.torch_dtype", None)
    name = str(written).rpartition(".")[2] if written is not None else "float32"
    return stored if name == "auto" else name


def _attention(source: ConfigSource, model_type: str, start: Start) -> Attention:
    """What XTuner 0.2.0 takes (xtuner/model/sft.py, _prepare_for_flash_attn): its own choice only where the config has none."""
    written = source.get("model.llm.attn_implementation", None)
    if isinstance(written, str) and not isinstance(written, Code) and written in set(Attention):
        return Attention(written)
    if start.has_flash_attention:
        return Attention.FLASH
    return Attention.EAGER if model_type == "internlm2" and not start.is_patched else Attention.SDPA


def _number(source: ConfigSource, path: str, default: float) -> float:
    value: Any = source.effective(path, default)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else default


def _whole(source: ConfigSource, path: str, default: int) -> int:
    return max(1, int(_number(source, path, default)))


def model_folder(source: ConfigSource) -> Path | None:
    """The folder the config names as base model; None for an expression."""
    named = source.get("model.llm.pretrained_model_name_or_path", None)
    return Path(named) if isinstance(named, str) and not isinstance(named, Code) else None
