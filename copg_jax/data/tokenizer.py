"""The tokenizer and the rules by which prompts and completions become token ids, and text again.

1. `load_tokenizer` reads a Hugging Face tokenizer from a local folder or the hub.
2. `Encoder` puts in front of a prompt what the tokenizer itself puts in front of a text, splits
   prompt and completion as TRL does, and ends a completion in its end token, by id: EOS, or of
   what the chat template renders (`Encoder.of_turns`) the end of the template's turns.
3. `Encoder.completion_text` is the text of a completion's ids, for whoever wants one.
4. `tokenizer_hash` names the tokenizer in caches and side-cars.
"""

import copy
import hashlib
import json
import re
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from copg_jax.data.chat_template import ChatTemplate
from copg_jax.errors import InputError

SEPARATE = "completion encoded by itself: a token would reach over from its prompt"
NOT_EXACT = "text that the tokenizer does not give back exactly"
_GENERAL = ("TokenizersBackend", "PreTrainedTokenizerFast")  # classes that are what the files say
# A prompt is long and its completions are many: only its last words are encoded with each of them.
_MOST_TAIL, _LEAST_TAIL = 128, 32  # characters
_WORD = re.compile(r"(?<=[^\W\d_]) (?=[^\W\d_])")  # a blank between two letters
_SPLITTERS = ("ByteLevel", "Digits", "Split", "Whitespace", "WhitespaceSplit", "BertPreTokenizer")
_LOOKS_BACK = re.compile(r"\(\?<|\\[bBAGK]|(?<!\[)\^")  # parts of a regular expression
_MAY_PUT_BLANK = ("Sequence", "Prepend", "Metaspace", "ByteLevel")


