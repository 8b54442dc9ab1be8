"""Every patch that XTuner 0.2.0 needs with current libraries, each with its reason, versions and condition. The only place for them.

A patch changes a library in this process, or the loaded config; never a file. `apply` says which were applied and why.
"""

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Final

from core.data.arithmetic import map_num_proc


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What the patches depend on."""

    is_cpu: bool
    world_size: int = 1
    deepspeed: str | None = None
    model_type: str = ""
    """Of the base model's config.json."""
    rows: int | None = None
    """Of the training data, if known."""

    @property
    def has_flash_attention(self) -> bool:
        return not self.is_cpu and importlib.util.find_spec("flash_attn") is not None


@dataclass(frozen=True, slots=True)
class Patch:
    """One change, with the reason that goes to the log."""

    name: str
    reason: str
    versions: str
    """Which versions of which library need it."""
    is_needed: Callable[[Any, Facts], bool]
    make: Callable[[Any, Facts], None]


def apply(config: Any, facts: Facts) -> list[Patch]:
    """Apply every patch that is needed to the libraries and to `config` (a loaded mmengine Config, changed in place)."""
    applied = [patch for patch in PATCHES if patch.is_needed(config, facts)]
    for patch in applied:
        patch.make(config, facts)
    return applied


def patch_caches() -> None:
    """Give transformers' cache classes the methods that InternLM2's remote code calls; harmless where they exist."""
    from transformers import cache_utils

    for name in ("Cache", "DynamicCache", "StaticCache"):
        cls = getattr(cache_utils, name, None)
        if cls is None:
            continue
        for old in ("get_max_length", "get_max_cache"):
            if not hasattr(cls, old):
                setattr(cls, old, _max_length)
        if not hasattr(cls, "get_usable_length"):
            cls.get_usable_length = _usable_length


def _max_length(cache: Any) -> int | None:
    """None for a cache that grows, as it was before transformers 4.49; get_max_cache_shape says -1 for that in later versions."""
    length = cache.get_max_cache_shape()
    return None if length is None or length < 0 else int(length)


def _usable_length(cache: Any, new_length: int, layer_idx: int = 0) -> int:
    held, limit = int(cache.get_seq_length(layer_idx)), _max_length(cache)
    return limit - new_length if limit is not None and held + new_length > limit else held


def _patch_bf16_probe(_config: Any, _facts: Facts) -> None:
    import torch

    torch.cpu.is_bf16_supported = lambda: True


def _patch_set_device(_config: Any, _facts: Facts) -> None:
    import torch

    torch.cuda.set_device = lambda _device: None


def _patch_cpu_packing(_config: Any, _facts: Facts) -> None:
    from bitsandbytes.nn import modules

    modules.has_avx512bf16 = lambda: False


def _patch_warmup(_config: Any, _facts: Facts) -> None:
    from mmengine.optim import LinearLR

    build = LinearLR.build_iter_from_epoch.__func__

    def build_iter_from_epoch(cls: Any, *args: Any, **options: Any) -> Any:
        length, begin, end = options["epoch_length"], options.get("begin", 0), options.get("end")
        if end is not None and int(begin * length) >= int(end * length):
            optimizer = args[0] if args else options["optimizer"]
            start = int(begin * length)
            return cls(optimizer, start_factor=1.0, end_factor=1.0, begin=start, end=start + 1, by_epoch=False)
        return build(cls, *args, **options)

    LinearLR.build_iter_from_epoch = classmethod(build_iter_from_epoch)


def _patch_epoch_sleep(_config: Any, _facts: Facts) -> None:
    import time

    from mmengine.runner import loops

    kept = {name: getattr(time, name) for name in ("time", "perf_counter", "monotonic")}
    loops.time = SimpleNamespace(sleep=lambda _seconds: None, **kept)


def finish_gathers() -> None:
    """Let DeepSpeed's ZeRO-3 train on gloo: every all-gather has ended when the call that starts it returns.

    `Init._allgather_params_coalesced` starts one all-gather per parameter and waits for the last one. NCCL ends them in that order,
    gloo's two threads do not: a step then computes with weights that have not arrived. Beside three busy loops on two cores, 5 of 66
    equal trainings differed in some loss, up to NaN elsewhere; with this, none of 200.
    """
    from deepspeed.comm.torch import TorchBackend

    gather = TorchBackend.all_gather_into_tensor

    def finished(self: Any, *args: Any, **options: Any) -> Any:
        work = gather(self, *args, **options)
        if work is not None:
            work.wait()
        return work

    TorchBackend.all_gather_into_tensor = finished


