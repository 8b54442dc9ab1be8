"""The Triton kernels, under Triton's own interpreter on the CPU: a step with them gives what the decoder's own operations give."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.core.chat.test_decoder import CPU, WRITERS, begin, make_decoder, prompt
from tests.models import write_tiny_llama

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.engine
ROOT = Path(__file__).parents[3]


def compare(folder: Path, adapter: Path | None) -> None:
    """One row alone, then two rows of a batch whose slots are not next to each other; logits, then tokens."""
    from core.chat.graphs import GraphRunner

    decoder = make_decoder(folder, adapter, "plain")  # as on a GPU
    fused, plain = (
        GraphRunner(decoder, 3, 256, has_adapter=adapter is not None, is_fused=is_fused) for is_fused in (True, False)
    )
    for slots in ([1], [0, 2]):
        for runner in (fused, plain):
            for slot in slots:
                begin(runner, slot, prompt(10 + 15 * slot, slot), tuned=slot != 0)
        with torch.inference_mode():
            order, every = torch.tensor(slots), torch.arange(max(slots) + 1)
            got = fused.logits(order, fused._positions[order], 256)
            expected = plain.logits(every, plain._positions[every], 256)[slots]
        torch.testing.assert_close(got, expected, atol=2e-4, rtol=1e-3)
        assert fused.start_step(slots).tokens() == plain.start_step(slots).tokens()
        for runner in (fused, plain):
            for slot in slots:
                runner.end(slot)


def run_interpreted(folder: Path, adapter: Path | None = None) -> str:
    """`compare` in a process in which Triton interprets: it decides that when kernels are defined."""
    arguments = [str(folder), *([str(adapter)] if adapter else [])]
    done = subprocess.run(
        [sys.executable, "-m", "tests.core.chat.test_kernels", *arguments],
        cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=1200, check=False,
    )  # fmt: skip
    return done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.parametrize("family", WRITERS)
def test_a_step_with_kernels_is_the_same_step(tmp_path: Path, family: str) -> None:
    assert run_interpreted(WRITERS[family](tmp_path / family, layers=1)).strip() == "same"


def test_a_step_with_kernels_and_an_adapter_for_some_rows(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    folder, adapter = write_tiny_llama(tmp_path / "llama", layers=1), tmp_path / "adapter"
    adapter.mkdir()
    sizes = {
        "self_attn.q_proj": (64, 64),
        "self_attn.v_proj": (64, 32),
        "mlp.up_proj": (64, 128),
        "mlp.down_proj": (128, 64),
    }
    random = torch.Generator().manual_seed(1)
    pairs = {}
    for module, (inputs, outputs) in sizes.items():
        name = f"base_model.model.model.layers.0.{module}"
        pairs[f"{name}.lora_A.weight"] = torch.randn(4, inputs, generator=random) * 0.3
        pairs[f"{name}.lora_B.weight"] = torch.randn(outputs, 4, generator=random) * 0.3
    save_file(pairs, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4, "lora_alpha": 4}')
    assert run_interpreted(folder, adapter).strip() == "same"


if __name__ == "__main__":
    assert CPU.type == "cpu"
    compare(Path(sys.argv[1]), Path(sys.argv[2]) if sys.argv[2:] else None)
    print("same")
