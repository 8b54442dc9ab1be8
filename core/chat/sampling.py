"""From logits to the next token: penalties, temperature, top-k, top-p, min-p, on the device the logits are on."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch

from core.errors import InputError

_CANDIDATES: Final = 256
"""Largest logits looked at first: sorting a whole vocabulary costs more than the rest of a small model's step."""
_LIMITS: Final[dict[str, tuple[float, float]]] = {
    "temperature": (0.0, 5.0),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (0.1, 10.0),
    "top_k": (0, 1_000_000),
    "max_tokens": (1, 1_000_000),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How one answer is chosen. `temperature` 0 takes the most probable token each time."""

    max_tokens: int | None = None
    """Tokens of the answer at most; None: as many as fit."""
    temperature: float = 0.7
    top_p: float = 0.8
    top_k: int = 0
    """0: all."""
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    """The answer ends before the first of these."""
    ignore_eos: bool = False
    """Go on to `max_tokens` whatever comes: for measurements."""

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Sampling":
        """Of a request's fields; those that are missing or null keep their default. Raises InputError `chat.bad_setting`."""
        given: dict[str, Any] = {}
        for name, (low, high) in _LIMITS.items():
            number = value.get(name)
            if number is None:
                continue
            is_whole = name in ("top_k", "max_tokens")
            if isinstance(number, bool) or not isinstance(number, int if is_whole else int | float):
                raise InputError("chat.bad_setting", name=name, value=str(number), low=low, high=high)
            if not low <= number <= high:
                raise InputError("chat.bad_setting", name=name, value=number, low=low, high=high)
            given[name] = number if is_whole else float(number)
        seed = value.get("seed")
        if seed is not None:
            if not isinstance(seed, int) or isinstance(seed, bool):
                raise InputError("chat.bad_setting", name="seed", value=str(seed), low=-(2**63), high=2**63 - 1)
            given["seed"] = seed
        return cls(**given, stop=_stop_words(value.get("stop")), ignore_eos=bool(value.get("ignore_eos")))


def _stop_words(value: Any) -> tuple[str, ...]:
    words = [value] if isinstance(value, str) else value or []
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise InputError("chat.bad_stop", value=str(value))
    return tuple(word for word in words if word)


class Sampler:
    """Chooses the tokens of one answer. Same seed, settings and logits: same tokens."""

    def __init__(self, sampling: Sampling, vocabulary: int, prompt: list[int], device: torch.device) -> None:
        self._sampling = sampling
        self._random = torch.Generator(device=device)
        if sampling.seed is None:
            self._random.seed()
        else:
            self._random.manual_seed(sampling.seed % 2**63)
        self._seen: torch.Tensor | None = None
        if sampling.repetition_penalty != 1.0:
            self._seen = torch.zeros(vocabulary, dtype=torch.bool, device=device)
            self._seen[torch.tensor(prompt, device=device)] = True

    @property
    def is_greedy(self) -> bool:
        """Whether the most probable token is all that is asked for."""
        return self._sampling.temperature == 0.0 and self._seen is None

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def choose(self, logits: torch.Tensor) -> int:
        """The next token for `logits` (vocabulary,)."""
        if self.is_greedy:
            return int(logits.argmax())
        logits = logits.float()
        if self._seen is not None:
            penalty = self._sampling.repetition_penalty
            logits = torch.where(self._seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
        token = int(logits.argmax()) if self._sampling.temperature == 0.0 else self._sample(logits)
        if self._seen is not None:
            self._seen[token] = True
        return token

    def _sample(self, logits: torch.Tensor) -> int:
        settings = self._sampling
        logits = logits / settings.temperature
        count = logits.shape[0]
        if 0 < settings.top_k < count:
            values, tokens = logits.topk(settings.top_k)
            probabilities = values.softmax(-1)
        elif settings.top_p < 1.0 or settings.min_p > 0.0:
            values, tokens = logits.topk(min(_CANDIDATES, count))
            probabilities = (values - logits.logsumexp(-1)).exp()
            enough_mass = float(probabilities.sum()) >= settings.top_p < 1.0
            enough_height = settings.min_p > 0.0 and float(probabilities[-1] / probabilities[0]) < settings.min_p
            if not (enough_mass or enough_height) and len(values) < count:
                values, tokens = logits.sort(descending=True)
                probabilities = values.softmax(-1)
        else:
            probabilities, tokens = logits.softmax(-1), torch.arange(count, device=logits.device)
        probabilities = _cut(probabilities, settings)
        point = torch.rand((), generator=self._random, device=logits.device) * probabilities.sum()
        place = int(torch.searchsorted(probabilities.cumsum(-1), point, right=True))
        return int(tokens[min(place, len(tokens) - 1)])


def _cut(probabilities: torch.Tensor, settings: Sampling) -> torch.Tensor:
    """Zero for what top-p (arXiv 1904.09751) and min-p (arXiv 2407.01082) leave out; the first always stays."""
    if settings.top_p < 1.0:
        before = probabilities.cumsum(-1) - probabilities
        kept = before < settings.top_p
        kept[0] = True
        probabilities = probabilities * kept
    if settings.min_p > 0.0:
        probabilities = probabilities * (probabilities >= settings.min_p * probabilities.max())
    return probabilities
