"""The doctor: colours for every trap, and a probe that hangs, lies or is cancelled."""

import json
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from core.environment import doctor
from core.environment.checks import diagnose
from core.environment.doctor import create_environment, examine, last_report, report_file, run_examination
from core.environment.known_good import KnownGood, known_good
from core.environment.report import Line, Report, Status
from core.errors import ConflictError, InputError, JobError, MachineError
from core.i18n import LANGUAGES, catalog
from core.messages import Message
from core.runs import processes
from core.runs.job import SilentProgress
from tests.core.environment.fakes import XTUNER, install, make_python, script
from tests.core.runs.conftest import wait_until

GIB = 2**30
DEVICE = {"name": "H100", "capability": [9, 0], "memory_bytes": 80 * GIB}


@pytest.fixture(scope="module")
def known() -> dict[str, KnownGood]:
    return known_good()


def good_facts(known: dict[str, KnownGood]) -> dict[str, Any]:
    """An H100 with the set that is installed here, which `make` built from the same files."""
    versions = {name: metadata.version(name) for name in known}
    names = ("torch", "transformers", "peft", "bitsandbytes", "deepspeed", "mmengine", "xtuner")
    imports: dict[str, Any] = {name: {"ok": True, "seconds": 1.0, "error": None, "facts": None} for name in names}
    imports["torch"]["facts"] = {
        "cuda_build": "12.8",
        "cuda_available": True,
        "devices": [DEVICE],
        "arch_list": ["sm_80", "sm_90"],
    }
    return {
        "python": {"version": "3.11.9", "executable": "/env/bin/python"},
        "versions": versions,
        "imports": imports,
        "driver": {"version": "570.86", "cuda": "12.8"},
        "memory": {"total_bytes": 64 * GIB, "available_bytes": 60 * GIB},
        "disk": {"total_bytes": 500 * GIB, "free_bytes": 300 * GIB},
        "cpu_count": 16,
        "compiler": "g++ 13",
        "nvcc": None,
    }


def set_version(name: str, version: str | None) -> Any:
    def change(facts: dict[str, Any]) -> None:
        facts["versions"].pop(name, None)
        facts["imports"].pop(name, None) if version is None else None
        if version is not None:
            facts["versions"][name] = version

    return change


def set_fact(*path: str, value: Any) -> Any:
    def change(facts: dict[str, Any]) -> None:
        *parents, last = path
        for key in parents:
            facts = facts[key]
        facts[last] = value

    return change


def fails(name: str, error: str) -> Any:
    return set_fact("imports", name, value={"ok": False, "seconds": 2.0, "error": error, "facts": None})


def torch_fact(name: str, value: Any) -> Any:
    return set_fact("imports", "torch", "facts", name, value=value)


