"""Peak memory of training cases under XTuner's own runner: `python -m benchmarks.training.memory_case '[{…}]'`, all in one process.

Stock path: AmpOptimWrapper, or XTuner's own ZeRO-2 settings with its DeepSpeed runner. Random weights made on the GPU, in 4 bits
where the case says so; synthetic packed text. Prints one JSON line a case as it is done; a case that fails says so and the rest goes on.
"""

import gc
import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks.training.case import SHAPES, Case, config_source, make_model_folder, random_llm
from core.xtuner.command import free_port

MARK: Final = "memory-case: "
_STEPS: Final = 2
_ACCUMULATION: Final = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryCase:
    shape: str = "1.8b"
    method: str = "lora"
    batch: int = 1
    length: int = 1024
    checkpointing: bool = True
    engine: str = "amp"
    """`amp` or `deepspeed` (ZeRO-2)"""

    @property
    def name(self) -> str:
        kept = "" if self.checkpointing else " kept"
        return f"{self.shape} {self.method} {self.engine} b{self.batch} s{self.length}{kept}"


def packed_llm(pretrained_model_name_or_path: str, **options: Any) -> Any:
    """The model of `random_llm` with its linear layers packed into 4 bits on the device, the head left as it is (as transformers does)."""
    import bitsandbytes
    from torch import nn

    model = random_llm(pretrained_model_name_or_path, **options)
    for name, module in list(model.named_modules()):
        parent, _, leaf = name.rpartition(".")
        if not isinstance(module, nn.Linear) or leaf in {"output", "lm_head"}:
            continue
        packed = bitsandbytes.nn.Linear4bit(
            module.in_features, module.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4",
            device="meta",
        )  # fmt: skip
        weight = module.weight
        packed.weight = bitsandbytes.nn.Params4bit(
            weight.data, requires_grad=False, compress_statistics=True, quant_type="nf4"
        ).to(weight.device)
        setattr(model.get_submodule(parent), leaf, packed)
        del weight, module
    model.is_loaded_in_4bit = True
    return model


def whole_llm(pretrained_model_name_or_path: str, **options: Any) -> Any:
    """The model of `random_llm` in float32: what AMP's gradient scaler asks of trained weights."""
    return random_llm(pretrained_model_name_or_path, **options).float()


def source_of(case: MemoryCase, folder: Path, work: Path) -> str:
    """The guide's config, as the speed benchmark writes it, for this case."""
    speed = Case(
        side="stock", shape=case.shape, method="lora", length=case.length, batch=case.batch, accumulation=_ACCUMULATION,
        warm_steps=_STEPS, windows=0, checkpointing=case.checkpointing,
    )  # fmt: skip
    text = config_source(speed, folder, work)
    maker = {"qlora": "packed_llm", "full": "whole_llm" if case.engine == "amp" else None}.get(case.method)
    if maker is not None:
        text = text.replace("type=random_llm", f"type={maker}")
        text = text.replace("\nllm = dict(", f"\nfrom benchmarks.training.memory_case import {maker}\nllm = dict(", 1)
    if case.engine == "amp":
        # As the app starts one rank: DistributedDataParallel would hold every gradient twice.
        text = text.replace("launcher = 'pytorch'", "launcher = 'none'")
    if case.method == "full":
        text = "\n".join(line for line in text.splitlines() if "lora=dict(" not in line)
    return text


