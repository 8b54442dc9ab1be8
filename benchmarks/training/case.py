"""One training case of the `train` benchmark, in a process of its own: `python -m benchmarks.training.case '{"side": "stock", …}'`.

Runs XTuner's own runner (stock, or with the speed layer), or the peer (HF Llama + peft + Liger), on random weights and synthetic
packed text, and prints one JSON line. The same data and the same weights on both sides.
"""

import importlib.util
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch

MARK: Final = "case-result: "
"""Begins the line with the result."""
SHAPES: Final[dict[str, dict[str, int]]] = {
    "1.8b": {"hidden": 2048, "layers": 24, "heads": 16, "kv_heads": 8, "width": 8192, "vocabulary": 92544},
    "7b": {"hidden": 4096, "layers": 32, "heads": 32, "kv_heads": 8, "width": 14336, "vocabulary": 92544},
    "0.6b": {"hidden": 2048, "layers": 4, "heads": 16, "kv_heads": 8, "width": 8192, "vocabulary": 92544},
    "tiny": {"hidden": 64, "layers": 2, "heads": 4, "kv_heads": 2, "width": 160, "vocabulary": 512},
}
"""InternLM2's shapes; 0.6b is the 1.8b one with 4 layers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    side: str
    """stock, fast or peer"""
    shape: str = "1.8b"
    method: str = "lora"
    length: int = 2048
    batch: int = 1
    accumulation: int = 16
    warm_steps: int = 1
    """Optimizer steps before measuring."""
    windows: int = 3
    window_steps: int = 1
    dropout: float = 0.1
    seed: int = 7
    learning_rate: float = 2e-4
    memory_limit_gib: float | None = None
    parts: str | list[str] = "auto"
    tokens_per_pass: int | None = None
    keeps_losses: bool = False
    precision: str = "bf16"
    """bf16 (mmengine's AMP, as the guide) or fp32"""
    checkpointing: bool = True

    @property
    def steps(self) -> int:
        return self.warm_steps + self.windows * self.window_steps


def synthetic_rows(case: str) -> Any:
    """Documents of 64–1024 tokens with a structure that can be learned (a noisy walk over a skewed vocabulary), all tokens trained."""
    import datasets
    import numpy

    settings = Case(**json.loads(case))
    return _rows(settings, datasets, numpy)


def _rows(case: Case, datasets: Any, numpy: Any) -> Any:
    random = numpy.random.default_rng(11)
    vocabulary = SHAPES[case.shape]["vocabulary"]
    wanted = (case.steps * case.accumulation * case.batch + 2) * case.length
    rows: list[list[int]] = []
    total = 0
    while total < wanted:
        count = int(random.integers(64, 1024))
        steps = random.integers(1, 17, count).cumsum() + int(random.integers(0, 4096))
        noise = random.integers(3, vocabulary, count)
        rows.append(numpy.where(random.random(count) < 0.1, noise, 3 + steps % min(4096, vocabulary - 3)).tolist())
        total += count
    return datasets.Dataset.from_dict({"input_ids": rows, "labels": rows})


def make_model_folder(shape: str, folder: Path) -> Path:
    """InternLM2's own modeling code (from the installed XTuner) and a config of this shape; no weights yet."""
    import xtuner

    source = Path(xtuner.__file__).parent / "_lite" / "modelings" / "internlm2"
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("configuration_internlm2.py", "modeling_internlm2.py"):
        shutil.copy(source / name, folder / name)
    sizes = SHAPES[shape]
    config = {
        "model_type": "internlm2",
        "architectures": ["InternLM2ForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_internlm2.InternLM2Config",
            "AutoModelForCausalLM": "modeling_internlm2.InternLM2ForCausalLM",
        },
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
        "bias": False,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "pad_token_id": 2,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def random_llm(pretrained_model_name_or_path: str, **options: Any) -> Any:
    """A causal model of the folder's config with random bf16 weights, made where it will run; the same for the same seed."""
    from transformers import AutoConfig, AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    # InternLM2's own code reads the attention from its config, where from_pretrained puts it and from_config does not.
    attention = {"attn_implementation": options.get("attn_implementation") or "sdpa"}
    config = AutoConfig.from_pretrained(pretrained_model_name_or_path, trust_remote_code=True, **attention)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            config, trust_remote_code=True, torch_dtype=torch.bfloat16, **attention
        )
        generator = torch.Generator(device).manual_seed(5)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0.0, 0.02, generator=generator)
                else:
                    parameter.fill_(1.0)
    return model


