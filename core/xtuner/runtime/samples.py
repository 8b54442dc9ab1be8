"""Sample answers to the config's fixed prompts while it trains, from step 0 on, into samples.jsonl."""

import json
import time
from pathlib import Path
from typing import Any, Final

import torch
from mmengine.dist import get_rank
from xtuner.engine.hooks import EvaluateChatHook

ANSWER_TOKENS: Final = 64
"""Enough to see a change of identity or style; XTuner's 600 would take minutes on CPU, at every save."""


class SampleHook(EvaluateChatHook):  # type: ignore[misc]
    """XTuner's EvaluateChatHook with the same prompts, system text and template, but greedy and short, once an iteration.

    Greedy answers can be compared from step to step, and draw nothing from the random generators that training uses.
    """

    def __init__(self, *args: Any, run: str, **options: Any) -> None:
        options.setdefault("max_new_tokens", ANSWER_TOKENS)
        # XTuner appends to the default list of its own signature.
        options["stop_words"] = list(options.get("stop_words") or [])
        options["generation_kwargs"] = {
            "do_sample": False,
            "temperature": None,
            "top_p": None,
            "top_k": None,
            **(options.get("generation_kwargs") or {}),
        }
        system = options.get("system", "")
        super().__init__(*args, **options)
        self._plain_system = system
        self._path = Path(run) / "samples.jsonl"
        self._sampled_at: int | None = None

    def before_train(self, runner: Any) -> None:
        self._sample(runner, runner.iter)

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        del batch_idx, data_batch, outputs
        if self.every_n_iters and self.every_n_train_iters(runner, self.every_n_iters):
            self._sample(runner, runner.iter + 1)

    def after_train(self, runner: Any) -> None:
        self._sample(runner, runner.iter)

    def _sample(self, runner: Any, iteration: int) -> None:
        if self._sampled_at == iteration or not self.evaluation_inputs:
            return
        self._sampled_at = iteration
        self._iteration = iteration
        self._generate_samples(runner)

    def _eval_language(
        self, runner: Any, model: Any, device: Any, max_new_tokens: int | None = None, save_eval_output: bool = False
    ) -> None:
        del save_eval_output
        for prompt in self.evaluation_inputs:
            text = (self.system + self.instruction).format(input=prompt, round=1, **_plain(runner.cfg))
            ids = self.tokenizer.encode(text, return_tensors="pt").to(device)
            generated = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_new_tokens,
                generation_config=self.gen_config,
                stopping_criteria=self.stop_criteria,
            )
            answer = self.tokenizer.decode(generated[0][ids.shape[1] :], skip_special_tokens=True).strip()
            runner.logger.info(f"Sample output at iteration {self._iteration}:\n{prompt}\n{answer}\n")
            self._write(prompt, answer)

    def _write(self, prompt: str, answer: str) -> None:
        if get_rank() != 0:
            return
        line = {
            "iteration": self._iteration,
            "prompt": prompt,
            "system": self._plain_system or None,
            "answer": answer,
            "at": round(time.time(), 3),
        }
        with open(self._path, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(line, ensure_ascii=False) + "\n")


def _plain(config: Any) -> dict[str, Any]:
    """Variables of the config that a template may name (`{bot_name}`); `input` and `round` are the hook's own."""
    return {
        key: value
        for key, value in config.items()
        if isinstance(value, str | int | float) and key not in {"input", "round"}
    }