def with_deepspeed(config: Any) -> None:
    """What XTuner's train.py makes of `--deepspeed deepspeed_zero2`."""
    import xtuner
    from mmengine._strategy import deepspeed as strategies
    from mmengine.config.lazy import LazyObject
    from mmengine.registry import OPTIMIZERS
    from xtuner.tools.utils import auto_dtype_of_deepspeed_config

    if "DeepSpeedCPUAdam" in OPTIMIZERS:
        # Each DeepSpeedStrategy registers the optimizers, and mmengine takes none twice.
        strategies.register_deepspeed_optimizers = lambda: None
    settings = json.loads((Path(xtuner.__file__).parent / "configs/deepspeed/deepspeed_zero2.json").read_text())
    config.strategy = {
        "type": LazyObject("xtuner.engine", "DeepSpeedStrategy"),
        "config": auto_dtype_of_deepspeed_config(settings),
        "gradient_accumulation_steps": _ACCUMULATION,
        "train_micro_batch_size_per_gpu": config.train_dataloader.batch_size,
        "gradient_clipping": 1.0,
        "exclude_frozen_parameters": True,
        "sequence_parallel_size": 1,
    }
    config.optim_wrapper = {"type": "DeepSpeedOptimWrapper", "optimizer": config.optim_wrapper.optimizer}
    config.runner_type = "FlexibleRunner"


def measure(case: MemoryCase, folder: Path, work: Path) -> dict[str, Any]:
    """Bytes allocated before training and at the peak, and reserved at the peak, beyond what lay there before."""
    from mmengine.config import Config
    from mmengine.hooks import Hook
    from mmengine.registry import RUNNERS
    from mmengine.runner import Runner

    on_gpu = torch.cuda.is_available()
    before = torch.cuda.memory_allocated() if on_gpu else 0

    class StaticHook(Hook):  # type: ignore[misc]
        """From here on counts the peak: what building the model took is no part of it."""

        static = 0

        def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
            del runner, data_batch
            if batch_idx == 0 and on_gpu:
                gc.collect()
                torch.cuda.empty_cache()
                StaticHook.static = torch.cuda.memory_allocated() - before
                torch.cuda.reset_peak_memory_stats()

    file = work / "config.py"
    file.write_text(source_of(case, folder, work))
    config = Config.fromfile(file)
    if case.engine == "deepspeed":
        with_deepspeed(config)
        runner = RUNNERS.build(config)
    else:
        runner = Runner.from_cfg(config)
    runner.register_hook(StaticHook())
    runner.train()
    peak = torch.cuda.max_memory_allocated() - before if on_gpu else 0
    reserved = torch.cuda.max_memory_reserved() if on_gpu else 0
    sizes = {"static_bytes": StaticHook.static, "allocated_bytes": peak, "reserved_bytes": reserved}
    return {**sizes, "before_bytes": before}


def release() -> None:
    """Forget the run, so that the next begins with an empty device."""
    from mmengine.logging import MessageHub
    from mmengine.runner import Runner

    for kind in (Runner, MessageHub):
        instances = getattr(kind, "_instance_dict", None)
        if instances is not None:
            instances.clear()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def main(argument: str) -> int:
    os.environ.update({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"})
    os.environ["MASTER_PORT"] = str(free_port())
    if not torch.cuda.is_available():
        torch.cpu.is_bf16_supported = lambda: True  # XTuner asks; torch has no such question
    with tempfile.TemporaryDirectory() as root:
        for number, value in enumerate(json.loads(argument)):
            case = MemoryCase(**value)
            work, folder = Path(root) / f"work_{number}", Path(root) / case.shape
            work.mkdir()
            if not folder.exists():
                make_model_folder(case.shape, folder)
            started = time.perf_counter()
            try:
                result: dict[str, Any] = measure(case, folder, work)
            except Exception as error:  # noqa: BLE001 - whatever stops one case is its result
                result = {"failure": f"{type(error).__name__}: {str(error)[:300]}"}
            release()
            seconds = round(time.perf_counter() - started, 1)
            print(f"{MARK}{json.dumps({'case': value, 'seconds': seconds, **result})}", flush=True)
    return 0


def shape_json(shape: str) -> dict[str, Any]:
    """config.json's fields of a shape, for the budget's formula."""
    sizes = SHAPES[shape]
    return {
        "model_type": "internlm2",
        "hidden_size": sizes["hidden"],
        "num_hidden_layers": sizes["layers"],
        "num_attention_heads": sizes["heads"],
        "num_key_value_heads": sizes["kv_heads"],
        "intermediate_size": sizes["width"],
        "vocab_size": sizes["vocabulary"],
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
