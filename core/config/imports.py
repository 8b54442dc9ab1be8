"""The import lines of a config: which name comes from where, and how one is added, swapped or dropped."""

import ast
import re
from typing import Final

from core.config.tree import Tree

KNOWN_NAMES: Final[dict[str, str]] = {
    "torch": "",
    "AutoModelForCausalLM": "transformers",
    "AutoTokenizer": "transformers",
    "BitsAndBytesConfig": "transformers",
    "load_dataset": "datasets",
    "LoraConfig": "peft",
    "Adam": "torch.optim",
    "AdamW": "torch.optim",
    "AdamW8bit": "bitsandbytes.optim",
    "PagedAdamW8bit": "bitsandbytes.optim",
    "PagedAdamW32bit": "bitsandbytes.optim",
    "AmpOptimWrapper": "mmengine.optim",
    "OptimWrapper": "mmengine.optim",
    "CosineAnnealingLR": "mmengine.optim",
    "LinearLR": "mmengine.optim",
    "process_hf_dataset": "xtuner.dataset",
    "template_map_fn_factory": "xtuner.dataset.map_fns",
    "EvaluateChatHook": "xtuner.engine.hooks",
    "DatasetInfoHook": "xtuner.engine.hooks",
    "ThroughputHook": "xtuner.engine.hooks",
    "PROMPT_TEMPLATE": "xtuner.utils",
    "SYSTEM_TEMPLATE": "xtuner.utils",
    **{
        f"{name}_map_fn": "xtuner.dataset.map_fns"
        for name in [
            "alpaca",
            "alpaca_zh",
            "arxiv",
            "code_alpaca",
            "colors",
            "crime_kg_assitant",
            "default",
            "law_reference",
            "llava",
            "llava_image_only",
            "medical",
            "msagent_react",
            "oasst1",
            "openai",
            "openorca",
            "pretrain",
            "sql",
            "stack_exchange",
            "tiny_codes",
            "wizardlm",
        ]
    },
}
"""Names that edits may bring in, and the module they come from; "" means `import name`."""


def names_in(expression: str) -> set[str]:
    """Names an expression needs. Raises SyntaxError."""
    tree = ast.parse(expression, mode="eval")
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}


def bound_names(tree: Tree) -> set[str]:
    """Names that imports and assignments of the module bind."""
    names = set(tree.variables())
    for statement in ast.walk(tree.module):
        if isinstance(statement, ast.Import | ast.ImportFrom):
            names |= {(alias.asname or alias.name).partition(".")[0] for alias in statement.names}
        elif isinstance(statement, ast.FunctionDef | ast.ClassDef):
            names.add(statement.name)
    return names


def is_used(tree: Tree, name: str) -> bool:
    """Whether the module reads a name anywhere; `name *= 2` alone is no reading."""
    return name in tree.names_read


def bring_in(text: str, name: str, *, instead_of: str | None = None) -> str:
    """The text with `name` imported: in the place of `instead_of` if that is no longer used, else added to the line it belongs to."""
    tree = Tree(text)
    module = KNOWN_NAMES.get(name)
    if module is None or name in bound_names(tree):
        return text
    if instead_of and not is_used(tree, instead_of) and (alias := _alias(tree, module, instead_of)) is not None:
        start, end = tree.span(alias)
        return _replace(tree, start, end, name)
    line = next((s for s in tree.module.body if isinstance(s, ast.ImportFrom) and s.module == module), None)
    if line is None:
        return _add_line(tree, f"from {module} import {name}" if module else f"import {name}", module)
    last = line.names[-1]
    start, end = tree.span(last)
    own_line = tree.line_start(start)
    is_alone = not tree.data[own_line:start].strip()
    indent = tree.text(own_line, start) if is_alone else ""
    return _replace(tree, end, end, f",{tree.newline}{indent}{name}" if is_alone else f", {name}")


def drop_unused(text: str, name: str) -> str:
    """The text without the import of `name`, if nothing uses it any more."""
    tree = Tree(text)
    if is_used(tree, name):
        return text
    for statement in tree.module.body:
        if not isinstance(statement, ast.Import | ast.ImportFrom):
            continue
        at = next((i for i, alias in enumerate(statement.names) if (alias.asname or alias.name) == name), None)
        if at is None:
            continue
        if len(statement.names) == 1:
            start, end = tree.span(statement)
            found = re.compile(rb"[ \t]*(\r\n|\r|\n)?").match(tree.data, end)
            return _replace(tree, start, found.end() if found else end, "")
        spans = [tree.span(alias) for alias in statement.names]
        if at + 1 < len(spans):
            return _replace(tree, spans[at][0], spans[at + 1][0], "")
        return _replace(tree, spans[at - 1][1], spans[at][1], "")
    return text


def _alias(tree: Tree, module: str, name: str) -> ast.alias | None:
    for statement in tree.module.body:
        if isinstance(statement, ast.ImportFrom) and statement.module == module:
            return next((alias for alias in statement.names if alias.name == name and alias.asname is None), None)
    return None


def _add_line(tree: Tree, line: str, module: str) -> str:
    """After the last import of the same package, else after the last import, else before the first statement."""
    imports = [s for s in tree.module.body if isinstance(s, ast.Import | ast.ImportFrom)]
    root = module.partition(".")[0]
    same = [s for s in imports if isinstance(s, ast.ImportFrom) and (s.module or "").partition(".")[0] == root]
    if not module and imports:
        start = tree.span(imports[0])[0]
        return _replace(tree, start, start, line + tree.newline)
    if imports:
        end = tree.span((same or imports)[-1])[1]
        return _replace(tree, end, end, tree.newline + line)
    start = tree.span(tree.module.body[0])[0] if tree.module.body else 0
    return _replace(tree, start, start, line + tree.newline)


def _replace(tree: Tree, start: int, end: int, new: str) -> str:
    return tree.text(0, start) + new + tree.text(end, len(tree.data))
