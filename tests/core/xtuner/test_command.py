"""The training command and its environment."""

import socket
from pathlib import Path

import pytest

from core.xtuner import command


def test_torchrun_for_several_processes_with_the_given_python() -> None:
    alone = command.training_argv("/venv/bin/python", Path("/p/train/run"), world_size=1, port=29123)
    assert alone == ["/venv/bin/python", "-m", "core.xtuner.runtime.entry", "/p/train/run"]
    for world_size, is_old in ((1, True), (4, False)):
        argv = command.training_argv(
            "/venv/bin/python", Path("/p/train/run"), world_size=world_size, port=29123, needs_torchrun=is_old
        )
        assert argv[:3] == ["/venv/bin/python", "-m", "torch.distributed.run"]
        assert argv[argv.index("--nproc_per_node") + 1] == str(world_size)
        assert argv[-3:] == ["-m", "core.xtuner.runtime.entry", "/p/train/run"]


def test_environment_of_a_cpu_run() -> None:
    env = command.training_env(gpus=(), world_size=2, is_local=True, cpu_count=8)
    assert env["CUDA_VISIBLE_DEVICES"] == ""
    assert env["DS_ACCELERATOR"] == "cpu"
    assert env["OMP_NUM_THREADS"] == "4"
    assert env["OMP_WAIT_POLICY"] == "passive"
    assert env["HF_HUB_OFFLINE"] == "1"
    assert env["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1"
    assert env["PYTHONPATH"].split(":")[0] == str(command.APP_ROOT)


def test_environment_of_a_gpu_run() -> None:
    env = command.training_env(gpus=("GPU-a", "GPU-b"), world_size=2, is_local=False, cpu_count=64)
    assert env["CUDA_VISIBLE_DEVICES"] == "GPU-a,GPU-b"
    assert "DS_ACCELERATOR" not in env
    assert "OMP_WAIT_POLICY" not in env
    assert "HF_HUB_OFFLINE" not in env, "a model of the hub must be reachable"
    assert env["OMP_NUM_THREADS"] == "8"


def test_free_ports_differ_while_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    first = command.free_port()
    assert first < 32_768, "no connection is given it by chance"
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", first))
        monkeypatch.setattr(command, "_PORTS", range(first, first + 1))
        assert command.free_port() != first
