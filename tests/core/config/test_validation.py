"""Validation in configs: put into XTuner's own without touching anything else, read back, held out of the training data, checked."""

from pathlib import Path

import pytest

from core.config import fields
from core.config.checks import Surroundings, apply_fix, check, gather
from core.config.dry_run import dry_config
from core.config.duration import estimate_duration
from core.config.facts import DataFacts, ModelFacts, read_data
from core.config.findings import Finding, Severity, iterations_per_epoch
from core.config.library import read_config
from core.config.load import load_values
from core.config.presets import Wishes, make
from core.config.source import ConfigSource
from core.config.validation import hold_out, read_validation, set_validation
from core.config.values import Code
from core.errors import InputError
from core.project import Project
from core.xtuner.catalogue import configs
from tests.core.config.conftest import GPU
from tests.training import write_rows

SUPERVISED = [entry for entry in configs() if entry.is_supervised]
BLOCK_FIELDS = {"validation_freq", "early_stop_patience", "early_stop_min_delta", "save_best"}


@pytest.fixture
def held_out(project: Project) -> DataFacts:
    return read_data(write_rows(project.data / "held_out.jsonl", 40))


def codes(source: ConfigSource, **around: object) -> dict[str, Finding]:
    context = gather(source, Surroundings(**{"machine": GPU, **around}))  # type: ignore[arg-type]
    return {finding.code: finding for finding in check(source, context)}


def test_xtuners_configs_get_it_and_keep_every_line(rows: DataFacts) -> None:
    """Only lines are put in, and names added to import lines; switched off again nothing is computed."""
    refused: list[str] = []
    for entry in SUPERVISED[::13]:
        source = ConfigSource(read_config(entry.path))
        try:
            edited = set_validation(source, rows)
        except InputError as error:
            refused.append(error.code)
            continue
        validation = read_validation(edited)
        assert validation is not None
        assert validation.files == (str(rows.path),), entry.name
        assert validation.every % max(1, source.effective("accumulative_counts", 1)) == 0, entry.name
        left = iter(edited.text.splitlines())
        assert all(line in left for line in source.text.splitlines() if "import" not in line and "_map_fn," not in line)
        assert {one.field.key for one in fields.fill(edited)} - {one.field.key for one in fields.fill(source)} == (
            BLOCK_FIELDS
        )
        assert read_validation(set_validation(edited, None)) is None
    assert set(refused) <= {"config.foreign_dataset"}
    assert len(refused) < 5


def test_training_gets_what_the_form_says(shipped: ConfigSource, rows: DataFacts) -> None:
    source = set_validation(shipped, rows)
    wanted = {"validation_freq": 32, "early_stop_patience": 3, "early_stop_min_delta": 0.01, "save_best": False}
    for filled in fields.fill(source):
        if filled.field.key in wanted:
            source = fields.write(source, filled, wanted[filled.field.key])
    block = load_values(source.text)["validation"]
    assert [block[name] for name in ("every_n_iters", "patience", "min_delta", "save_best")] == [32, 3, 0.01, False]
    assert block["dataset"]["dataset"]["data_files"] == [str(rows.path)]
    assert block["dataset"]["dataset_map_fn"].endswith("openai_map_fn"), "the function for the rows of this file"
    assert block["dataset"]["pack_to_max_length"] is False
    validation = read_validation(source)
    assert validation is not None
    assert (validation.every, validation.patience, validation.min_delta, validation.save_best) == (32, 3, 0.01, False)
    assert read_validation(dry_config(source)) is None, "three steps to see whether it fits need none"


def test_our_own_configs_have_the_block_on_no_data(made: ConfigSource, held_out: DataFacts) -> None:
    assert made.has("validation.dataset")
    assert read_validation(made) is None
    source = set_validation(made, held_out)
    validation = read_validation(source)
    assert validation is not None
    assert validation.files == (str(held_out.path),)
    assert codes(source) == {}


def test_a_part_of_the_training_data_is_held_out(project: Project, made: ConfigSource, many_rows: DataFacts) -> None:
    source = hold_out(project, made, 10)
    (train,) = source.get("data_files")
    validation = read_validation(source)
    assert validation is not None
    parts = [Path(train).read_text().splitlines(), Path(validation.files[0]).read_text().splitlines()]
    assert sum(map(len, parts)) == many_rows.rows
    assert 300 < len(parts[1]) < 500
    assert not set(parts[0]) & set(parts[1])
    assert codes(source) == {}
    with pytest.raises(InputError, match=r"config\.no_local_data"):
        hold_out(project, made.set("data_files", ["/gone.jsonl"]), 10)


def test_a_config_made_for_one_half_of_a_split_validates_on_the_other(
    project: Project, qwen2: ModelFacts, made: ConfigSource
) -> None:
    split = hold_out(project, made, 5)
    fresh = ConfigSource(make(qwen2, read_data(Path(split.get("data_files")[0])), GPU, Wishes(max_length=64)))
    assert read_validation(fresh) == read_validation(split)
    finding = codes(set_validation(split, None))["validation_unused"]
    assert finding.severity is Severity.ADVICE
    assert read_validation(apply_fix(set_validation(split, None), finding)) == read_validation(split)