def saved_llm(folder: Path) -> Path:
    """The same model with its weights in the folder, for loaders that must read them (4-bit)."""
    if not (folder / "config.json").is_file() or not list(folder.glob("*.safetensors")):
        shape_folder = str(folder)
        random_llm(shape_folder).save_pretrained(folder, safe_serialization=True, max_shard_size="2GB")
    return folder


class Meter:
    """Measures windows of optimizer steps; an mmengine hook in all but name for the peer."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.times: list[float] = []
        self.losses: list[float] = []
        self.pending: list[torch.Tensor] = []
        self.memory_bytes = 0

    def step_done(self, step: int) -> None:
        """`step` optimizer steps are done."""
        since = step - self.case.warm_steps
        if since >= 0 and since % self.case.window_steps == 0:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
                if since == 0:
                    torch.cuda.reset_peak_memory_stats()
            self.times.append(time.perf_counter())

    def result(self) -> dict[str, Any]:
        tokens = self.case.length * self.case.batch * self.case.accumulation * self.case.window_steps
        spans = [stop - start for start, stop in zip(self.times[:-1], self.times[1:], strict=True)]
        rates = [tokens / span for span in spans]
        on_gpu = torch.cuda.is_available()
        return {
            "tokens_per_second": statistics.median(rates),
            "window_tokens_per_second": [round(rate) for rate in rates],
            "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None,
            "reserved_memory_gib": torch.cuda.max_memory_reserved() / 2**30 if on_gpu else None,
            "losses": [round(float(loss), 5) for loss in self.losses],
        }


CONFIG_SOURCE: Final = """
import torch
from mmengine.dataset import DefaultSampler
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from peft import LoraConfig
from torch.optim import AdamW
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from xtuner.dataset import process_hf_dataset
from xtuner.dataset.collate_fns import default_collate_fn
from xtuner.engine.runner import TrainLoop
from xtuner.model import SupervisedFinetune

from benchmarks.training.case import random_llm, synthetic_rows

max_length = {length!r}
batch_size = {batch!r}
accumulative_counts = {accumulation!r}
llm = dict(
    type={loader},
    pretrained_model_name_or_path={folder!r},
    trust_remote_code=True,
    torch_dtype=torch.bfloat16,
    attn_implementation='sdpa',
    {quantization}
)
model = dict(
    type=SupervisedFinetune, use_varlen_attn=False, llm=llm, use_activation_checkpointing={checkpointing!r},
    lora=dict(type=LoraConfig, r=64, lora_alpha=16, lora_dropout={dropout!r}, bias='none', task_type='CAUSAL_LM'),
)
train_dataset = dict(
    type=process_hf_dataset, dataset=dict(type=synthetic_rows, case={case!r}), do_dataset_tokenization=False,
    max_length=max_length, remove_unused_columns=True, shuffle_before_pack=False, pack_to_max_length=True, map_num_proc=1,
)
train_dataloader = dict(
    batch_size=batch_size, num_workers=0, dataset=train_dataset, sampler=dict(type=DefaultSampler, shuffle=True, seed=11),
    collate_fn=dict(type=default_collate_fn, use_varlen_attn=False),
)
optim_wrapper = dict(
    type=AmpOptimWrapper, loss_scale='dynamic', dtype='bfloat16',
    optimizer=dict(type=AdamW, lr={learning_rate!r}, betas=(0.9, 0.999), weight_decay=0),
    clip_grad=dict(max_norm=1, error_if_nonfinite=False), accumulative_counts=accumulative_counts,
)
if not {with_amp!r}:
    optim_wrapper['type'] = OptimWrapper
    del optim_wrapper['loss_scale'], optim_wrapper['dtype']
param_scheduler = []
train_cfg = dict(type=TrainLoop, max_iters={iterations!r})
default_hooks = dict(checkpoint=None, logger=None)
custom_hooks = []
work_dir = {work!r}
experiment_name = {name!r}
launcher = {launcher!r}
env_cfg = dict(dist_cfg=dict(backend='nccl'))
randomness = dict(seed={seed!r})
log_level = 'INFO'
visualizer = None
resume = False
load_from = None
log_processor = dict(by_epoch=False)
"""


_QUANTIZATION: Final = (
    "quantization_config=dict(type=BitsAndBytesConfig, load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16, "
    "bnb_4bit_use_double_quant=True, bnb_4bit_quant_type='nf4'),"
)


def config_source(case: Case, folder: Path, work: Path) -> str:
    """The guide's config for this case, as source text."""
    on_gpu, is_packed = torch.cuda.is_available(), case.method == "qlora"
    return CONFIG_SOURCE.format(
        folder=str(folder), loader="AutoModelForCausalLM.from_pretrained" if is_packed else "random_llm",
        quantization=_QUANTIZATION if is_packed else "", checkpointing=case.checkpointing, dropout=case.dropout,
        case=json.dumps(asdict(case)), length=case.length, batch=case.batch, learning_rate=case.learning_rate,
        accumulation=case.accumulation, with_amp=on_gpu and case.precision == "bf16",
        iterations=case.steps * case.accumulation, work=str(work), name=work.name,
        launcher="pytorch" if on_gpu else "none", seed=case.seed,
    )  # fmt: skip


