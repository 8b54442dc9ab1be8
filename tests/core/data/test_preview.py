"""What the preview shows equals what XTuner trains on, token for token."""

import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from core.data.arithmetic import pack
from core.data.formats import CANONICAL, Format, dataset_map_fn_for
from core.data.preview import measure_rows, training_segments, training_tokens_of
from core.data.tokenizer import export_tokenizer, load_tokenizer
from core.errors import InputError
from core.models.remote_code import allow
from core.project import Project, open_project
from core.runs.job import SilentProgress
from core.xtuner.templates import PromptTemplate, prompt_templates
from tests.models import write_tiny_internlm2, write_tokenizer

MESSAGES: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "I am Danlu."}]},
    {
        "messages": [
            {"role": "assistant", "content": "skipped"},
            {"role": "system", "content": "Be {kind}"},
            {"role": "user", "content": "你是谁？"},
            {"role": "user", "content": " 请回答"},
            {"role": "assistant", "content": "我是丹炉 {0}"},
            {"role": "user", "content": "   "},
            {"role": "assistant", "content": "  again\n"},
            {"role": "user", "content": "left out"},
        ]
    },
    {"messages": [{"role": "user", "content": "long " * 40}, {"role": "assistant", "content": "never learned"}]},
]
LOSS = [
    {
        "messages": [
            {"role": "user", "content": "a", "loss": False},
            {"role": "assistant", "content": "not learned", "loss": False},
            {"role": "user", "content": "b", "loss": False},
            {"role": "assistant", "content": "learned", "loss": True},
        ]
    }
]
ALPACA = [
    {"instruction": "Add", "input": "1 and 2", "output": "3"},
    {"instruction": "Say hi", "input": "", "output": "hi"},
    {"instruction": "x", "input": "", "output": "<nooutput>"},
]
CONVERSATION = [
    {
        "conversation": [
            {"system": "Be brief", "input": "Hi", "output": "Hello"},
            {"system": "", "input": "And?", "output": "Yes"},
        ]
    },
    {"conversation": [{"system": "", "input": "你好", "output": "您好"}]},
]
TEXT = [{"text": "  The quick brown fox \n"}, {"text": "你好，世界" * 30}]


@pytest.fixture
def project(tmp_path: Path) -> Project:
    project = open_project(tmp_path)
    write_tokenizer(project.model)
    return project


def ours(
    project: Project, rows: list[Any], kind: Format, template: PromptTemplate | None, max_length: int
) -> list[dict[str, Any]]:
    tokenizer = load_tokenizer(project, project.model)
    seen = []
    for row in rows:
        segments = training_segments(row, kind, CANONICAL[kind], template, tokenizer)
        tokens = [token for token in training_tokens_of(segments, tokenizer, max_length) if not token.is_cut]
        if any(token.is_learned for token in tokens):
            seen.append(
                {
                    "ids": [token.id for token in tokens],
                    "labels": [token.id if token.is_learned else -100 for token in tokens],
                }
            )
    return seen


@contextmanager
def kept_environment() -> Iterator[None]:
    """`os.environ` stays the object it is: datasets puts a copy in its place, and what holds the old one would be misled."""
    before = os.environ
    try:
        yield
    finally:
        os.environ = before  # noqa: B003 - the very object is meant
        os.environ.pop("HF_HUB_OFFLINE", None)


def theirs(
    project: Project,
    rows: list[Any],
    kind: Format,
    template: PromptTemplate | None,
    max_length: int,
    packs: bool = False,
) -> list[dict[str, Any]]:
    with warnings.catch_warnings(), kept_environment():
        os.environ["HF_HUB_OFFLINE"] = "1"
        warnings.simplefilter("ignore")
        import datasets
        from mmengine.config import ConfigDict
        from transformers import AutoTokenizer
        from xtuner.dataset import map_fns, process_hf_dataset

        datasets.disable_progress_bars()
        file = project.root / "rows.jsonl"
        file.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
        fields = (
            {} if template is None else {name: value for name, value in template.to_json().items() if name != "name"}
        )
        name = dataset_map_fn_for(kind)
        loaded = datasets.load_dataset("json", data_files={"train": str(file)}, cache_dir=str(project.root / "cache"))
        made = process_hf_dataset(
            loaded,
            tokenizer=AutoTokenizer.from_pretrained(project.model),
            max_length=max_length,
            dataset_map_fn=None if name is None else getattr(map_fns, name),
            template_map_fn=None if template is None else map_fns.template_map_fn_factory(ConfigDict(fields)),
            pack_to_max_length=packs,
            remove_unused_columns=True,
            map_num_proc=1,
        )
        return [{"ids": row["input_ids"], "labels": row["labels"]} for row in made]