def skip_shared_memory() -> None:
    """Let DeepSpeed begin on a CPU without its shared-memory extension, which only inference calls.

    It compiles it when the process group is made: a minute or two, with every rank waiting for a lock file. A process killed
    meanwhile leaves the file, and every later training on this machine waits for ever.
    """
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # type: ignore[attr-defined]


def ask_torch_for_free_memory() -> None:
    """Let DeepSpeed ask torch how much of a card is free: NVML's own number of it can be read from numbers only."""
    import torch
    from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator

    def available_memory(_self: Any, device_index: int | None = None) -> int:
        return int(torch.cuda.mem_get_info(device_index)[0])

    CUDA_Accelerator.available_memory = available_memory


def _set_gloo(config: Any, _facts: Facts) -> None:
    config.merge_from_dict({"env_cfg": {"dist_cfg": {"backend": "gloo"}}})


def _set_plain_optim_wrapper(config: Any, _facts: Facts) -> None:
    wrapper = config.optim_wrapper
    wrapper["type"] = "OptimWrapper"
    for key in ("loss_scale", "dtype", "use_fp16"):
        wrapper.pop(key, None)


def _set_float32(config: Any, _facts: Facts) -> None:
    import torch

    for llm in _language_models(config):
        llm["torch_dtype"] = torch.float32
        quantization = llm.get("quantization_config")
        if quantization is not None:
            quantization["bnb_4bit_compute_dtype"] = torch.float32


def _set_ddp_on_cpu(config: Any, _facts: Facts) -> None:
    # Without the None mmengine fills in the local rank as the device.
    config.model_wrapper_cfg = {"type": "MMDistributedDataParallel", "broadcast_buffers": False, "device_ids": None}


def _set_sdpa(config: Any, _facts: Facts) -> None:
    for llm in _language_models(config):
        if llm.get("attn_implementation") is None:
            llm["attn_implementation"] = "sdpa"


def _set_map_processes(config: Any, facts: Facts) -> None:
    for dataset in _datasets(config.train_dataloader.dataset):
        if "map_num_proc" not in dataset:
            dataset["map_num_proc"] = map_num_proc(facts.rows or 0)


def _language_models(config: Any) -> Iterator[Any]:
    llm = (config.get("model") or {}).get("llm")
    if isinstance(llm, dict):
        yield llm


def _datasets(dataset: Any) -> Iterator[Any]:
    """The data sets that XTuner tokenises itself: one, or those joined in a ConcatDataset."""
    if not isinstance(dataset, dict):
        return
    if type_name(dataset.get("type")) == "process_hf_dataset":
        yield dataset
    for inner in dataset.get("datasets") or []:
        yield from _datasets(inner)


def type_name(value: Any) -> str:
    """Last part of the name of a config's `type`: a class, a function, a dotted string or one of mmengine's lazy objects."""
    name = getattr(value, "__name__", None)
    return name if isinstance(name, str) else str(value).split(".")[-1]


def _is_amp(config: Any) -> bool:
    return type_name(config.optim_wrapper.get("type")) == "AmpOptimWrapper"


def _has_no_workers(config: Any) -> bool:
    return not (config.get("train_dataloader") or {}).get("num_workers", 0)


