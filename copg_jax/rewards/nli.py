"""Entailment as a reward: whether a text says what a completion claims."""

import hashlib
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from copg_jax.data.formats.texts import Text, content
from copg_jax.errors import InputError
from copg_jax.rewards.protocol import Missing, RewardFn, reading

log = logging.getLogger(__name__)

_LABEL = "entailment"


def entailment(
    path: str, column: str, *, batch_size: int = 16, max_tokens: int | None = None
) -> RewardFn:
    """Makes the reward *p(entailment | premise, completion)*, in [0, 1].

    As Roit et al. 2023, "Factually Consistent Summarization via Reinforcement Learning with Textual
    Entailment Feedback": the premise is the post or document, the hypothesis the completion. The
    classifier is any checkpoint of Hugging Face for natural language inference that
    `AutoModelForSequenceClassification` loads; it computes on the CPU, by torch, in float32. A
    premise that is too long is cut at its end; the log counts those. A row without a premise has no
    reward (`no_premise`), nor has a completion that leaves no room for one (`too_long`).

    Args:
        path: folder or hub id of the checkpoint.
        column: of the premises; `prompt` is the prompt.
        batch_size: pairs a forward pass.
        max_tokens: of premise and completion together; null = what the model can read.

    Raises:
        InputError: torch is not installed, no such checkpoint, or no label `entailment` in it.
    """
    for name, count in (("batch_size", batch_size), ("max_tokens", max_tokens or 1)):
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise InputError(f"{name}: wanted a whole number of at least 1, got {count!r:.80}")
    classifier = _Classifier(path, max_tokens)

    def score(
        prompts: Sequence[Text], completions: Sequence[Text], **columns: Any
    ) -> list[float | Missing]:
        premises = prompts if column == "prompt" else columns[column]
        encoded = [
            Missing("no_premise") if premise is None else classifier.encode(premise, completion)
            for premise, completion in zip(premises, completions, strict=True)
        ]
        pairs = [pair for pair in encoded if not isinstance(pair, Missing)]
        found = [
            probability
            for begin in range(0, len(pairs), batch_size)
            for probability in classifier.probabilities(pairs[begin : begin + batch_size])
        ]
        rest = iter(found)
        return [pair if isinstance(pair, Missing) else next(rest) for pair in encoded]

    vars(score)["fingerprint"] = classifier.fingerprint
    return score if column == "prompt" else reading(column, score)


class _Classifier:
    """A checkpoint with its tokenizer."""

    def __init__(self, path: str, max_tokens: int | None) -> None:
        try:
            import torch  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise InputError(
                f"wanted the library torch, which is not installed ({error}). Fix: install the "
                "extra `nli`: pip install 'copg_jax[nli]'"
            ) from error
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(path)
            self._model: Any = AutoModelForSequenceClassification.from_pretrained(
                path, dtype=torch.float32
            ).eval()
        except (OSError, ValueError, KeyError) as error:
            raise InputError(
                f"path {path}: wanted a checkpoint for sequence classification, with its "
                f"tokenizer, got {type(error).__name__}: {error}"
            ) from error
        self._torch = torch
        self._label = _find_label(path, self._model.config.id2label)
        self._limit = min(max_tokens or 1 << 30, _most_tokens(self._model, self._tokenizer))
        self._num_read = self._num_cut = 0

    @property
    def fingerprint(self) -> str:
        """Hash of all that decides the numbers."""
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        words = backend.to_str() if backend else repr(sorted(self._tokenizer.get_vocab().items()))
        found = hashlib.sha256(f"{self._label} {self._limit} {words}".encode())
        found.update(self._model.config.to_json_string().encode())
        for name, tensor in sorted(self._model.state_dict().items()):
            found.update(name.encode() + tensor.numpy().tobytes())
        return found.hexdigest()

    def encode(self, premise: Any, completion: Any) -> Any:
        """The tokens of a pair, its premise cut where it is too long."""
        texts = content(premise), content(completion)
        pair = self._tokenizer(*texts, verbose=False)
        self._num_read += 1
        if (too_many := len(pair["input_ids"]) - self._limit) <= 0:
            return pair
        alone = self._tokenizer(texts[0], add_special_tokens=False, verbose=False)
        if too_many >= len(alone["input_ids"]):
            return Missing("too_long")
        self._num_cut += 1
        if self._num_cut & (self._num_cut - 1) == 0:  # 1, 2, 4, 8, ...
            log.warning(
                "entailment: %d of %d premises so far cut at their end, to %d tokens with the "
                "completion",
                *(self._num_cut, self._num_read, self._limit),
            )
        return self._tokenizer(*texts, truncation="only_first", max_length=self._limit)

    def probabilities(self, pairs: Sequence[Any]) -> list[float]:
        """p(entailment) of each pair."""
        batch = self._tokenizer.pad(list(pairs), return_tensors="pt")
        with self._torch.inference_mode():
            logits = self._model(**batch).logits
        return logits.softmax(-1)[:, self._label].tolist()


def _find_label(path: str, names: Mapping[int, str]) -> int:
    """Which class is entailment.

    Raises:
        InputError: none, or several, have that name.
    """
    found = [index for index, name in names.items() if str(name).casefold() == _LABEL]
    if len(found) != 1:
        raise InputError(
            f"path {path}: wanted one label {_LABEL!r} in id2label of its config.json, got "
            f"{dict(names)!r:.200}. Fix: name the labels there, or take a checkpoint for natural "
            "language inference."
        )
    return found[0]


def _most_tokens(model: Any, tokenizer: Any) -> int:
    """How many tokens the model can read at once."""
    positions = getattr(model.config, "max_position_embeddings", None) or 1 << 30
    if "roberta" in model.config.model_type:  # its positions begin behind that of the padding
        positions -= model.config.pad_token_id + 1
    return min(positions, tokenizer.model_max_length)
