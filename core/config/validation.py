"""Validation in a config: on which data, how often, when to stop early. Reads and edits the source; computes no loss.

XTuner 0.2.0 computes none: its model gives logits where mmengine wants an evaluator. The app's runtime does, from the block
`validation`, which plain `xtuner train` passes over (a lone `val_dataloader` would stop it: mmengine wants three such entries).
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from core.config import imports
from core.config.edits import best_map_processes, data_files, dataset_path, set_data
from core.config.facts import DataFacts, read_data
from core.config.findings import Context, iterations_per_epoch, number
from core.config.source import ConfigSource
from core.config.values import Code, format_value
from core.data.split import split_dataset
from core.errors import InputError
from core.project import Project

BLOCK: Final = "validation"
_DATASET: Final = f"{BLOCK}.dataset"
_FILES: Final = f"{_DATASET}.dataset.data_files"

_PARTS: Final = {number: re.compile(rf"^#+[ \t]*\r?\n#[ \t]+PART {number}\b", re.MULTILINE) for number in (2, 4)}
"""Headings of XTuner's configs: settings end before part 2, data sets before part 4."""
_USUAL_TIMES: Final = 10
"""Validations in a training, where nobody says how often."""
_USUAL_EVERY: Final = 100
_FORWARD_SHARE: Final = 1 / 3
"""Of a training step's time: the forward pass without the backward one (Kaplan et al. 2020, section 2.1)."""
SETTINGS: Final = """# Validation: loss on data that is not trained on. Danlu computes it; `xtuner train` alone passes it over
validation_files = {files}  # none: no validation
validation_freq = {every}  # counted in micro-steps; a multiple of accumulative_counts
early_stop_patience = 0  # validations in a row without improvement; 0: never stop early
early_stop_min_delta = 0.0  # by how much the loss must fall to count as improvement
save_best = True  # keep the checkpoint with the lowest validation loss, beside save_total_limit
"""
DATASET_BLOCK: Final = """validation = dict(
    dataset=dict(
        type=process_hf_dataset,
        dataset=dict(type=load_dataset, path="json", data_files=validation_files),
        tokenizer={tokenizer},
        max_length={max_length},
        dataset_map_fn={map_fn},
        template_map_fn={template_map_fn},
        remove_unused_columns=True,
        pack_to_max_length=False,
        map_num_proc={map_num_proc},
    ),
    every_n_iters=validation_freq,
    patience=early_stop_patience,
    min_delta=early_stop_min_delta,
    save_best=save_best,
)
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Validation:
    """What a config says about validation."""

    files: tuple[str, ...]
    every: int
    """Micro-steps."""
    patience: int
    """Validations in a row without improvement after which training ends; 0: it never ends early."""
    min_delta: float
    save_best: bool


def read_validation(source: ConfigSource) -> Validation | None:
    """None for a config without validation, or whose files are no plain names."""
    value = source.get(_FILES, None)
    named = [value] if isinstance(value, str) else value
    if not isinstance(named, list) or not named or any(isinstance(one, Code) for one in named):
        return None
    return Validation(
        files=tuple(str(one) for one in named),
        every=max(1, int(_number(source, "every_n_iters", _USUAL_EVERY))),
        patience=int(_number(source, "patience", 0)),
        min_delta=float(_number(source, "min_delta", 0.0)),
        save_best=source.get(f"{BLOCK}.save_best", True) is True,
    )


def set_validation(source: ConfigSource, data: DataFacts | None) -> ConfigSource:
    """Validate on a local file, or (None) not at all. A config without the block gets it, in XTuner's parts.

    Raises InputError `config.needs_conversion` for a format XTuner does not read, `config.foreign_dataset` where the config reads
    its training data in a way of its own.
    """
    if data is None:
        return source.set(_FILES, []) if source.has(_FILES) else source
    if not data.is_native:
        raise InputError("config.needs_conversion", path=str(data.path), format=str(data.format))
    if not source.has(_FILES):
        return _with_block(source, data)
    if read_validation(source) is None:
        every = usual_every(source, Context(data=_training_data(source)))
        source = source.set(f"{BLOCK}.every_n_iters", every)
    return _with_reader(source.set(_FILES, [str(data.path)]), data)


def hold_out(project: Project, source: ConfigSource, percent: int) -> ConfigSource:
    """Train on a part of the config's data file and validate on the rest, in two new files of the project.

    Raises InputError `config.no_local_data` if the config names no single file, and what `split_dataset` raises.
    """
    files = data_files(source)
    if len(files) != 1 or not (project.root / files[0]).is_file():
        raise InputError("config.no_local_data")
    split = split_dataset(project, project.root / files[0], percent)
    return set_validation(set_data(source, read_data(split.train)), read_data(split.validation))


def sibling(train: Path) -> Path | None:
    """The validation part that a split left beside its train part (`core.data.split`); None if there is none."""
    if not train.stem.endswith("_train"):
        return None
    file = train.with_name(f"{train.stem.removesuffix('_train')}_validation{train.suffix}")
    return file if file.is_file() else None


def usual_every(source: ConfigSource, context: Context) -> int:
    """About ten validations in a training, each at the end of an accumulation window."""
    counts = int(max(1, number(source, "accumulative_counts", 1)))
    per_epoch = iterations_per_epoch(source, context)
    if per_epoch is None:
        return counts * -(-_USUAL_EVERY // counts)
    total = number(source, "max_epochs", 1) * sum(per_epoch) / 2
    return counts * max(1, round(total / _USUAL_TIMES / counts))


def added_time(source: ConfigSource, context: Context) -> float:
    """Time that validation takes, as a part of the training's own: forward passes only, over the rows of its file; 0 without."""
    validation = read_validation(source)
    facts = facts_of(validation, context.root) if validation else None
    per_epoch = iterations_per_epoch(source, context)
    if validation is None or facts is None or context.data is None or not context.data.size_bytes or per_epoch is None:
        return 0.0
    passes = facts.size_bytes / context.data.size_bytes * sum(per_epoch) / 2 * _FORWARD_SHARE
    return passes / validation.every