def xtuner_config(case: Case, folder: Path, work: Path) -> Any:
    """The same, written to a file and read as mmengine reads any."""
    from mmengine.config import Config

    file = work / "config.py"
    file.write_text(config_source(case, folder, work))
    return Config.fromfile(file)


def run_xtuner(case: Case, folder: Path, work: Path) -> dict[str, Any]:
    """Train the case with XTuner's runner, stock or with the speed layer."""
    from mmengine.hooks import Hook
    from mmengine.runner import Runner

    from core.xtuner.runtime.speed import install, parts

    if not torch.cuda.is_available():
        torch.cpu.is_bf16_supported = lambda: True  # XTuner asks; torch has no such question
    config = xtuner_config(case, folder, work)
    if case.side == "fast":
        limit = None if case.memory_limit_gib is None else int(case.memory_limit_gib * 2**30)
        install.prepare(config, parts.Wish.from_json({**asdict(case), "memory_limit_bytes": limit}))
    meter = Meter(case)

    class MeterHook(Hook):  # type: ignore[misc]
        priority = "LOWEST"

        def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
            del runner, data_batch
            if case.keeps_losses:
                meter.losses.append(float(outputs["loss"]))
            if (batch_idx + 1) % case.accumulation == 0:
                meter.step_done((batch_idx + 1) // case.accumulation)

    runner = Runner.from_cfg(config)
    runner.register_hook(MeterHook())
    runner.train()
    return {**meter.result(), "parts": [_spoken(report) for report in parts.read_reports(work)]}


def _spoken(report: Any) -> dict[str, Any]:
    from core.i18n import catalog

    return {"name": report.name, "applied": report.applied, "note": catalog("en").say(report.note)}


def run_peer(case: Case) -> dict[str, Any]:
    """HF Llama of the same shape + peft, with Liger where it can be imported: bf16 weights, fused AdamW, a bare loop."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    with_liger = importlib.util.find_spec("liger_kernel") is not None
    if with_liger:
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama()
    sizes = SHAPES[case.shape]
    config = LlamaConfig(
        vocab_size=sizes["vocabulary"], hidden_size=sizes["hidden"], intermediate_size=sizes["width"],
        num_hidden_layers=sizes["layers"], num_attention_heads=sizes["heads"], num_key_value_heads=sizes["kv_heads"],
        max_position_embeddings=32768, rope_theta=1000000.0,
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    torch.manual_seed(case.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        llm = LlamaForCausalLM(config).to(torch.bfloat16)
    llm.config.use_cache = False
    adapter = LoraConfig(
        r=64, lora_alpha=16, lora_dropout=case.dropout, bias="none", task_type="CAUSAL_LM", target_modules="all-linear"
    )
    model: Any = get_peft_model(llm, adapter)
    if case.checkpointing:
        llm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        llm.enable_input_require_grads()
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=case.learning_rate, weight_decay=0.0, fused=device == "cuda")
    meter = Meter(case)
    ids = torch.randint(3, sizes["vocabulary"], (case.batch, case.length), device=device)
    for step in range(case.steps):
        for _ in range(case.accumulation):
            with torch.autocast(device, torch.bfloat16):
                loss = model(input_ids=ids, labels=ids).loss / case.accumulation
            loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        meter.step_done(step + 1)
    return {**meter.result(), "with_liger": with_liger}


def main(argument: str) -> int:
    case = Case(**json.loads(argument))
    os.environ.update({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"})
    os.environ.setdefault("MASTER_PORT", "29611")
    cache = Path(os.environ.get("DANLU_BENCH_CACHE", tempfile.gettempdir())) / f"danlu_bench_{case.shape}"
    started = time.perf_counter()
    if case.memory_limit_gib is not None and torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(case.memory_limit_gib * 2**30 / total)
    if case.side == "peer":
        result = run_peer(case)
    else:
        make_model_folder(case.shape, cache)
        if case.method == "qlora":
            saved_llm(cache)
        with tempfile.TemporaryDirectory() as work:
            result = run_xtuner(case, cache, Path(work))
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    print(
        f"\n{MARK}" + json.dumps({"case": asdict(case), "seconds": round(time.perf_counter() - started, 1), **result})
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
