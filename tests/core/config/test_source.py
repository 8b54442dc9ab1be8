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
