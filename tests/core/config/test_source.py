"""Single places of a config: found through variables, changed alone, refused with line and column where it does not parse."""

import pytest

from core.config.source import ConfigSource, diff
from core.config.values import Code
from core.errors import InputError

TEXT = """\
import torch  # 中文注释
from xtuner.dataset.map_fns import alpaca_map_fn, template_map_fn_factory
lr = 2e-4  # learning rate
steps = (500)
steps *= 2
name = 'it''s'
data = dict(
    type=Loader,
    files=["a.json"],  # one file
    fn=alpaca_map_fn,
)
loader = dict(dataset=data, n=[dict(type=A, x=1), dict(type=B, x=2)])
"""


def test_a_value_is_found_through_variables_and_types() -> None:
    source = ConfigSource(TEXT)
    assert source.get("loader.dataset.files") == ["a.json"]
    assert source.get("loader.n[B].x") == 2
    assert source.get("loader.n[0].x") == 1
    assert source.get("data.fn") == Code("alpaca_map_fn")
    assert source.get("nothing.here", None) is None
    assert source.effective("steps") == 1000
    assert source.line_of("loader.dataset.files") == 9


@pytest.mark.parametrize(
    ("path", "value", "line"),
    [
        ("lr", 1e-5, "lr = 1e-5  # learning rate"),
        ("steps", 7, "steps = 7"),
        ("name", 'say "hi"', """name = 'say "hi"'"""),
        ("data.files", ["b.json", "c.json"], '    files=["b.json", "c.json"],  # one file'),
        ("loader.n[B].x", -3, "loader = dict(dataset=data, n=[dict(type=A, x=1), dict(type=B, x=-3)])"),
        ("data.new", True, "    new=True,"),
        ("loader.n[A].y", None, "loader = dict(dataset=data, n=[dict(type=A, x=1, y=None), dict(type=B, x=2)])"),
    ],
)
def test_set_writes_one_line(path: str, value: object, line: str) -> None:
    edited = ConfigSource(TEXT).set(path, value)
    changed = [one for one in diff(TEXT, edited.text, context_lines=0).splitlines() if one[:1] in "+-"][2:]
    assert [one[1:] for one in changed if one.startswith("+")] == [line]
    assert len(changed) <= 2
    assert edited.get(path) == value


def test_windows_lines_a_byte_order_mark_and_tabs_survive() -> None:
    text = "\ufeff" + TEXT.replace("\n", "\r\n").replace("    ", "\t")
    edited = ConfigSource(text).set("data.files", "d.json").set("lr", 3e-4)
    assert edited.text == text.replace('["a.json"]', '"d.json"').replace("2e-4", "3e-4")
    assert edited.set("data.more", 1).text.count("\r\n") == text.count("\r\n") + 1


def test_imports_follow_the_names() -> None:
    swapped = ConfigSource(TEXT).set("data.fn", Code("openai_map_fn"))
    assert "import openai_map_fn, template_map_fn_factory" in swapped.text
    assert "alpaca_map_fn" not in swapped.text
    added = ConfigSource(TEXT).set("data.lora", {"type": Code("LoraConfig"), "r": 8})
    assert "from peft import LoraConfig\n" in added.text
    dropped = added.delete("data.lora")
    assert dropped.text == TEXT


def test_delete_takes_its_line_or_its_comma() -> None:
    source = ConfigSource(TEXT)
    assert source.delete("data.files").text == TEXT.replace('    files=["a.json"],  # one file\n', "")
    assert "n=[dict(type=B, x=2)])" in source.delete("loader.n[A]").text
    assert "n=[dict(type=A, x=1)])" in source.delete("loader.n[B]").text


@pytest.mark.parametrize("path", ["nothing", "data.files.deep.er", "lr.x"])
def test_a_place_that_is_not_there(path: str) -> None:
    with pytest.raises(InputError, match=r"config\.no_such_place"):
        ConfigSource(TEXT).set(path, 1)


def test_an_expression_must_parse() -> None:
    with pytest.raises(InputError, match=r"config\.bad_expression"):
        ConfigSource(TEXT).set("lr", Code("1 +"))


@pytest.mark.parametrize(
    ("text", "line", "column"),
    [
        ("lr = = 1\n", 1, 6),
        ("a = 1\nb = dict(x=1\nc = 2\n", 2, 9),
        ("a = 1\n\tb = 2\n", 2, 1),
        ("甲 = 1\nx = $\n", 2, 5),
    ],
)
def test_a_syntax_error_has_line_and_column(text: str, line: int, column: int) -> None:
    with pytest.raises(InputError, match=r"config\.syntax") as caught:
        ConfigSource(text)
    assert (caught.value.params["line"], caught.value.params["column"]) == (line, column)


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("a = 1\n" * 200_000, r"config\.too_large"),
        ("a = 1\nb = '\0'\n", r"config\.not_text"),
        ("a = " + "(" * 5000 + ")" * 5000, r"config\.syntax"),
    ],
    ids=["huge", "binary", "deep"],
)
def test_what_is_no_config_is_refused(text: str, code: str) -> None:
    with pytest.raises(InputError, match=code):
        ConfigSource(text)


