"""The launcher for this machine."""

from pathlib import Path

from core.launchers import local


def test_command_gives_each_start_its_own_port() -> None:
    python, gpus = "/env/bin/python", ("0", "1")
    commands = [local.command(python, Path("/run"), gpus=gpus, world_size=2, is_local=True) for _ in range(2)]
    ports = [argv[argv.index("--master_port") + 1] for argv in (one.argv for one in commands)]
    assert all(1024 < int(port) < 65536 for port in ports)
    assert commands[0].env["CUDA_VISIBLE_DEVICES"] == "0,1"
    alone = local.command(python, Path("/run"), gpus=("0",), world_size=1, is_local=True)
    assert alone.argv == [python, "-m", "core.xtuner.runtime.entry", "/run"], "one process finds its own port"


def test_a_machine_without_a_driver_has_no_gpus() -> None:
    assert isinstance(local.list_gpus(), list)
