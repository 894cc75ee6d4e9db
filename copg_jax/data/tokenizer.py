"""The tokenizer and the rules by which prompts and completions become token ids, and text again.

1. `load_tokenizer` reads a Hugging Face tokenizer from a local folder or the hub.
2. `Encoder` puts in front of a prompt what the tokenizer itself puts in front of a text, splits
   prompt and completion as TRL does, and ends a completion in EOS, by id.
3. `Encoder.completion_text` is the text of a completion's ids, for whoever wants one.
4. `tokenizer_hash` names the tokenizer in caches and side-cars.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from copg_jax.errors import InputError

SEPARATE = "completion encoded by itself: a token would reach over from its prompt"
NOT_EXACT = "text that the tokenizer does not give back exactly"
_GENERAL = ("TokenizersBackend", "PreTrainedTokenizerFast")  # classes that are what the files say
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

    Attributes:
        prefix: ids that the tokenizer puts in front of a text, such as BOS; often none.
        eos_id: id appended to every completion.
        hash: see `tokenizer_hash`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
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
        self._anchor: list[int] = self._ids(self._bare, "a")
        self._anchor_text: str = self._decode(self._anchor)

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

    def encode_completion(
        self, prompt: str, prompt_ids: list[int], completion: str
    ) -> tuple[list[int], str]:
        """Encodes a completion behind its prompt, whose ids are those of `encode_prompt`.

        As in TRL, the ids are those of both texts together, less those of the prompt. Where a token
        would reach over the border between the two, the completion is encoded by itself.

        Returns:
            ids, EOS last; and what was unusual, "" if nothing was: `SEPARATE` or `NOT_EXACT`.
        """
        both = self.encode_prompt(prompt + completion)
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

    def _with_prefix(self, ids: list[int]) -> list[int]:
        return ids if ids[: len(self.prefix)] == self.prefix else [*self.prefix, *ids]

    def _decode(self, ids: list[int]) -> str:
        return self._backend.decode(ids, skip_special_tokens=False)


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
