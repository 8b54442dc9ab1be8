"""From a sample answer of a run to the models that it is to be compared with: found again from an address, made if not there."""

import json
import shutil
import time
from pathlib import Path

import pytest

from core.chat.comparison import columns_of
from core.chat.models import find_chat_models
from core.chat.run_answers import address, deliver, follow, links
from core.files import write_json
from core.project import Project
from core.runs.directory import RunDirectory
from core.runs.request import TrainRequest
from core.runs.samples import read_answers
from core.runs.state import read_status
from core.runs.train import plan
from core.settings import Settings
from tests.models import write_tiny_qwen2
from tests.pages.projects import write_checkpoint
from tests.training import make_project

pytestmark = pytest.mark.engine


@pytest.fixture
def trained(tmp_path: Path) -> tuple[Project, RunDirectory]:
    """A run with a checkpoint at iteration 8 and answers to two prompts before, at and after it. Its base lies elsewhere."""
    project, config = make_project(tmp_path / "project", write_tiny_qwen2)
    spec = plan(project, TrainRequest(config=config, name="done"))
    run = RunDirectory(project.train / spec.id)
    run.source.mkdir(parents=True)
    shutil.copy(config, run.source)
    write_json(run.spec_file, spec.to_json())
    samples = [
        {"iteration": iteration, "prompt": prompt, "system": "be brief", "answer": "hm"}
        for iteration in (0, 5, 9)
        for prompt in ("Who are you?", "two\nlines")
    ]
    run.samples_file.write_text("".join(json.dumps(sample) + "\n" for sample in samples), encoding="utf-8")
    return project, run


def test_without_a_checkpoint_there_is_nothing_to_compare(trained: tuple[Project, RunDirectory]) -> None:
    project, run = trained
    answers = read_answers(run)
    assert links(project, run, answers) == [None] * len(answers)
    assert follow(project, f"{run.id}/5/0") is None


@pytest.mark.parametrize("text", ["", "x", "../../etc/8/0", "no_such_run/8/0", "{run}/7/0", "{run}/5/9", "{run}/0/0"])
def test_an_address_that_names_nothing_leads_nowhere(trained: tuple[Project, RunDirectory], text: str) -> None:
    project, run = trained
    write_checkpoint(run.path / "iter_8.pth")
    assert follow(project, text.format(run=run.id)) is None


def test_the_adapter_is_made_once_and_stands_beside_its_base(trained: tuple[Project, RunDirectory]) -> None:
    project, run = trained
    write_checkpoint(run.path / "iter_8.pth")
    found = links(project, run, read_answers(run))
    assert [link and link.checkpoint.name for link in found] == [None, None, *["iter_8"] * 4]
    link = found[3]
    assert link is not None
    assert link.is_ready
    assert follow(project, address(link)) == link
    assert link.models(find_chat_models(project, Settings(home=project.root / "home"))) == []
    job = deliver(project, link)
    assert job is not None
    assert deliver(project, link) is None, "it is on its way"
    deadline = time.monotonic() + 600
    while read_status(job).phase.is_active:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    again = follow(project, address(link))
    assert again is not None
    assert again.answer.prompt == "two\nlines"
    assert deliver(project, again) is None, "it is there"
    base, tuned = again.models(find_chat_models(project, Settings(home=project.root / "home")))
    assert (base.kind, tuned.kind, tuned.name) == ("base", "adapter", "iter_8")
    columns = columns_of([base, tuned])
    assert columns[0].source == columns[1].source
