"""Tokenizers that cannot be loaded, belong to another model, or bring code along."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from tests.bad_inputs.ground import Case, Ground, all_of, damage, edit_json, model, put

RULES, CONFIG = "tokenizer.json", "tokenizer_config.json"


def content(name: str, file: str, new: bytes, *words: str) -> Case:
    """A file of the tokenizer with other bytes; the folder is named, which holds it."""
    return Case(name, model(damage(file, lambda old: new)), ("HERE/model", *words))


def rules(name: str, change: Callable[[dict[str, Any]], object], *words: str) -> Case:
    """A change of tokenizer.json."""

    def edit(old: bytes) -> bytes:
        values = json.loads(old)
        change(values)
        return json.dumps(values).encode()

    return Case(name, model(damage(RULES, edit)), ("HERE/model", *words))


def config(name: str, *words: str, **changes: Any) -> Case:
    """Fields of tokenizer_config.json."""
    return Case(name, model(edit_json(CONFIG, **changes)), ("HERE/model", *words))


def gone(*names: str) -> Callable[[Path], object]:
    """A folder without these files."""
    return lambda folder: [(folder / name).unlink() for name in names]


def with_code(name: str, *words: str, **changes: Any) -> Case:
    """Code that came with a tokenizer ends the process; whoever is asked says yes."""
    code = "raise SystemExit(0)\n"
    act = model(all_of([edit_json(CONFIG, **changes), put(theirs__py=code)]))

    def says_yes(ground: Ground, here: Path) -> object:
        with mock.patch("builtins.input", lambda *_: "y"):
            return act(ground, here)

    return Case(name, says_yes, ("HERE/model", *words))


FILES = [
    content("a tokenizer_config.json that is a list", CONFIG, b"[]"),
    content("a tokenizer_config.json that is a text", CONFIG, b'"fast"'),
    content("a tokenizer_config.json that is null", CONFIG, b"null"),
    content("an empty tokenizer_config.json", CONFIG, b""),
    content("half a tokenizer_config.json", CONFIG, b'{"eos_token": "</s>"'),
    content("a tokenizer_config.json that is no UTF-8", CONFIG, b'{"a": "\xff"}'),
    content("a tokenizer.json that is a list", RULES, b"[]"),
    content("an empty tokenizer.json", RULES, b""),
    content("an empty object as tokenizer.json", RULES, b"{}"),
    content("a tokenizer.json of bytes", RULES, bytes(range(256))),
    content("a tokenizer.json nested deep", RULES, b"[" * 10_000),
    Case("half a tokenizer.json", model(damage(RULES, lambda old: old[: len(old) // 2])),
         ("HERE/model",)),
    Case("no tokenizer at all", model(gone(RULES, CONFIG)), ("HERE/model",)),
    Case("no tokenizer but a file of SentencePiece that is none",
         model(all_of([gone(RULES, CONFIG), put(tokenizer__model=b"\x00\x01\x02")])),
         ("HERE/model",)),
    Case("a tokenizer.json that is a folder",
         model(lambda folder: [(folder / RULES).unlink(), (folder / RULES).mkdir()]),
         ("HERE/model",)),
    Case("a list of added tokens that is an object", model(put(added_tokens__json="{")),
         ("HERE/model",)),
]  # fmt: skip
RULES_OF_OTHERS = [
    rules("a tokenizer.json of a newer version", lambda new: new.update(version="9.0")),
    rules("a model of a newer version", lambda new: new["model"].update(type="Newer")),
    rules("a model without words", lambda new: new["model"].update(vocab={}, merges=[])),
    rules("merges of words that are missing", lambda new: new["model"].update(merges=["no such"])),
    rules("an id for two words", lambda new: new["model"].update(vocab={"a": 0, "b": 0})),
    rules("an id below zero", lambda new: new["model"]["vocab"].update(zz=-1)),
    rules("an id of 400 digits", lambda new: new["model"]["vocab"].update(zz=10**400)),
    rules("an id too many", lambda new: new["model"]["vocab"].update(zz=5000), "vocab"),
    rules("a pre-tokenizer of a newer version",
          lambda new: new.update(pre_tokenizer={"type": "Newer"})),
    rules("a decoder of a newer version", lambda new: new.update(decoder={"type": "Newer"})),
    rules("a post-processor with a token that is missing",
          lambda new: new.update(post_processor={
              "type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "?", "type_id": 0}}],
              "pair": [], "special_tokens": {}})),
    rules("added tokens that are texts", lambda new: new.update(added_tokens=["</s>"])),
]  # fmt: skip
CONFIGS = [
    config("no end token", "eos_token", eos_token=None),
    config("an end token that is a number", "eos_token", eos_token=5),
    config("an end token that is new to the model", "vocab", eos_token="<the end>"),
    config("more added tokens than embeddings", "vocab",
           added_tokens_decoder={str(400 + i): {"content": f"<{i}>"} for i in range(50)}),
    with_code("a class of the folder's own", tokenizer_class="Theirs",
              auto_map={"AutoTokenizer": ["theirs.Theirs", "theirs.Theirs"]}),
    with_code("a fast class of the folder's own alone", tokenizer_class="Theirs",
              auto_map={"AutoTokenizer": [None, "theirs.Theirs"]}),
    with_code("a class of another repository", tokenizer_class="Theirs",
              auto_map={"AutoTokenizer": ["someone/else--theirs.Theirs", None]}),
]  # fmt: skip

CASES = [*FILES, *RULES_OF_OTHERS, *CONFIGS]
