"""Two configs compared by meaning; one taken away with the guide's commands."""

import io
import subprocess
import zipfile

import pytest

from core.config.compare import Difference, compare, flatten
from core.config.deepspeed import find, save
from core.config.edits import set_method
from core.config.export import bundle, commands
from core.config.load import load_values
from core.config.source import ConfigSource
from core.config.values import Code
from core.i18n import catalog
from core.project import Project


def test_layout_comments_and_variables_do_not_count(shipped: ConfigSource) -> None:
    text = shipped.text.replace("# Scheduler & Optimizer", "# another comment\n").replace("lr=lr,", "lr=2e-4,")
    text = text.replace("max_epochs = 3", "rounds = 3\nmax_epochs = rounds")
    assert compare(shipped, ConfigSource(text)) == []


def test_what_training_reads_counts(shipped: ConfigSource) -> None:
    other = shipped.set("lr", 1e-4).set("custom_hooks[EvaluateChatHook].max_new_tokens", 64).delete("model.lora.bias")
    assert compare(shipped, other) == [
        Difference("model.lora.bias", '"none"', None),
        Difference("optim_wrapper.optimizer.lr", "0.0002", "0.0001"),
        Difference("custom_hooks[EvaluateChatHook].max_new_tokens", None, "64"),
    ]


def test_a_variable_that_nothing_reads_is_no_difference(shipped: ConfigSource) -> None:
    assert compare(shipped, ConfigSource(shipped.text + "note = 'mine'\n")) == []


def test_the_values_are_those_that_mmengine_gives(shipped: ConfigSource) -> None:
    ours, theirs = flatten(shipped), load_values(shipped.text)
    assert float(ours["optim_wrapper.optimizer.lr"]) == theirs["optim_wrapper"]["optimizer"]["lr"]
    assert int(ours["train_dataloader.dataset.max_length"]) == theirs["train_dataloader"]["dataset"]["max_length"]
    assert float(ours["param_scheduler[CosineAnnealingLR].begin"]) == theirs["param_scheduler"][1]["begin"]
    assert ours["optim_wrapper.accumulative_counts"] == str(theirs["optim_wrapper"]["accumulative_counts"])


def test_the_guides_commands(project: Project, shipped: ConfigSource) -> None:
    found = commands(project, "my config", shipped, deepspeed=find(project, "deepspeed_zero2"), cards=2)
    lines = [command.line for command in found]
    assert lines == [
        f"cd {project.root}",
        "NPROC_PER_NODE=2 xtuner train 'config/my config.py' --work-dir 'train/my config' --deepspeed deepspeed_zero2",
        "xtuner convert pth_to_hf 'config/my config.py' \"$(cat 'train/my config'/last_checkpoint)\" 'huggingface/my config'",
        "xtuner convert merge internlm/internlm2-chat-1_8b 'huggingface/my config' 'final_model/my config'",
        "xtuner chat 'final_model/my config' --prompt-template internlm2_chat",
    ]
    full = commands(project, "full", set_method(shipped, "full"))
    assert [command.line.split()[:3] for command in full][-1] == ["xtuner", "chat", "huggingface/full"]
    assert not any("merge" in command.line for command in full)
    inline = commands(project, "x", shipped.set("prompt_template", Code("dict(INSTRUCTION='{input}')")))
    assert "--prompt-template" not in inline[-1].line
    assert all("config.export" not in catalog("zh").say(command.why) for command in found)


def test_the_bundle_holds_the_config_byte_for_byte(project: Project, shipped: ConfigSource) -> None:
    script = "#!/bin/bash\n" + "\n".join(command.line for command in commands(project, "mine", shipped)) + "\n"
    with zipfile.ZipFile(io.BytesIO(bundle("mine", shipped.text, script))) as archive:
        assert archive.read("config/mine.py").decode() == shipped.text
        assert archive.read("commands.sh").decode() == script
        assert archive.getinfo("commands.sh").external_attr >> 16 & 0o111
    checked = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True, check=False)
    assert checked.returncode == 0, checked.stderr


def test_a_deepspeed_json_of_ones_own_goes_along(project: Project, shipped: ConfigSource) -> None:
    save(project, "small", '{"zero_optimization": {"stage": 2}}')
    setting = find(project, "small")
    train = next(each.line for each in commands(project, "mine", shipped, deepspeed=setting) if " train " in each.line)
    assert train.endswith("--deepspeed config/deepspeed/small.json")
    with zipfile.ZipFile(io.BytesIO(bundle("mine", shipped.text, "", setting))) as archive:
        assert archive.read("config/deepspeed/small.json").decode() == setting.text
    stock = find(project, "deepspeed_zero2")
    with zipfile.ZipFile(io.BytesIO(bundle("mine", shipped.text, "", stock))) as archive:
        assert archive.namelist() == ["config/mine.py", "commands.sh"]


@pytest.mark.parametrize("name", ["a'b", "$(touch x)", "名 字"])
def test_names_are_quoted_for_the_shell(project: Project, shipped: ConfigSource, name: str) -> None:
    for command in commands(project, name, shipped):
        words = subprocess.run(
            ["bash", "-c", f"xtuner() {{ printf '%s\\n' \"$@\"; }}; cat() {{ :; }}; {command.line}"],
            cwd=project.root, capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
        assert "touch" not in words.replace(name, "")
    assert not (project.root / "x").exists()