def test_what_cannot_be_validated_on_is_refused(project: Project, made: ConfigSource) -> None:
    file = project.data / "sharegpt.json"
    file.write_text('[{"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]}]')
    with pytest.raises(InputError, match=r"config\.needs_conversion"):
        set_validation(made, read_data(file))


@pytest.mark.parametrize(
    ("code", "severity", "path", "value"),
    [
        ("validation_missing", Severity.ERROR, "validation_files", ["/gone/rows.jsonl"]),
        ("validation_map_fn", Severity.ERROR, "validation.dataset.dataset_map_fn", None),
        ("validation_freq", Severity.WARNING, "validation_freq", 57),
        ("validation_never", Severity.WARNING, "validation_freq", 4_000_000),
        ("validation_dear", Severity.ADVICE, "validation_freq", 4),
        ("patience_too_long", Severity.ADVICE, "early_stop_patience", 9000),
        ("validation_parallel", Severity.ERROR, "sequence_parallel_size", 2),
        ("optimizer", Severity.ERROR, "optim_type", None),
    ],
)
def test_each_check_finds_it_and_its_fix_mends_it(
    made: ConfigSource, many_rows: DataFacts, project: Project, code: str, severity: Severity, path: str, value: object
) -> None:
    source = set_validation(made, read_data(write_rows(project.data / "held_out.jsonl", 400)))
    assert "validation" not in "".join(codes(source))
    around: dict[str, object] = {}
    if code == "optimizer":
        filled = next(one for one in fields.fill(source) if one.field.key == "optim_type")
        source, around = fields.write(source, filled, "PagedAdamW8bit"), {"machine": GPU.__class__()}
    else:
        source = source.set(path, value)
    finding = codes(source, **around)[code]
    assert finding.severity is severity
    assert finding.fix is not None
    assert code not in codes(apply_fix(source, finding), **around)


