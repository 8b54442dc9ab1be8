"""The shell commands that serve a delivered model elsewhere. Starts nothing."""

from typing import Final

SERVED_KINDS: Final = ("fp8", "awq", "gptq")
"""Kinds of deliverables whose weights are in compressed-tensors: vLLM loads them, the chat worker here cannot."""
_LMDEPLOY_GROUPS: Final = (128, 32)
"""Sizes of a group in compressed-tensors that LMDeploy's TurboMind reads (InternLM/lmdeploy, pull request 4429)."""


def serve_commands(folder: str, *, group_size: int | None = None) -> list[str]:
    """For a model in compressed-tensors. `group_size`: of 4-bit weights; None for FP8."""
    commands = [f"vllm serve {folder}"]
    if group_size in _LMDEPLOY_GROUPS:
        commands.append(f"lmdeploy serve api_server {folder} --backend turbomind")
    return commands