PATCHES: Final[tuple[Patch, ...]] = (
    Patch(
        "caches",
        "InternLM2's remote code asks caches for get_max_length, which is gone; generation fails without it",
        "transformers >= 4.49",
        lambda _config, facts: facts.model_type in {"internlm2", "internlm3", "internlm"},
        lambda _config, _facts: patch_caches(),
    ),
    Patch(
        "bf16_probe",
        "XTuner asks torch.cpu.is_bf16_supported, which does not exist",
        "xtuner 0.2.0, every torch",
        lambda _config, facts: facts.is_cpu,
        _patch_bf16_probe,
    ),
    Patch(
        "set_device",
        "mmengine sets a CUDA device when it joins the process group, with or without a GPU",
        "mmengine <= 0.10.7",
        lambda _config, facts: facts.is_cpu,
        _patch_set_device,
    ),
    Patch("gloo", "NCCL needs GPUs", "any", lambda _config, facts: facts.is_cpu, _set_gloo),
    Patch(
        "plain_optim_wrapper",
        "AmpOptimWrapper trains on GPUs only; on CPU the arithmetic is float32",
        "mmengine <= 0.10.7",
        lambda config, facts: facts.is_cpu and _is_amp(config),
        _set_plain_optim_wrapper,
    ),
    Patch("float32", "float16 is slow or missing on CPU", "any", lambda _config, facts: facts.is_cpu, _set_float32),
    Patch(
        "cpu_packing",
        "bitsandbytes packs 4-bit weights anew for sample answers, in a form that has no backward pass: the run dies after them",
        "bitsandbytes >= 0.49 on CPUs with AVX512-BF16",
        lambda config, facts: facts.is_cpu and any(llm.get("quantization_config") for llm in _language_models(config)),
        _patch_cpu_packing,
    ),
    Patch(
        "ddp_on_cpu",
        "mmengine passes a GPU number to DistributedDataParallel",
        "mmengine <= 0.10.7",
        lambda _config, facts: facts.is_cpu and facts.world_size > 1 and not facts.deepspeed,
        _set_ddp_on_cpu,
    ),
    Patch(
        "no_shared_memory",
        "DeepSpeed compiles an extension for inference at its first start on a CPU; killed meanwhile, it blocks every later start",
        "deepspeed <= 0.19.6",
        lambda _config, facts: facts.is_cpu and bool(facts.deepspeed),
        lambda _config, _facts: skip_shared_memory(),
    ),
    Patch(
        "free_memory",
        "DeepSpeed takes CUDA_VISIBLE_DEVICES for numbers and fails where it names cards by their UUID, as a run's does",
        "deepspeed <= 0.19.6",
        lambda _config, facts: not facts.is_cpu and bool(facts.deepspeed),
        lambda _config, _facts: ask_torch_for_free_memory(),
    ),
    Patch(
        "zero3_gathers",
        "ZeRO-3 waits for the last of several all-gathers only, and gloo may end the others later: wrong weights, up to NaN",
        "deepspeed <= 0.19.6 on gloo",
        lambda _config, facts: facts.is_cpu and facts.world_size > 1 and bool(facts.deepspeed),
        lambda _config, _facts: finish_gathers(),
    ),
    Patch(
        "internlm2_sdpa",
        "XTuner leaves InternLM2 on eager attention, whose memory grows with the square of the length",
        "xtuner 0.2.0 without flash-attn",
        lambda _config, facts: facts.model_type == "internlm2" and not facts.has_flash_attention,
        _set_sdpa,
    ),
    Patch(
        "full_precision_weights",
        "with flash-attn XTuner forces 16-bit weights, which the gradient scaler cannot unscale without DeepSpeed",
        "xtuner 0.2.0 with flash-attn (issue 960)",
        lambda config, facts: facts.has_flash_attention and not facts.deepspeed and not config.model.get("lora"),
        _set_sdpa,
    ),
    Patch(
        "zero_warmup",
        "a warm-up shorter than one iteration stops XTuner with 'end should be larger than begin'; it is left out",
        "mmengine <= 0.10.7",
        lambda _config, _facts: True,
        _patch_warmup,
    ),
    Patch(
        "epoch_sleep",
        "mmengine sleeps two seconds between epochs against a deadlock of loader processes; there are none",
        "mmengine <= 0.10.7",
        lambda config, _facts: _has_no_workers(config),
        _patch_epoch_sleep,
    ),
    Patch(
        "map_processes",
        "each of XTuner's 32 tokenising processes drops its last incomplete sample: up to 17 % of a small set",
        "xtuner 0.2.0",
        lambda config, _facts: any(
            "map_num_proc" not in dataset
            for dataset in _datasets((config.get("train_dataloader") or {}).get("dataset"))
        ),
        _set_map_processes,
    ),
)