def load_tokenizer(path_or_id: str | Path, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a model folder or hub id; code that comes with it is never run.

    Raises:
        InputError: cannot be loaded, has no fast (`tokenizers`) form, or no end-of-sequence token
            in its vocabulary.
    """
    try:
        # AutoTokenizer lets the model_type of some families overrule a general class that is named,
        # and the other class brings a token and rules of its own.
        named = get_tokenizer_config(str(path_or_id), revision=revision).get("tokenizer_class")
        loader: Any = PreTrainedTokenizerFast if named in _GENERAL else AutoTokenizer
        tokenizer = loader.from_pretrained(
            str(path_or_id), revision=revision, trust_remote_code=False
        )
        Encoder(tokenizer)
    except InputError:
        raise
    except BaseException as error:  # whatever damaged files make of transformers and tokenizers
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # of Rust
            raise
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"{path_or_id}: no tokenizer could be loaded ({type(error).__name__}: {reason}). "
            "Wanted a folder with tokenizer.json and tokenizer_config.json, or a hub id. A class "
            "of its own (auto_map) is code, which is never run; a tokenizer.json of a newer "
            f"tokenizers than {tokenizers.__version__} needs that one."
        ) from error
    eos_id: Any = tokenizer.eos_token_id
    if tokenizer.convert_ids_to_tokens(eos_id) != tokenizer.eos_token:
        raise InputError(
            f"{path_or_id}: eos_token: wanted a token of the vocabulary, got "
            f"{tokenizer.eos_token!r:.80}. Correct it in tokenizer_config.json."
        )
    return tokenizer


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns a hash of what decides the ids of a text: vocabulary, merges, rules, BOS and EOS."""
    return Encoder(tokenizer).hash


class Encoder:
    """Encodes prompts and completions, whatever padding or truncation the tokenizer is set to.

    Args:
        tokenizer: a fast one, with an end-of-sequence token.
        end_ids: at which a model ends a generation, beside those that the tokenizer names.

    Attributes:
        prefix: ids that the tokenizer puts in front of a text, such as BOS; often none.
        eos_id: id appended to every completion.
        template: the chat template; None where the tokenizer has none.
        hash: see `tokenizer_hash`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, end_ids: Sequence[int] = ()) -> None:
        self._name = name = tokenizer.name_or_path or type(tokenizer).__name__
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise InputError(
                f"{name}: wanted a fast tokenizer (tokenizer.json), got {type(tokenizer).__name__}."
            )
        eos_id: Any = tokenizer.eos_token_id
        if eos_id is None:
            raise InputError(
                f"{name}: the tokenizer has no end-of-sequence token, in which every completion "
                "ends. Set eos_token in its tokenizer_config.json."
            )
        self.eos_id: int = eos_id
        self.eos_token: str = str(tokenizer.eos_token)
        self._named_ends = end_ids
        has_template = getattr(tokenizer, "chat_template", None)
        self.template = ChatTemplate(tokenizer, name) if has_template else None
        # A private copy: padding and truncation that others set on the tokenizer must not act here.
        self._backend: Any = tokenizers.Tokenizer.from_str(backend.to_str())
        self._backend.no_truncation()
        self._backend.no_padding()
        self.prefix = self._find_prefix(tokenizer)
        rules = json.loads(self._backend.to_str())
        text = json.dumps(rules, sort_keys=True)
        self.hash = hashlib.sha256(f"{text}{self.prefix}{self.eos_id}".encode()).hexdigest()[:16]
        # What encodes a text that follows another one: no blank of its own in front.
        bare = {name: _without_blank(part) for name, part in rules.items()}
        self._bare: Any = self._backend
        if bare != rules:
            self._bare = tokenizers.Tokenizer.from_str(json.dumps(bare))
        self._splits_at_words = _splits_at_words(rules, self._backend)
        self._anchor: list[int] = self._ids(self._bare, "a")
        if not self._anchor:
            raise InputError(
                f"{name}: the tokenizer makes no token of the text 'a', and would leave out what "
                "it does not know. Take one that knows every text, or has an unk_token."
            )
        self._anchor_text: str = self._decode(self._anchor)

    @cached_property
    def end_ids(self) -> list[int]:
        """Ids at any of which a completion ends: EOS, the turn end of the chat template, and those
        of the model.
        """
        found = [self.eos_id]
        if self.template is not None:
            with suppress(InputError):  # said where messages are encoded
                found.append(self.template.turn_end.id)
        return list(dict.fromkeys([*found, *self._named_ends]))

    @property
    def reads_by(self) -> tuple[Any, ...]:
        """All that decides which ids it makes of a row: tokenizer, template, ends."""
        return self.hash, self.template and self.template.hash, tuple(self.end_ids)

    @cached_property
    def of_turns(self) -> "Encoder":
        """What encodes what the chat template renders, which has its own BOS where it wants one; a
        completion ends in the turn end.

        Raises:
            InputError: there is no template, or it does not end a turn.
        """
        if self.template is None:
            raise InputError(
                f"{self._name}: the data have messages, but the tokenizer has no chat template to "
                "make a text of them. Fix: put the template that the model was trained with into "
                "chat_template.jinja in its folder, or give texts (fields with strings)."
            )
        end = self.template.turn_end
        turns = copy.copy(self)
        turns.prefix, turns.eos_id, turns.eos_token = [], end.id, end.token
        turns.end_ids = self.end_ids
        return turns

    def token_text(self, index: int) -> str:
        """Returns a token of the vocabulary as its tokenizer writes it."""
        return self._backend.id_to_token(index)

    def _find_prefix(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """What the tokenizer puts in front of a text; behind it there may be EOS, as ours."""
        ids: Any = tokenizer("a b")["input_ids"]
        inner = self._ids(self._backend, "a b")
        for start in range(len(ids) - len(inner) + 1):
            behind = start + len(inner)
            if ids[start:behind] == inner and ids[behind:] in ([], [self.eos_id]):
                return ids[:start]
        got, wanted = (tokenizer.convert_ids_to_tokens(tokens) for tokens in (ids, inner))
        raise InputError(
            f"{self._name}: for the text 'a b' the tokenizer gives {got}: wanted {wanted} with "
            f"tokens in front of it, or {self.eos_token!r} behind it, and no others. Correct the "
            "post_processor in its tokenizer.json."
        )

    def encode_prompt(self, prompt: str) -> list[int]:
        """Returns a prompt's ids behind the prefix, unless its text begins with that."""
        return self._with_prefix(self._ids(self._backend, prompt))

    def encode_completions(
        self, prompt: str, prompt_ids: list[int], completions: Sequence[str]
    ) -> list[tuple[list[int], str]]:
        """Encodes completions behind their prompt, whose ids are those of `encode_prompt`.

        As in TRL, the ids are those of both texts together, less those of the prompt. Where a token
        would reach over the border between the two, the completion is encoded by itself.

        Returns:
            for each: ids, EOS last; and what was unusual, "" if nothing was: `SEPARATE` or
            `NOT_EXACT`.
        """
        head, tail = self._border(prompt, prompt_ids)
        behind_head = self._batch_ids([tail + text for text in completions])
        return [
            self._completion(self._with_prefix(head + ids), prompt_ids, text)
            for ids, text in zip(behind_head, completions, strict=True)
        ]

    def _border(self, prompt: str, prompt_ids: list[int]) -> tuple[list[int], str]:
        """The ids of a prompt that no text behind it can change, and the text after those."""
        match = _WORD.search(prompt, max(0, len(prompt) - _MOST_TAIL), len(prompt) - _LEAST_TAIL)
        if self._splits_at_words and match:
            tail = prompt[match.start() :]
            ids = self._ids(self._backend, tail)
            size = len(prompt_ids) - len(ids)
            if size >= 0 and prompt_ids[size:] == ids:
                return prompt_ids[:size], tail
        return [], prompt

    def _completion(
        self, both: list[int], prompt_ids: list[int], completion: str
    ) -> tuple[list[int], str]:
        """A completion of `encode_completions`, of the ids of it and its prompt together."""
        size = len(prompt_ids)
        behind = both[size:] if both[:size] == prompt_ids else None
        if behind is not None and self.completion_text(behind) == completion:
            return [*behind, self.eos_id], ""
        alone = self._ids(self._bare, completion)
        if self.completion_text(alone) == completion:
            return [*alone, self.eos_id], SEPARATE
        return [*(alone if behind is None else behind), self.eos_id], NOT_EXACT

    def gives_back(self, prompt: str, ids: list[int]) -> bool:
        """Whether the ids of a prompt decode to its text."""
        return any(self._decode(some) == prompt for some in (ids[len(self.prefix) :], ids))

    def completion_text(self, ids: Sequence[int] | np.ndarray) -> str:
        """Returns the text that the ids of a completion, without its end token, add to a prompt."""
        # Alone, the blank in front of the first word could be lost.
        return self._decode([*self._anchor, *map(int, ids)])[len(self._anchor_text) :]

    def token_ends(self, prompt: str) -> list[int]:
        """Returns the end of each token of a prompt, in characters; those of a prefix end at 0."""
        encoding = self._backend.encode(prompt, add_special_tokens=False)
        ends = [end for _, end in encoding.offsets]
        return [0] * (len(self._with_prefix(encoding.ids)) - len(ends)) + ends

    def _ids(self, backend: Any, text: str) -> list[int]:
        try:
            return backend.encode(text, add_special_tokens=False).ids
        except Exception as error:  # the library raises nothing more particular
            raise InputError(
                f"{self._name}: the tokenizer cannot encode {text!r:.60} ({error}). Take one that "
                "knows every text, or has an unk_token."
            ) from error

    def _batch_ids(self, texts: list[str]) -> list[list[int]]:
        """Ids of several texts, on all cores."""
        try:
            encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        except Exception:  # which does not say of which text
            return [self._ids(self._backend, text) for text in texts]
        return [encoding.ids for encoding in encodings]

    def _with_prefix(self, ids: list[int]) -> list[int]:
        return ids if ids[: len(self.prefix)] == self.prefix else [*self.prefix, *ids]

    def _decode(self, ids: list[int]) -> str:
        return self._backend.decode(ids, skip_special_tokens=False)


def _splits_at_words(rules: dict[str, Any], backend: Any) -> bool:
    """Whether a word that follows a blank has the same ids whatever stands in front of both.

    So it is where text is split at blanks before anything else, by what looks forward only.
    """
    normalizer, splitter = rules["normalizer"], rules["pre_tokenizer"]
    if splitter is None or splitter != _without_blank(splitter):
        return False
    if (normalizer or {"type": "NFC"})["type"] != "NFC":
        return False
    parts = splitter.get("pretokenizers", [splitter])
    pieces = backend.pre_tokenizer.pre_tokenize_str("ab cd")
    return (
        all(part["type"] in _SPLITTERS for part in parts)
        and not any(_LOOKS_BACK.search(str(part.get("pattern"))) for part in parts)
        and any(end == 2 for _, (_, end) in pieces)
        and not any(re.search(r"\s", token["content"]) for token in rules["added_tokens"])
    )


def _without_blank(rules: Any) -> Any:
    """A part of tokenizer.json, less what puts a blank in front of a text."""
    if isinstance(rules, list):
        return [part for part in map(_without_blank, rules) if part is not None]
    if not isinstance(rules, dict) or rules.get("type") not in _MAY_PUT_BLANK:
        return rules
    if rules["type"] == "Prepend":
        return None
    changes = {"prepend_scheme": "never", "add_prefix_space": False}
    kept = {name: _without_blank(part) for name, part in rules.items()}
    return kept | {name: value for name, value in changes.items() if name in rules}
