"""A project with a tiny model, rows of an identity, and configs to work on."""

from pathlib import Path

import pytest

from core.config.facts import DataFacts, Machine, ModelFacts, read_data, read_model
from core.config.library import read_config
from core.config.presets import Wishes, make
from core.config.source import ConfigSource
from core.project import Project, open_project
from core.xtuner.catalogue import find
from tests.models import write_tiny_internlm2, write_tiny_qwen2
from tests.training import write_rows

GPU = Machine(
    gpu_count=1, supports_bf16=True, has_bitsandbytes=True, deepspeed_version="0.19.6", cpu_count=8, free_bytes=2**40
)
"""A machine with one modern card."""


@pytest.fixture
def project(tmp_path: Path) -> Project:
    root = tmp_path / "project"
    root.mkdir()
    return open_project(root)


@pytest.fixture
def qwen2(project: Project) -> ModelFacts:
    return read_model(write_tiny_qwen2(project.model / "tiny-qwen2"))


@pytest.fixture
def internlm2(project: Project) -> ModelFacts:
    return read_model(write_tiny_internlm2(project.model / "tiny-internlm2"))


@pytest.fixture
def rows(project: Project) -> DataFacts:
    return read_data(write_rows(project.data / "rows.jsonl"))


@pytest.fixture
def many_rows(project: Project) -> DataFacts:
    return read_data(write_rows(project.data / "many.jsonl", 4000))


@pytest.fixture
def made(qwen2: ModelFacts, many_rows: DataFacts) -> ConfigSource:
    """Our own config for the tiny model, as on a machine with a GPU: nothing is wrong with it."""
    return ConfigSource(make(qwen2, many_rows, GPU, Wishes(max_length=64)))


@pytest.fixture
def shipped() -> ConfigSource:
    """XTuner's config that the guide starts from."""
    entry = find("internlm2_chat_1_8b_qlora_alpaca_e3")
    assert entry is not None
    return ConfigSource(read_config(entry.path))