@pytest.mark.engine
def test_every_template_gives_the_tokens_of_training(project: Project):
    """By the functions that process_hf_dataset maps over the rows: the whole pipeline for 27 templates would take minutes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from mmengine.config import ConfigDict
        from transformers import AutoTokenizer
        from xtuner.dataset.map_fns import openai_map_fn, template_map_fn_factory
        from xtuner.dataset.utils import encode_fn

        tokenizer = AutoTokenizer.from_pretrained(project.model)
    for name, template in prompt_templates().items():
        rows = MESSAGES if template.SYSTEM is not None else [MESSAGES[0], MESSAGES[2]]
        fields = {field: value for field, value in template.to_json().items() if field != "name"}
        apply = template_map_fn_factory(ConfigDict(fields))
        encoded = [encode_fn(apply(openai_map_fn(row)), tokenizer, 400) for row in rows]
        expected = [{"ids": row["input_ids"], "labels": row["labels"]} for row in encoded]
        assert ours(project, rows, Format.MESSAGES, template, 400) == expected, name


@pytest.mark.engine
@pytest.mark.parametrize(
    ("kind", "rows", "name"),
    [
        (Format.ALPACA, ALPACA, "llama2_chat"),
        (Format.CONVERSATION, CONVERSATION, "internlm2_chat"),
        (Format.MESSAGES, LOSS, "qwen_chat"),
        (Format.TEXT, TEXT, ""),
    ],
    ids=["alpaca", "conversation", "loss", "text"],
)
def test_every_format_gives_the_tokens_of_training(project: Project, kind: Format, rows: list[Any], name: str):
    template = prompt_templates()[name] if name else None
    assert ours(project, rows, kind, template, 60) == theirs(project, rows, kind, template, 60)


@pytest.mark.engine
def test_cut_rows_and_packing(project: Project):
    template = prompt_templates()["qwen_chat"]
    expected = theirs(project, MESSAGES, Format.MESSAGES, template, 64)
    assert ours(project, MESSAGES, Format.MESSAGES, template, 64) == expected
    assert len(expected) == 2
    rows = MESSAGES[:1] * 300
    tokenizer = load_tokenizer(project, project.model)
    measured = measure_rows(rows, Format.MESSAGES, CANONICAL[Format.MESSAGES], template, tokenizer)
    packing = pack([length.tokens for length in measured if length is not None], 64)
    packed = theirs(project, rows, Format.MESSAGES, template, 64, packs=True)
    assert packing.samples == len(packed)
    assert packing.kept_tokens == sum(len(row["ids"]) for row in packed)


def test_lengths_agree_with_the_tokens_shown(project: Project):
    template = prompt_templates()["internlm2_chat"]
    tokenizer = load_tokenizer(project, project.model)
    lengths = measure_rows(
        [*MESSAGES, {"messages": None}], Format.MESSAGES, CANONICAL[Format.MESSAGES], template, tokenizer
    )
    assert lengths[3] is None
    for row, length in zip(MESSAGES, lengths, strict=False):
        segments = training_segments(row, Format.MESSAGES, CANONICAL[Format.MESSAGES], template, tokenizer)
        tokens = training_tokens_of(segments, tokenizer, 10**6)
        assert length is not None
        assert length.tokens == len(tokens)
        assert length.first_learned == next(at for at, token in enumerate(tokens) if token.is_learned)


def test_shown_text_is_the_text(project: Project):
    tokenizer = load_tokenizer(project, project.model)
    segments = training_segments(
        MESSAGES[1], Format.MESSAGES, CANONICAL[Format.MESSAGES], prompt_templates()["qwen_chat"], tokenizer
    )
    tokens = training_tokens_of(segments, tokenizer, 10**6)
    assert "".join(token.text for token in tokens) == "".join(segment.text for segment in segments)


def test_system_text_without_a_place_for_it(project: Project):
    tokenizer = load_tokenizer(project, project.model)
    with pytest.raises(InputError, match=r"templates\.no_system"):
        training_segments(
            MESSAGES[1], Format.MESSAGES, CANONICAL[Format.MESSAGES], prompt_templates()["minicpm"], tokenizer
        )


def test_row_that_would_stop_training(project: Project):
    tokenizer = load_tokenizer(project, project.model)
    row = {"messages": [{"role": "tool", "content": "x"}]}
    with pytest.raises(InputError, match=r"data\.row_unusable"):
        training_segments(row, Format.MESSAGES, CANONICAL[Format.MESSAGES], prompt_templates()["qwen_chat"], tokenizer)


def test_tokenizer_without_bos(project: Project):
    settings = json.loads((project.model / "tokenizer_config.json").read_text())
    (project.model / "special_tokens_map.json").unlink()
    (project.model / "tokenizer_config.json").write_text(json.dumps({**settings, "bos_token": None}))
    with pytest.raises(InputError, match=r"data\.no_bos"):
        load_tokenizer(project, project.model)


def test_no_tokenizer_and_a_broken_one(project: Project):
    file = project.model / "tokenizer.json"
    file.write_text("{}")
    with pytest.raises(InputError, match=r"data\.broken_tokenizer"):
        load_tokenizer(project, project.model)
    file.unlink()
    with pytest.raises(InputError, match=r"data\.no_tokenizer"):
        load_tokenizer(project, project.model)


def test_tokenizer_code_runs_only_with_consent(project: Project):
    folder = write_tiny_internlm2(project.model / "internlm2")
    with pytest.raises(InputError, match=r"models\.code_not_allowed"):
        export_tokenizer(str(project.root), str(folder), SilentProgress())
    allow(project, folder)
    assert Path(export_tokenizer(str(project.root), str(folder), SilentProgress())["path"]).is_file()