CASES: dict[str, tuple[Any, str, Status]] = {
    "setuptools_82": (set_version("setuptools", "82.0.1"), "setuptools", Status.RED),
    "transformers_5": (set_version("transformers", "5.0.0"), "transformers", Status.RED),
    "transformers_4_57": (set_version("transformers", "4.57.6"), "transformers", Status.AMBER),
    "transformers_untested": (set_version("transformers", "4.40.0"), "transformers", Status.AMBER),
    "deepspeed_loses_micro_batches": (set_version("deepspeed", "0.18.9"), "deepspeed", Status.RED),
    "deepspeed_breaks_mmengine": (set_version("deepspeed", "0.19.7"), "deepspeed", Status.RED),
    "deepspeed_missing": (set_version("deepspeed", None), "deepspeed", Status.AMBER),
    "bitsandbytes_old": (set_version("bitsandbytes", "0.45.0"), "bitsandbytes", Status.RED),
    "bitsandbytes_missing": (set_version("bitsandbytes", None), "bitsandbytes", Status.AMBER),
    "torch_missing": (set_version("torch", None), "torch", Status.RED),
    "torch_does_not_import": (fails("torch", "libcudart.so.12: cannot open"), "torch", Status.RED),
    "torch_slow_disk": (fails("torch", "timeout"), "torch", Status.AMBER),
    "xtuner_missing": (set_version("xtuner", None), "xtuner", Status.RED),
    "xtuner_1": (set_version("xtuner", "1.0.0"), "xtuner", Status.RED),
    "xtuner_0_1_9": (set_version("xtuner", "0.1.9"), "xtuner", Status.RED),
    "xtuner_0_1_23": (set_version("xtuner", "0.1.23"), "xtuner", Status.AMBER),
    "python_3_10_without_hooks": (set_fact("python", "version", value="3.10.13"), "Python", Status.AMBER),
    "python_3_9": (set_fact("python", "version", value="3.9.18"), "Python", Status.RED),
    "python_3_13": (set_fact("python", "version", value="3.13.0"), "Python", Status.RED),
    "other_package_missing": (set_version("sentencepiece", None), "others_missing", Status.RED),
    "no_gpu": (set_fact("driver", value=None), "GPU", Status.AMBER),
    "cpu_torch": (
        lambda f: [torch_fact("cuda_available", False)(f), torch_fact("cuda_build", None)(f)],
        "CUDA",
        Status.RED,
    ),
    "old_driver": (torch_fact("cuda_available", False), "CUDA", Status.RED),
    "turing": (torch_fact("devices", [{**DEVICE, "name": "T4", "capability": [7, 5]}]), "T4", Status.RED),
    "volta": (
        lambda f: [
            torch_fact("devices", [{**DEVICE, "name": "V100", "capability": [7, 0]}])(f),
            torch_fact("arch_list", ["sm_70", "sm_90"])(f),
        ],
        "V100",
        Status.AMBER,
    ),
    "blackwell": (torch_fact("devices", [{**DEVICE, "name": "B200", "capability": [10, 0]}]), "B200", Status.RED),
    "flash_broken": (
        lambda f: [set_version("flash-attn", "2.7")(f), fails("flash_attn", "undefined symbol")(f)],
        "flash-attn",
        Status.RED,
    ),
    "disk_full": (set_fact("disk", "free_bytes", value=GIB), "disk", Status.RED),
    "disk_low": (set_fact("disk", "free_bytes", value=10 * GIB), "disk", Status.AMBER),
    "ram_low": (set_fact("memory", "available_bytes", value=2 * GIB), "RAM", Status.AMBER),
    "no_compiler": (set_fact("compiler", value=None), "C++", Status.AMBER),
}


def test_the_known_good_set_is_green(known: dict[str, KnownGood]):
    lines = diagnose(good_facts(known), known, is_app_python=True)
    assert [line for line in lines if line.status is not Status.GREEN] == []


@pytest.mark.parametrize(("change", "name", "status"), CASES.values(), ids=CASES)
def test_each_trap_has_its_colour_its_words_and_where_it_can_a_command(
    known: dict[str, KnownGood], change: Any, name: str, status: Status
):
    facts = good_facts(known)
    change(facts)
    lines = diagnose(facts, known, is_app_python=False)
    [line] = [line for line in lines if line.name == name]
    assert line.status is status
    for language in LANGUAGES:
        said = catalog(language).say(line.message)
        assert said != line.message.key
        assert "{" not in said
    worst = {line.status for line in lines}
    assert status in worst
    assert Line.from_json(json.loads(json.dumps(line.to_json()))) == line


def test_the_guides_environment_is_usable(known: dict[str, KnownGood]):
    """XTuner 0.1.17 on Python 3.10 with its own, older pins: nothing red, and the old line is said."""
    facts = good_facts(known)
    facts["python"]["version"] = "3.10.13"
    facts["versions"] |= {"xtuner": "0.1.17", "torch": "2.1.2+cu121", "transformers": "4.38.2", "deepspeed": "0.12.3"}
    facts["versions"] |= {"bitsandbytes": "0.46.0", "datasets": "2.18.0", "peft": "0.9.0", "mmengine": "0.10.3"}
    lines = diagnose(facts, known, is_app_python=False)
    assert [line.name for line in lines if line.status is Status.RED] == []
    assert [line.message.key for line in lines if line.name == "xtuner"] == ["environment.package.legacy_xtuner"]
    facts["python"]["version"] = "3.11.4"
    assert diagnose(facts, known, is_app_python=False)[0].status is Status.RED