@pytest.mark.parametrize("text", ["a = b\nb = a\n", "a = a\n", "a = [a]\nb = a\n"])
def test_variables_that_go_in_circles_end(text: str) -> None:
    source = ConfigSource(text)
    assert "a" in str(source.get("a")) or "b" in str(source.get("a"))


def test_nothing_is_run(tmp_path: object) -> None:
    text = f"import os\nos.mkdir({str(tmp_path) + '/made'!r})\nx = 10 ** 10 ** 10\n"
    assert ConfigSource(text).get("x") == Code("10 ** 10 ** 10")
    assert not __import__("pathlib").Path(f"{tmp_path}/made").exists()


STYLES = """\
lr: float = 2e-4
path = 'a.json'
loader = dict(
    dataset=path,
    hooks=[
        dict(type='xtuner.engine.EvaluateChatHook', every=500),
        dict(type=mmengine.CheckpointHook, keep=3)  # the last one
    ],
    plain={"a": 1, 'b': [1, 2, 3]}  # no comma
)
empty = dict()
pair = (1, dict(x=2))
both = dict(**loader, y=1)
"""


def test_what_a_path_names_in_other_ways_of_writing() -> None:
    source = ConfigSource(STYLES)
    assert source.get("lr") == 2e-4
    assert source.get("loader.plain.a") == 1
    assert source.get("loader.plain.b[2]") == 3
    assert source.get("pair[1].x") == 2
    assert source.get("both.y") == 1
    assert source.get("loader.hooks[EvaluateChatHook].every") == 500
    assert source.get("loader.hooks[CheckpointHook].keep") == 3
    assert source.type_name("loader.hooks[0]") == "EvaluateChatHook"
    assert source.type_name("loader.plain") is None
    assert source.line_of("loader.hooks[1].keep") == 7
    for path in ("loader.hooks[2]", "loader.hooks[Absent]", "loader.plain.c", "pair[2]", "lr[0]", "empty.x"):
        assert not source.has(path), path


def test_a_variable_or_the_place_that_names_it_is_changed_as_asked() -> None:
    source = ConfigSource(STYLES)
    assert source.variable_at("loader.dataset") == "path"
    assert source.variable_at("loader.plain") is None
    assert (source.written("loader.dataset"), source.written("loader.dataset", follow=False)) == ("'a.json'", "path")
    assert source.set("loader.dataset", "b.json").text == STYLES.replace("'a.json'", "'b.json'")
    assert source.set("loader.dataset", "b.json", follow=False).text == STYLES.replace(
        "dataset=path", 'dataset="b.json"'
    )
    assert source.set("lr", 2e-4) is source


def test_the_dataset_of_the_loader_is_the_training_set_where_no_variable_is() -> None:
    text = "train_dataloader = dict(dataset=dict(n=1))\n"
    assert ConfigSource(text).get("train_dataset.n") == 1
    assert ConfigSource(text + "train_dataset = dict(n=2)\n").get("train_dataset.n") == 2


@pytest.mark.parametrize(
    ("path", "before", "after"),
    [
        ("empty.x", "empty = dict()", "empty = dict(x=5)"),
        ("both.x", "**loader, y=1)", "**loader, y=1, x=5)"),
        ("loader.plain.x", "'b': [1, 2, 3]}", "'b': [1, 2, 3], \"x\": 5}"),
        ("loader.x", "3]}  # no comma\n", "3]},  # no comma\n    x=5,\n"),
        ("loader.hooks[1].x", "keep=3)", "keep=3, x=5)"),
    ],
)
def test_a_new_entry_stands_where_its_dict_is_written_as_that_is(path: str, before: str, after: str) -> None:
    edited = ConfigSource(STYLES).set(path, 5)
    assert edited.text == STYLES.replace(before, after)
    assert edited.get(path) == 5
    assert edited.delete(path).get(path, None) is None


@pytest.mark.parametrize(
    ("path", "before", "after"),
    [
        ("loader.plain.a", "\"a\": 1, 'b'", "'b'"),
        ("loader.plain.b", ", 'b': [1, 2, 3]", ""),
        ("loader.plain.b[0]", "[1, 2, 3]", "[2, 3]"),
        ("loader.plain", "    plain={\"a\": 1, 'b': [1, 2, 3]}  # no comma\n", ""),
        ("loader.hooks[1]", "        dict(type=mmengine.CheckpointHook, keep=3)  # the last one\n", ""),
        ("both.y", ", y=1", ""),
        ("pair[1].x", "dict(x=2)", "dict()"),
    ],
)
def test_an_entry_goes_with_its_comma_or_its_line(path: str, before: str, after: str) -> None:
    edited = ConfigSource(STYLES).delete(path)
    assert edited.text == STYLES.replace(before, after)
    assert ConfigSource(edited.text).has("loader")


def test_an_entry_that_is_not_there_cannot_go() -> None:
    with pytest.raises(InputError, match=r"config\.no_such_place"):
        ConfigSource(STYLES).delete("loader.absent")


