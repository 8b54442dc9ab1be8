"""The Triton kernels in Triton's own interpreter, on the CPU, by the comparison that `python -m benchmarks kernels` makes on a GPU.

bfloat16 is left to the GPU: the interpreter computes with numpy, which has no such type.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.engine]
ROOT = Path(__file__).parents[5]
PROGRAM = """
import json, torch
from benchmarks.kernels import LIMITS, Sizes, measure
sizes = Sizes(tokens=70, hidden=96, width=80, vocabulary=700, heads=4, kv_heads=2, dim=16, rank=8)
found = {str(dtype): measure(dtype, torch.device("cpu"), sizes) for dtype in (torch.float32, torch.float16)}
print(json.dumps({name: [errors, LIMITS[getattr(torch, name.removeprefix("torch."))]] for name, errors in found.items()}))
"""


WHOLE_PASS = """
import json, sys, torch
from pathlib import Path
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from core.xtuner.runtime.speed import decoder, linear, loss
from core.xtuner.runtime.speed.anatomy import read_decoder
from core.xtuner.runtime.speed.batches import flatten
from tests.core.xtuner.runtime.speed.conftest import packed_batch
from tests.models import write_tiny_internlm2

torch.manual_seed(0)
folder = write_tiny_internlm2(Path(sys.argv[1]))
llm = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, torch_dtype=torch.float32)
options = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.2, task_type="CAUSAL_LM", target_modules="all-linear")
llm = get_peft_model(llm, options).train()
for name, parameter in llm.named_parameters():
    if "lora_B" in name:
        torch.nn.init.normal_(parameter, std=0.1)
batch, read = flatten([packed_batch([9, 14], seed=1)], torch.device("cpu")), read_decoder(llm)
found = []
for with_kernels in (True, False):
    for room in (linear, loss, decoder):
        room.uses_kernels = lambda _tensor, answer=with_kernels: answer
    run = decoder.FastPass(read, decoder.PassOptions(dtype=torch.float32, block_tokens=16))
    losses = run(batch, 5)
    found.append((losses.detach(), torch.autograd.grad(losses.sum(), read.parameters)))
(one, ours), (other, theirs) = found
errors = [float((a - b).norm() / b.norm()) for a, b in zip(ours, theirs)]
print(json.dumps([float((one - other).abs().max()), max(errors), len(errors)]))
"""


def interpreted(program: str, *arguments: str) -> Any:
    """What the program prints last, run where Triton interprets its kernels."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True,
        check=False, timeout=1200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_every_kernel_agrees_with_its_formula() -> None:
    found = interpreted(PROGRAM)
    assert len(found) == 2
    for errors, limit in found.values():
        assert len(errors) > 20
        assert all(error < limit for error in errors.values()), errors


def test_a_whole_pass_with_kernels_equals_one_without(tmp_path: Path) -> None:
    """Dropout included: both draw the same masks."""
    loss, gradient, count = interpreted(WHOLE_PASS, str(tmp_path / "model"))
    assert loss < 1e-5
    assert gradient < 1e-4
    assert count >= 20
