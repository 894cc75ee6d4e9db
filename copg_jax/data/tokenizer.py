"""The tokenizer and the rules by which prompts and completions become token ids.

1. `load_tokenizer` reads a Hugging Face tokenizer from a local folder or the hub.
2. `Encoder` encodes prompt and completion separately: exactly one BOS in front of the prompt where
   the tokenizer puts one, EOS behind the completion by id.
3. `tokenizer_hash` names the tokenizer in caches and side-cars.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from copg_jax.errors import InputError


def load_tokenizer(path_or_id: str | Path, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a model folder or hub id; code that comes with it is never run.

    Raises:
        InputError: cannot be loaded, has no fast (`tokenizers`) form, or no end-of-sequence token
            in its vocabulary.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(
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
        bos_id: id put in front of every prompt, None where the tokenizer puts none.
        eos_id: id appended to every completion.
        hash: see `tokenizer_hash`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        name = tokenizer.name_or_path or type(tokenizer).__name__
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise InputError(
                f"{name}: wanted a fast tokenizer (tokenizer.json), got {type(tokenizer).__name__}."
            )
        eos_id: Any = tokenizer.eos_token_id
        bos_id: Any = tokenizer.bos_token_id
        if eos_id is None:
            raise InputError(
                f"{name}: the tokenizer has no end-of-sequence token, in which every completion "
                "ends. Set eos_token in its tokenizer_config.json."
            )
        self.eos_id: int = eos_id
        self.eos_token: str = str(tokenizer.eos_token)
        # The tokenizer's own encoding of a letter shows its rules, whichever option they come from.
        probe: Any = tokenizer("a")["input_ids"]
        self.bos_id: int | None = bos_id if probe[0] == bos_id else None
        # A private copy: padding and truncation that others set on the tokenizer must not act here.
        self._backend: Any = tokenizers.Tokenizer.from_str(backend.to_str())
        self._backend.no_truncation()
        self._backend.no_padding()
        # SentencePiece tokenizers put a blank before any text; then ours would be a second one.
        self._adds_blank = self._backend.encode("a", add_special_tokens=False).tokens[0][0] in "▁Ġ"
        rules = json.dumps(json.loads(self._backend.to_str()), sort_keys=True)
        self.hash = hashlib.sha256(f"{rules}{self.bos_id}{self.eos_id}".encode()).hexdigest()[:16]

    def encode_prompt(self, prompt: str) -> list[int]:
        """Returns a prompt's ids, BOS first where the tokenizer has one and the text does not."""
        ids = self._backend.encode(prompt, add_special_tokens=False).ids
        return ids if self.bos_id is None or ids[:1] == [self.bos_id] else [self.bos_id, *ids]

    def encode_completion(self, completion: str) -> list[int]:
        """Returns the ids of a completion that begins with a blank, EOS last."""
        text = completion.removeprefix(" ") if self._adds_blank else completion
        return [*self._backend.encode(text, add_special_tokens=False).ids, self.eos_id]

    def token_ends(self, prompt: str) -> list[int]:
        """Returns the end of each token of a prompt, in characters; an added BOS ends at 0."""
        encoding = self._backend.encode(prompt, add_special_tokens=False)
        ends = [end for _, end in encoding.offsets]
        return ends if self.bos_id is None or encoding.ids[:1] == [self.bos_id] else [0, *ends]