def test_what_training_uses_counts_every_later_change_of_a_variable() -> None:
    source = ConfigSource("steps = 4\nsteps *= 3\nsteps += 1\nfiles = ['a']\nfiles += ['b']\n")
    assert (source.get("steps"), source.effective("steps")) == (4, 13)
    assert source.effective("files") == ["a", "b"]
    assert source.effective("absent", 7) == 7


def test_a_value_of_several_lines_is_indented_as_its_place() -> None:
    deep = "model = dict(\n    llm=dict(\n        x=1,\n    ),\n)\n"
    value = {"type": Code("LoraConfig"), "target_modules": [f"module_{number}_of_a_long_list" for number in range(6)]}
    edited = ConfigSource(deep).set("model.llm.lora", value)
    assert edited.get("model.llm.lora.target_modules") == value["target_modules"]
    lines = edited.text.splitlines()
    start = next(number for number, line in enumerate(lines) if "lora=" in line)
    assert lines[start].startswith("        lora=dict(")
    assert all(line.startswith("        ") for line in lines[start : lines.index("    ),")])


def test_what_is_not_there_has_no_line_no_type_and_no_text() -> None:
    source = ConfigSource(STYLES)
    assert (source.line_of("absent"), source.type_name("absent"), source.variable_at("absent")) == (None, None, None)
    with pytest.raises(InputError, match=r"config\.no_such_place") as caught:
        source.written("loader.absent")
    assert caught.value.params == {"path": "loader.absent"}
    with pytest.raises(InputError) as refused:
        source.set("absent.deep.er", 1)
    assert refused.value.params == {"path": "absent.deep.er"}


def test_a_place_inside_a_value_is_what_is_written_there() -> None:
    source = ConfigSource("steps = [1, 2]\nsteps += [3]\ndata = dict(n=5)\n")
    assert source.effective("steps") == [1, 2, 3]
    assert source.effective("steps[0]") == 1
    assert source.effective("data.n") == 5


def test_a_new_entry_comes_behind_what_a_call_is_given_without_a_name() -> None:
    assert ConfigSource("a = dict(base)\n").set("a.x", 1).text == "a = dict(base, x=1)\n"


def test_a_name_takes_the_place_of_another_only_in_their_own_import() -> None:
    edited = ConfigSource(TEXT).set("data.fn", {"type": Code("LoraConfig")})
    assert "from xtuner.dataset.map_fns import template_map_fn_factory\n" in edited.text
    assert "from peft import LoraConfig\n" in edited.text


def test_a_diff_names_the_file_and_ends_every_line() -> None:
    old = "".join(f"line {number}\n" for number in range(9))
    assert diff(old, old) == ""
    assert diff(old, old.replace("line 4\n", "LINE 4\n"), name="ft.py") == (
        "--- a/ft.py\n+++ b/ft.py\n@@ -3,5 +3,5 @@\n line 2\n line 3\n-line 4\n+LINE 4\n line 5\n line 6\n"
    )
    assert diff("a", "b") == "--- a/config.py\n+++ b/config.py\n@@ -1 +1 @@\n-a\n+b\n"


def test_true_is_not_one() -> None:
    assert ConfigSource("x = 1\n").set("x", True).text == "x = True\n"
    assert ConfigSource("x = True\n").set("x", 1).text == "x = 1\n"


def test_an_entry_that_ends_a_line_of_others_goes_alone() -> None:
    text = "a = dict(x=1, y=2,\n         z=3)\n"
    assert ConfigSource(text).delete("a.y").text == "a = dict(x=1, z=3)\n"
    assert ConfigSource(text).delete("a.z").get("a.y") == 2


def test_a_dict_that_takes_in_another_keeps_its_own_entries() -> None:
    source = ConfigSource('base = dict(a=1)\nplain = {**base, "x": 1}\n')
    assert source.get("plain.x") == 1
    assert source.set("plain.x", 2).text == 'base = dict(a=1)\nplain = {**base, "x": 2}\n'
    assert source.delete("plain.x").text == "base = dict(a=1)\nplain = {**base}\n"


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_a_long_value_in_place_of_a_short_one_is_indented_as_its_line(newline: str) -> None:
    text = newline.join(["model = dict(", "    modules='all',", ")", ""])
    value = [f"module_number_{number}_of_a_list_that_needs_lines" for number in range(5)]
    edited = ConfigSource(text).set("model.modules", value)
    lines = edited.text.split(newline)
    assert len(lines) > 5
    assert all("\n" not in line and "\r" not in line for line in lines)
    assert lines[-3] == "    ],"
    assert edited.get("model.modules") == value


def test_a_byte_order_mark_does_not_move_the_first_line() -> None:
    text = "\ufefflr = 2e-4; steps = 5\nx = 1\n"
    source = ConfigSource(text)
    assert (source.get("lr"), source.get("steps"), source.line_of("x")) == (2e-4, 5, 2)
    assert source.set("lr", 1e-5).set("steps", 7).text == "\ufefflr = 1e-5; steps = 7\nx = 1\n"