def test_the_expected_time_has_it_in(project: Project, made: ConfigSource, many_rows: DataFacts) -> None:
    """A tenth of the rows, forward only: a thirtieth of an epoch, every tenth of one."""
    epoch = sum(iterations_per_epoch(made, gather(made, Surroundings(machine=GPU))) or (0, 0)) / 2
    source = set_validation(made, read_data(write_rows(project.data / "held_out.jsonl", many_rows.rows // 10)))
    source = source.set("validation_freq", round(epoch / 10))
    times = []
    for one in (made, source):
        around = gather(one, Surroundings(machine=GPU))
        duration = estimate_duration([], one, around, card="NVIDIA H100 80GB HBM3", is_fast=True)
        assert duration is not None
        assert duration.seconds is not None
        times.append(duration.seconds[0])
    assert times[1] / times[0] == pytest.approx(1 + 1 / 3, rel=0.05)


def test_a_handful_of_rows_says_little(project: Project, made: ConfigSource) -> None:
    source = set_validation(made, read_data(write_rows(project.data / "held_out.jsonl", 7)))
    assert list(codes(source)) == ["validation_few"]


def test_validation_data_that_xtuner_does_not_read_is_said(
    project: Project, made: ConfigSource, many_rows: DataFacts
) -> None:
    file = project.data / "sharegpt.json"
    file.write_text('[{"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]}]')
    source = set_validation(made, read_data(write_rows(project.data / "held_out.jsonl", 40)))
    finding = codes(source.set("validation_files", [str(file)]))["validation_format"]
    assert (finding.severity, finding.fix) == (Severity.ERROR, None)


def test_the_training_data_is_no_validation_data(made: ConfigSource, many_rows: DataFacts) -> None:
    finding = codes(set_validation(made, many_rows))["validation_same"]
    assert read_validation(apply_fix(set_validation(made, many_rows), finding)) is None


def test_validation_that_takes_too_long_is_spread_just_enough(made: ConfigSource, project: Project) -> None:
    """The advice names the share of the time it takes; the fix is the shortest whole window that keeps it under the limit."""
    source = set_validation(made, read_data(write_rows(project.data / "held_out.jsonl", 400))).set("validation_freq", 4)
    finding = codes(source)["validation_dear"]
    assert finding.line == source.line_of("validation_freq")
    params = finding.message.params
    assert params["every"] == 4
    enough = int(str(params["enough"]))
    counts = int(source.effective("accumulative_counts", 1))
    assert enough % counts == 0
    assert "validation_dear" not in codes(source.set("validation_freq", enough))
    assert "validation_dear" in codes(source.set("validation_freq", max(counts, enough - 2 * counts)))
    assert 10 < int(str(params["percent"])) < 100


@pytest.mark.parametrize(
    ("code", "path", "value", "place", "params", "mended"),
    [
        (
            "validation_missing", "validation_files", ["/gone/rows.jsonl"], "validation_files",
            {"path": "/gone/rows.jsonl", "offer": "–"}, [],
        ),
        (
            "validation_map_fn", "validation.dataset.dataset_map_fn", None, "validation.dataset.dataset_map_fn",
            {"written": "None", "wanted": "openai_map_fn"}, Code("openai_map_fn"),
        ),
        ("validation_freq", "validation_freq", 57, "validation_freq", {"every": 57, "counts": 4, "rounded": 56}, 56),
        ("validation_freq", "validation_freq", 1, "validation_freq", {"every": 1, "counts": 4, "rounded": 4}, 4),
        ("validation_never", "validation_freq", 20_000, "validation_freq", {"every": 20_000, "most": 17907, "usual": 1120}, 1120),
        (
            "patience_too_long", "early_stop_patience", 16, "early_stop_patience",
            {"patience": 16, "every": 1120, "most": 17907, "fewer": 5}, 5,
        ),
        ("validation_parallel", "sequence_parallel_size", 2, "validation_files", {"size": 2}, None),
        ("validation_dear", "validation_freq", 4, "validation_freq", {"every": 4, "percent": 97, "enough": 372}, 372),
    ],
)  # fmt: skip
def test_a_finding_names_its_line_and_its_numbers_and_the_fix_puts_in_the_right_ones(
    made: ConfigSource,
    project: Project,
    code: str,
    path: str,
    value: object,
    place: str,
    params: dict[str, object],
    mended: object,
) -> None:
    """Four thousand rows: 1492 to 5969 micro-steps an epoch, three epochs, four of them a step."""
    good = set_validation(made, read_data(write_rows(project.data / "held_out.jsonl", 400)))
    source = good.set(path, value)
    finding = codes(source)[code]
    assert finding.line is not None
    assert finding.line == source.line_of(place)
    assert finding.message.params == params
    after = apply_fix(source, finding)
    if mended is None:
        assert read_validation(after) is None
    else:
        assert after.get(path) == mended


@pytest.mark.parametrize(
    ("code", "path", "right", "wrong"),
    [
        ("validation_never", "validation_freq", 17904, 17908),
        ("patience_too_long", "early_stop_patience", 15, 16),
        ("validation_parallel", "sequence_parallel_size", 1, 2),
        ("validation_freq", "validation_freq", 8, 6),
    ],
)
def test_each_limit_is_where_it_is_said_to_be(
    made: ConfigSource, project: Project, code: str, path: str, right: object, wrong: object
) -> None:
    source = set_validation(made, read_data(write_rows(project.data / "held_out.jsonl", 400)))
    assert code not in codes(source.set(path, right))
    assert code in codes(source.set(path, wrong))


@pytest.mark.parametrize(("rows", "is_few"), [(19, True), (20, False)])
def test_twenty_rows_are_not_few(project: Project, made: ConfigSource, rows: int, is_few: bool) -> None:
    source = set_validation(made, read_data(write_rows(project.data / "held_out.jsonl", rows)))
    finding = codes(source).get("validation_few")
    assert (finding is not None) is is_few
    if finding is not None:
        assert (finding.line, finding.message.params) == (source.line_of("validation_files"), {"rows": 19})


def test_files_that_are_named_from_the_project(project: Project, made: ConfigSource, many_rows: DataFacts) -> None:
    """The trainer works in the project's folder: there a relative name begins, wherever the app runs."""
    facts = read_data(write_rows(project.data / "held_out.jsonl", 19))
    source = set_validation(made, facts)
    inside = source.set("validation_files", ["data/held_out.jsonl"])
    assert codes(inside, root=project.root)["validation_few"].message.params == {"rows": 19}
    assert "validation_missing" not in codes(inside, root=project.root)
    same = source.set("validation_files", ["data/many.jsonl"])
    finding = codes(same, root=project.root)["validation_same"]
    assert finding.message.params == {"path": "data/many.jsonl", "offer": "–"}


def test_an_unused_half_and_a_format_are_named(project: Project, made: ConfigSource) -> None:
    split = hold_out(project, made, 5)
    validation = read_validation(split)
    assert validation is not None
    name = Path(validation.files[0]).name
    finding = codes(set_validation(split, None))["validation_unused"]
    assert finding.message.params == {"file": name}
    gone = split.set("validation_files", ["/gone/rows.jsonl"])
    finding = codes(gone)["validation_missing"]
    assert finding.message.params["offer"] == name
    assert read_validation(apply_fix(gone, finding)) == validation
    file = project.data / "sharegpt.json"
    file.write_text('[{"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]}]')
    finding = codes(split.set("validation_files", [str(file)]))["validation_format"]
    assert finding.message.params == {"path": str(file), "format": "sharegpt"}
    assert finding.line == split.line_of("validation_files")


def test_validation_without_a_word_on_sequence_parallelism_is_right(project: Project) -> None:
    file = write_rows(project.data / "held_out.jsonl", 40)
    source = ConfigSource(f"validation = dict(dataset=dict(dataset=dict(data_files=[{str(file)!r}])))\n")
    assert read_validation(source) is not None
    assert not codes(source).keys() & {"validation_parallel", "validation_freq", "validation_missing"}
