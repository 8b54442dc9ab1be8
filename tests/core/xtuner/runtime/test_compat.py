"""The patches: each does what it says, and InternLM2's generation with them equals greedy decoding without a cache."""

import importlib
from pathlib import Path
from typing import Any

import pytest

from tests.models import write_tiny_internlm2

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]


def config(**values: Any) -> Any:
    from mmengine.config import Config

    base = {
        "optim_wrapper": {
            "type": "AmpOptimWrapper",
            "dtype": "float16",
            "loss_scale": "dynamic",
            "accumulative_counts": 2,
        },
        "model": {"llm": {"torch_dtype": "float16", "quantization_config": {"bnb_4bit_compute_dtype": "float16"}}},
        "env_cfg": {"dist_cfg": {"backend": "nccl"}},
        "train_dataloader": {"num_workers": 0, "dataset": {"type": "process_hf_dataset"}},
    }
    return Config({**base, **values})


def test_generation_equals_greedy_decoding_without_a_cache(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from core.xtuner.runtime.compat import patch_caches

    patch_caches()
    folder = write_tiny_internlm2(tmp_path / "internlm2")
    for attention in ("eager", "sdpa"):
        options = {"trust_remote_code": True, "attn_implementation": attention}
        model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32, **options)
        model.eval()
        assert (
            type(model.model.layers[0].attention).__name__
            == {
                "eager": "InternLM2Attention",
                "sdpa": "InternLM2SdpaAttention",
            }[attention]
        )
        ids = torch.tensor([[3, 40, 50, 60, 70, 4]])
        oracle = ids
        with torch.no_grad():
            for _ in range(24):
                logits = model(input_ids=oracle, use_cache=False).logits
                oracle = torch.cat([oracle, logits[:, -1:].argmax(-1)], dim=1)
            options = {
                "do_sample": False,
                "max_new_tokens": 24,
                "eos_token_id": None,
                "attention_mask": torch.ones_like(ids),
            }
            cached = model.generate(ids, use_cache=True, **options)
        assert cached.tolist() == oracle.tolist()


def test_a_config_for_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from core.xtuner.runtime import compat

    monkeypatch.setattr(torch.cuda, "set_device", torch.cuda.set_device)
    loaded = config()
    applied = {
        patch.name for patch in compat.apply(loaded, compat.Facts(is_cpu=True, model_type="internlm2", rows=2500))
    }
    assert {"bf16_probe", "plain_optim_wrapper", "float32", "internlm2_sdpa", "gloo", "map_processes"} <= applied
    assert loaded.optim_wrapper.to_dict() == {"type": "OptimWrapper", "accumulative_counts": 2}
    assert loaded.model.llm.torch_dtype == torch.float32
    assert loaded.model.llm.quantization_config.bnb_4bit_compute_dtype == torch.float32
    assert loaded.model.llm.attn_implementation == "sdpa"
    assert loaded.env_cfg.dist_cfg.backend == "gloo"
    assert 1 <= loaded.train_dataloader.dataset.map_num_proc <= 3


def test_zero3_on_gloo_waits_for_every_gather(monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.comm.torch import TorchBackend

    from core.xtuner.runtime import compat

    class Work:
        is_done = False

        def wait(self) -> None:
            self.is_done = True

    works = [Work(), None]
    monkeypatch.setattr(TorchBackend, "all_gather_into_tensor", lambda _self, *_args, **_options: works[0])
    facts = {"is_cpu": True, "world_size": 2, "deepspeed": "deepspeed_zero3"}
    needing = [
        {patch.name for patch in compat.PATCHES if patch.is_needed(config(), compat.Facts(**{**facts, **other}))}
        for other in ({}, {"is_cpu": False}, {"world_size": 1}, {"deepspeed": None})
    ]
    assert ["zero3_gathers" in names for names in needing] == [True, False, False, False]
    compat.finish_gathers()
    assert TorchBackend.all_gather_into_tensor(None, "output", "input", async_op=True) is works[0]
    assert works[0].is_done
    works.pop(0)
    assert TorchBackend.all_gather_into_tensor(None, "output", "input") is None


def test_deepspeed_compiles_nothing_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from core.xtuner.runtime import compat

    backend = importlib.import_module("deepspeed.comm.torch")
    monkeypatch.setattr(backend, "build_shm_op", backend.build_shm_op)
    facts = compat.Facts(is_cpu=True, deepspeed="deepspeed_zero2")
    assert "no_shared_memory" in {patch.name for patch in compat.PATCHES if patch.is_needed(config(), facts)}
    compat.skip_shared_memory()
    assert backend.build_shm_op() is None


def test_deepspeed_takes_cards_named_by_their_uuid(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from deepspeed.accelerator import cuda_accelerator

    from core.xtuner.runtime.compat import ask_torch_for_free_memory

    original = cuda_accelerator.CUDA_Accelerator.available_memory
    monkeypatch.setattr(cuda_accelerator.CUDA_Accelerator, "available_memory", original)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-edab8235-271e-9981-8bf5-16f8bc2ac02a")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5 + device, 80))
    accelerator = object.__new__(cuda_accelerator.CUDA_Accelerator)
    with pytest.raises(ValueError, match="invalid literal"):
        accelerator._get_nvml_gpu_id(0)
    ask_torch_for_free_memory()
    assert accelerator.available_memory(1) == 6


def test_a_gpu_config_keeps_its_precision() -> None:
    from core.xtuner.runtime import compat

    loaded = config()
    applied = {patch.name for patch in compat.apply(loaded, compat.Facts(is_cpu=False, model_type="llama"))}
    assert not applied & {"gloo", "float32", "plain_optim_wrapper", "set_device", "internlm2_sdpa"}
    assert loaded.optim_wrapper.type == "AmpOptimWrapper"


def test_a_warmup_without_iterations_is_left_out() -> None:
    import torch
    from mmengine.optim import LinearLR

    from core.xtuner.runtime import compat

    compat.apply(config(), compat.Facts(is_cpu=False))
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    options = {"start_factor": 1e-5, "begin": 0, "end": 0.03, "by_epoch": True}
    scheduler = LinearLR.build_iter_from_epoch(optimizer=optimizer, epoch_length=20, **options)
    for _ in range(3):
        assert optimizer.param_groups[0]["lr"] == 0.5
        optimizer.step()
        scheduler.step()
    real = LinearLR.build_iter_from_epoch(optimizer=optimizer, epoch_length=200, **options)
    assert optimizer.param_groups[0]["lr"] < 0.5
    assert real.end == 6


def test_what_fails_while_saving_leaves_nothing(tmp_path: Path) -> None:
    from core.xtuner.runtime.whole import write_whole

    target, partial = tmp_path / "iter_4.pth", tmp_path / ".iter_4.pth.partial"
    target.write_text("whole")

    def fail() -> None:
        partial.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_whole(partial, target, fail)
    assert target.read_text() == "whole"
    assert not partial.exists()
    write_whole(partial, target, lambda: partial.write_text("new") and None)
    assert (target.read_text(), partial.exists()) == ("new", False)
