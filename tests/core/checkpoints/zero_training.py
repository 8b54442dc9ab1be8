"""Small DeepSpeed trainings for the reshape tests, gloo on CPU: a server, since importing DeepSpeed takes longer than training.

Each line of stdin is `{"ranks", "port", "trainings": […]}`: that many processes are forked and do the trainings one after the
other; the answer is a line with their exit codes. Every rank computes the same global batches and takes its
own rows, so the loss of a step does not depend on the number of ranks beyond the order of additions. Options: stage,
(0: torch alone, saved as mmengine saves it), steps, resume (checkpoint or null), save_at, save_to, dtype (fp32 | bf16;
DeepSpeed has no fp16 on CPU), groups (1 | 2), lora, exclude_frozen, offload, sub_group_size, result.
"""

import json
import os
import sys
import traceback
from pathlib import Path

import deepspeed
import torch
from torch import nn

from core.checkpoints.plain_layout import numbered
from core.xtuner.runtime.compat import finish_gathers, skip_shared_memory

GLOBAL_BATCH = 12


class Adapted(nn.Module):
    """A frozen linear layer with a LoRA pair, named as peft names it."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.base_layer = nn.Linear(inputs, outputs)
        self.lora_A = nn.Linear(inputs, 3, bias=False)
        self.lora_B = nn.Linear(3, outputs, bias=False)
        self.base_layer.requires_grad_(False)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.base_layer(rows) + self.lora_B(self.lora_A(rows))


class Network(nn.Module):
    """Odd sizes, so that every partition needs padding."""

    def __init__(self, is_lora: bool) -> None:
        super().__init__()
        layer = Adapted if is_lora else nn.Linear
        self.first, self.second, self.third = layer(7, 13), layer(13, 11), layer(11, 3)
        self.norm = nn.LayerNorm(13)
        if is_lora:
            self.norm.requires_grad_(False)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.third(torch.tanh(self.second(self.norm(torch.tanh(self.first(rows))))))


def parameters(network: Network, groups: int) -> list[dict]:
    trained = [p for p in network.parameters() if p.requires_grad]
    if groups == 1:
        return [{"params": trained}]
    return [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": 0.01},
        {"params": [p for p in trained if p.dim() == 1], "weight_decay": 0.0},
    ]


def deepspeed_config(options: dict, world: int) -> dict:
    zero = {"stage": options["stage"], "overlap_comm": False, "sub_group_size": options.get("sub_group_size", 10**9)}
    if options.get("offload"):
        zero["offload_optimizer"] = {"device": "cpu"}
    return {
        "train_batch_size": GLOBAL_BATCH,
        "train_micro_batch_size_per_gpu": GLOBAL_BATCH // world,
        "gradient_clipping": 0.5,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": options["dtype"] == "bf16"},
        "fp16": {"enabled": options["dtype"] == "fp16", "initial_scale_power": 8},
        "zero_optimization": zero,
        "steps_per_print": 10**9,
    }


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets of one global step."""
    generator = torch.Generator().manual_seed(step)
    return torch.randn(GLOBAL_BATCH, 7, generator=generator), torch.randn(GLOBAL_BATCH, 3, generator=generator)


def train_plainly(network: Network, options: dict) -> list[float]:
    """Without DeepSpeed, on one rank: AdamW over all parameters, the frozen ones too, as mmengine builds it. Returns the losses."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    step = 0
    if options.get("resume"):
        saved = torch.load(options["resume"], weights_only=False)
        network.load_state_dict(saved["state_dict"], strict=not options.get("lora"))
        optimizer.load_state_dict(numbered(saved["optimizer"], [name for name, _ in network.named_parameters()]))
        step = saved["step"]
    losses = []
    while step < options["steps"]:
        rows, targets = batch(step)
        loss = nn.functional.mse_loss(network(rows), targets)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in network.parameters() if p.requires_grad], 0.5)
        optimizer.step()
        step += 1
        losses.append(loss.item())
        if step == options.get("save_at"):
            trained = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
            weights = {name: value for name, value in network.state_dict().items() if name in trained}
            Path(options["save_to"]).parent.mkdir(parents=True, exist_ok=True)
            torch.save({"state_dict": weights, "optimizer": optimizer.state_dict(), "step": step}, options["save_to"])
    return losses


def main(options: dict) -> None:
    world, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    torch.set_num_threads(1)
    torch.manual_seed(0)
    network = Network(options.get("lora", False))
    if options["stage"] == 0:
        Path(options["result"]).write_text(json.dumps(train_plainly(network, options)), encoding="utf-8")
        return
    groups = parameters(network, options.get("groups", 1))
    engine, *_ = deepspeed.initialize(
        model=network,
        optimizer=torch.optim.AdamW(groups, lr=1e-2),
        config=deepspeed_config(options, world),
    )
    step = 0
    if options.get("resume"):
        folder = Path(options["resume"])
        _, client = engine.load_checkpoint(
            str(folder.parent), tag=folder.name, load_module_strict=not options.get("exclude_frozen", False)
        )
        step = client["step"]
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[options["dtype"]]
    losses = []
    while step < options["steps"]:
        rows, targets = (values.to(dtype) for values in batch(step))
        share = slice(rank * GLOBAL_BATCH // world, (rank + 1) * GLOBAL_BATCH // world)
        loss = nn.functional.mse_loss(engine(rows[share]).float(), targets[share].float())
        engine.backward(loss)
        engine.step()
        step += 1
        mean = loss.detach().clone()
        torch.distributed.all_reduce(mean)
        losses.append(mean.item() / world)
        if step == options.get("save_at"):
            target = Path(options["save_to"])
            engine.save_checkpoint(
                str(target.parent),
                tag=target.name,
                client_state={"step": step},
                save_latest=False,
                exclude_frozen_parameters=options.get("exclude_frozen", False),
            )
    if rank == 0:
        Path(options["result"]).write_text(json.dumps(losses), encoding="utf-8")


def run_ranks(order: dict) -> list[int]:
    """Fork the ranks of one order; their exit codes. Nothing here has started a thread or a group before the fork."""
    children = []
    for rank in range(order["ranks"]):
        child = os.fork()
        if child == 0:
            work(rank, order)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def work(rank: int, order: dict) -> None:
    """The life of one forked rank."""
    group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": order["ranks"], "MASTER_PORT": order["port"]}
    os.environ.update({name: str(value) for name, value in group.items()} | {"MASTER_ADDR": "127.0.0.1"})
    code = 1
    try:
        for training in order["trainings"]:
            main(training)
        code = 0
    finally:
        if code:
            traceback.print_exc()
        os._exit(code)


if __name__ == "__main__":
    finish_gathers()
    skip_shared_memory()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # What DeepSpeed prints is no answer.
    for line in sys.stdin:
        print(json.dumps(run_ranks(json.loads(line))), file=answers, flush=True)