def facts_of(validation: Validation, root: Path) -> DataFacts | None:
    """Of its one file, seen from `root`; None if there are several, or it cannot be read."""
    try:
        return read_data(root / validation.files[0]) if len(validation.files) == 1 else None
    except InputError:
        return None


def _with_block(source: ConfigSource, data: DataFacts) -> ConfigSource:
    train = dataset_path(source)
    places = {
        name: source.written(f"{train}.{name}", follow=False) if source.has(f"{train}.{name}") else "None"
        for name in ("tokenizer", "max_length", "template_map_fn")
    }
    settings = SETTINGS.format(
        files=format_value([str(data.path)]), every=usual_every(source, Context(data=_training_data(source)))
    )
    block = DATASET_BLOCK.format(map_fn="None", map_num_proc=best_map_processes(data), **places)
    text = _before_part(source.text, 4, block)
    text = _before_part(text, 2, settings)
    for name in ("process_hf_dataset", "load_dataset"):
        text = imports.bring_in(text, name)
    return _with_reader(ConfigSource(text), data)


def _with_reader(source: ConfigSource, data: DataFacts) -> ConfigSource:
    """The functions that read rows of this format, as for the training data (`core.config.edits.set_map_fn`)."""
    source = source.set(f"{_DATASET}.dataset_map_fn", None if data.map_fn is None else Code(data.map_fn))
    template = f"{_DATASET}.template_map_fn"
    if not data.format.is_chat:
        return source.set(template, None)
    if source.get(template, None) is None and source.has("prompt_template"):
        return source.set(template, {"type": Code("template_map_fn_factory"), "template": Code("prompt_template")})
    return source


def _before_part(text: str, part: int, lines: str) -> str:
    """`lines` before the heading of a part; at the end of a config that is not written in parts."""
    newline = "\r\n" if "\r\n" in text else "\n"
    lines = lines.replace("\n", newline)
    found = _PARTS[part].search(text)
    if found is not None:
        return f"{text[: found.start()]}{lines}{newline}{text[found.start() :]}"
    return f"{text}{'' if text.endswith(newline) else newline}{newline}{lines}"


def _training_data(source: ConfigSource) -> DataFacts | None:
    files = data_files(source)
    try:
        return read_data(Path(files[0])) if len(files) == 1 else None
    except InputError:
        return None


def _number(source: ConfigSource, name: str, default: float) -> float:
    value: Any = source.get(f"{BLOCK}.{name}", default)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else default
