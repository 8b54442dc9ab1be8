"""Checks of what is read: data file, map function, packing, prompt template."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Final

from core.config.edits import (
    DATASET,
    best_map_processes,
    data_files,
    dataset_path,
    set_data,
    set_map_fn,
    set_map_processes,
    set_model_and_template,
    set_template,
)
from core.config.findings import Check, Context, Finding, Severity, found
from core.config.source import ConfigSource
from core.config.values import Code
from core.errors import InputError
from core.xtuner.templates import prompt_templates


def check_data_files(source: ConfigSource, context: Context) -> Iterator[Finding]:
    """The named files exist; a data set that would come from the hub is said so."""
    own = context.own_data if context.own_data is not None and context.own_data.is_native else None
    fix = (lambda edited: set_data(edited, own, cpu_count=context.machine.cpu_count)) if own else None
    offer = own.path.name if own else ""
    try:
        reader = f"{dataset_path(source)}.dataset"
    except InputError as error:
        yield Finding("foreign_dataset", Severity.ADVICE, error.what)
        return
    files = data_files(source)
    for number, file in enumerate(files):
        if not Path(file).is_absolute() and (context.root / file).exists():
            yield _relative(source, _place_of_file(source, f"{reader}.data_files", number), context.root / file)
        elif not (context.root / file).exists():
            yield found(
                "data_missing",
                Severity.ERROR,
                line=source.line_of(f"{reader}.data_files"),
                fix=fix,
                path=file,
                offer=offer,
            )
    hub_name = source.get(f"{reader}.path", None)
    if not files and isinstance(hub_name, str) and not isinstance(hub_name, Code) and not Path(hub_name).exists():
        yield found(
            "data_from_hub", Severity.ERROR, line=source.line_of(f"{reader}.path"), fix=fix, name=hub_name, offer=offer
        )


def check_map_fn(source: ConfigSource, context: Context) -> Iterator[Finding]:
    """The map function is the one for the data's format."""
    data, path = context.data, _dataset(source)
    if data is None or path is None:
        return
    line = source.line_of(f"{path}.dataset_map_fn")
    if not data.is_native:
        yield found("data_needs_conversion", Severity.ERROR, line=line, path=str(data.path), format=str(data.format))
        return
    wanted, value = data.map_fn or "None", source.get(f"{path}.dataset_map_fn", None)
    written = "None" if value is None else str(value).rpartition(".")[2]
    if written != wanted:
        fix = partial(_apply_map_fn, context)
        yield found(
            "map_fn", Severity.ERROR, line=line, fix=fix, written=written, wanted=wanted, format=str(data.format)
        )


def check_packing(source: ConfigSource, context: Context) -> Iterator[Finding]:
    """Each tokenising process drops its last partial pack; XTuner's default is 32 of them."""
    data, path = context.data, _dataset(source)
    if data is None or path is None or source.effective("pack_to_max_length", True) is not True:
        return
    value, best = source.get(f"{path}.map_num_proc", 32), best_map_processes(data, context.machine.cpu_count)
    if isinstance(value, int) and value > best:
        fix = lambda edited: set_map_processes(edited, data, cpu_count=context.machine.cpu_count)  # noqa: E731
        line = source.line_of(f"{path}.map_num_proc")
        yield found("map_num_proc", Severity.WARNING, line=line, fix=fix, value=value, best=best, rows=data.rows)


def check_template(source: ConfigSource, context: Context) -> Iterator[Finding]:
    """The prompt template exists and is the model's own."""
    if not source.has("prompt_template"):
        return
    name, line = str(source.get("prompt_template")).removeprefix("PROMPT_TEMPLATE."), source.line_of("prompt_template")
    if "(" in name or name.startswith("{"):
        return
    fits = context.model.template if context.model else None
    fix = partial(set_template, name=fits) if fits else None
    if name not in prompt_templates():
        yield found("template_unknown", Severity.ERROR, line=line, fix=fix, name=name, fits=fits or "?")
    elif fits and fits != name and prompt_templates()[fits].INSTRUCTION != prompt_templates()[name].INSTRUCTION:
        yield found("template_differs", Severity.WARNING, line=line, fix=fix, name=name, fits=fits)


def check_bos(source: ConfigSource, context: Context) -> Iterator[Finding]:
    """XTuner 0.2.0 puts BOS before each conversation: a tokenizer without one stops it; ChatML's own start mark comes twice."""
    del source
    if context.model is None or context.model.template is None:
        return
    bos, template = context.model.tokens.bos, prompt_templates()[context.model.template]
    if bos is None:
        yield found("bos_missing", Severity.ERROR, path=str(context.model.path))
    elif bos and template.INSTRUCTION.startswith(bos):
        yield found("bos_twice", Severity.ADVICE, bos=bos)