def test_examination_of_an_environment_is_kept(tmp_path: Path):
    python = make_python(tmp_path / "env")
    install(python, "xtuner", "0.1.23", XTUNER)
    (tmp_path / "ft").mkdir()
    assert last_report(tmp_path / "ft") is None
    result = run_examination(str(python), str(tmp_path / "ft"), SilentProgress())
    assert result == {"python": str(python), "status": "red"}
    report = last_report(tmp_path / "ft")
    assert report is not None
    assert report.facts["versions"] == {"xtuner": "0.1.23"}
    assert report.count(Status.RED) >= 5
    assert Report.from_json(report.to_json()) == report
    report_file(tmp_path / "ft").write_text('{"lines": [{}]}', encoding="utf-8")
    assert last_report(tmp_path / "ft") is None


def test_what_is_no_python_is_refused(tmp_path: Path):
    (tmp_path / "text").write_text("x", encoding="utf-8")
    for path in (tmp_path / "gone", tmp_path / "text", tmp_path):
        with pytest.raises(InputError):
            examine(path, tmp_path, SilentProgress())
        with pytest.raises(InputError):
            create_environment(str(tmp_path / "env"), str(path), SilentProgress())


def test_a_python_that_prints_nonsense_is_said(tmp_path: Path):
    python = script(tmp_path / "env/bin/python", "echo not json")
    with pytest.raises(MachineError) as caught:
        examine(python, tmp_path, SilentProgress())
    assert (caught.value.code, caught.value.params["reason"]) == ("environment.probe_failed", "not json\n")


@pytest.mark.parametrize("reason", ["slow", "cancelled"])
def test_a_probe_that_hangs_is_ended_with_what_it_started(tmp_path: Path, reason: str):
    child = tmp_path / "child"
    python = script(tmp_path / "env/bin/python", f"sleep 3600 & echo $! > {child}.new; mv {child}.new {child}; wait")

    class Waiting(SilentProgress):
        """Begins to look once the probe has started something, and then cancels, or lets the limit, which is none, do it."""

        def update(self, done: float, total: float | None, message: Message, *, unit: str = "") -> None:
            wait_until(child.exists)
            if reason == "cancelled":
                raise JobError("runs.cancelled")

    with pytest.raises(MachineError if reason == "slow" else JobError):
        examine(python, tmp_path, Waiting(), limit_seconds=0.0)
    assert processes.wait_until_gone([int(child.read_text())], 240)


def test_creation_says_what_pip_does_and_passes_its_errors_on(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    error = {"type": "MachineError", "code": "environment.disk_full", "params": {"reason": "x"}}
    seen = tmp_path / "seen"
    seen.mkdir()
    python = script(
        tmp_path / "python",
        f"until_seen() {{ while [ ! -e {seen}/$1 ]; do sleep 0.01; done; }}\n"
        'echo "Collecting torch>=2.6"; until_seen collecting\n'
        'echo "Installing collected packages: torch"; until_seen installing\n'
        f"for last; do :; done; echo '{json.dumps(error)}' > \"$last\"; exit 1",
    )

    class Seeing(SilentProgress):
        def update(self, done: float, total: float | None, message: Message, *, unit: str = "") -> None:
            (seen / message.key.rsplit(".", 1)[-1]).touch()

    with pytest.raises(MachineError) as caught:
        create_environment(str(tmp_path / "env"), str(python), Seeing())
    assert caught.value.code == "environment.disk_full"
    assert {"collecting", "installing"} <= {file.name for file in seen.iterdir()}
    assert "Collecting torch" in capfd.readouterr().out
    assert not (tmp_path / "env").exists()


def test_creation_runs_the_builder_with_the_known_good_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The real builder, stopped by a foreign folder in its way before it does anything."""
    monkeypatch.setenv("DANLU_CACHE", str(tmp_path / "cache"))
    (tmp_path / "env").mkdir()
    with pytest.raises(ConflictError) as caught:
        create_environment(str(tmp_path / "env"), sys.executable, SilentProgress())
    assert caught.value.code == "environment.real_folder"
    assert doctor.BASE_FILE.is_file()
    assert not list((tmp_path / "cache").glob("env-*")) if (tmp_path / "cache").exists() else True