def check_system(source: ConfigSource, context: Context) -> Iterator[Finding]:
    """`{…}` in SYSTEM is taken for a field and stops the chat hook; a template may have no place for SYSTEM at all."""
    del context
    system = source.get("SYSTEM", None)
    if isinstance(system, str) and not isinstance(system, Code) and ("{" in system or "}" in system):
        plain = system.replace("{{", "{").replace("}}", "}")
        escaped = plain.replace("{", "{{").replace("}", "}}")
        if system != escaped:
            fix = lambda edited: edited.set("SYSTEM", escaped)  # noqa: E731
            yield found("system_braces", Severity.ERROR, line=source.line_of("SYSTEM"), fix=fix)
    template = prompt_templates().get(str(source.get("prompt_template", "")).removeprefix("PROMPT_TEMPLATE."))
    if system and template is not None and template.SYSTEM is None and _is_used_by_hook(source):
        fix = lambda edited: edited.set("SYSTEM", "")  # noqa: E731
        line = source.line_of("SYSTEM")
        yield found("system_unsupported", Severity.WARNING, line=line, fix=fix, template=template.name)


def _is_used_by_hook(source: ConfigSource) -> bool:
    return source.variable_at("custom_hooks[EvaluateChatHook].system") == "SYSTEM"


def check_evaluation(source: ConfigSource, context: Context) -> Iterator[Finding]:
    """Questions are a list that is not empty; long answers cost training time."""
    del context
    hook = "custom_hooks[EvaluateChatHook]"
    if not source.has(hook):
        return
    line, questions = source.line_of(f"{hook}.evaluation_inputs"), source.get(f"{hook}.evaluation_inputs", None)
    if isinstance(questions, list) and not questions:
        yield found("no_questions", Severity.ADVICE, line=line)
    tokens = source.get(f"{hook}.max_new_tokens", 600)
    if isinstance(tokens, int) and tokens > 256:
        fix = lambda edited: edited.set(f"{hook}.max_new_tokens", 128)  # noqa: E731
        yield found("long_answers", Severity.ADVICE, line=source.line_of(hook), fix=fix, tokens=tokens)


def check_model_path(source: ConfigSource, context: Context) -> Iterator[Finding]:
    """The base model is a folder of this machine."""
    own = context.own_model
    fix = partial(set_model_and_template, model=own) if own else None
    offer = own.path.name if own else ""
    path = next((name for name in ("pretrained_model_name_or_path", "llm_name_or_path") if source.has(name)), None)
    value = source.get(path, None) if path else None
    if not isinstance(value, str) or isinstance(value, Code) or path is None:
        return
    line = source.line_of(path)
    if not Path(value).is_absolute() and (context.root / value / "config.json").is_file():
        yield _relative(source, path, context.root / value)
    elif not (context.root / value).is_dir():
        code = "model_from_hub" if not value.startswith(("/", ".", "~")) and value.count("/") <= 1 else "model_missing"
        yield found(code, Severity.ERROR, line=line, fix=fix, path=value, offer=offer)
    elif not (context.root / value / "config.json").is_file():
        yield found("model_without_config", Severity.ERROR, line=line, fix=fix, path=value, offer=offer)


DATA_CHECKS: Final[tuple[Check, ...]] = (
    check_model_path,
    check_data_files,
    check_map_fn,
    check_packing,
    check_template,
    check_bos,
    check_system,
    check_evaluation,
)


def _place_of_file(source: ConfigSource, place: str, number: int) -> str:
    """Where the file stands of a list, of `dict(train=…)`, or alone."""
    if source.has(f"{place}.train"):
        return f"{place}.train"
    return f"{place}[{number}]" if isinstance(source.get(place), list) else place


def _relative(source: ConfigSource, place: str, full: Path) -> Finding:
    """The trainer finds it from the project's folder; the memory budget, and a person's own commands elsewhere, do not."""
    value = source.get(place)
    fix = (lambda edited: edited.set(place, str(full))) if isinstance(value, str) else None
    return found("relative_path", Severity.WARNING, line=source.line_of(place), fix=fix, path=full.name)


def _dataset(source: ConfigSource) -> str | None:
    """Where our data set stands, if the config has one of the kind the checks know."""
    kind = source.type_name(DATASET)
    if kind == "ConcatDataset":
        first = f"{DATASET}.datasets[0]"
        return first if source.type_name(first) == "process_hf_dataset" else None
    return DATASET if kind == "process_hf_dataset" else None


def _apply_map_fn(context: Context, source: ConfigSource) -> ConfigSource:
    return set_map_fn(source, context.data) if context.data is not None else source
