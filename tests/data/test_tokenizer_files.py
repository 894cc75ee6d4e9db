"""Damaged and odd tokenizer files: named errors; code that comes along is never run."""

import json
from pathlib import Path
from typing import Any

import pytest

from copg_jax.data.tokenizer import load_tokenizer
from copg_jax.errors import InputError
from tests.models import tiny

SETTINGS, VOCABULARY = "tokenizer_config.json", "tokenizer.json"
UNKNOWN = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "?", "type_id": 0}}],
           "pair": [], "special_tokens": {}}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny.tokenizer().save_pretrained(tmp_path)
    return tmp_path


def change(folder: Path, name: str, **fields: Any) -> None:
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def refusal(folder: Path) -> str:
    with pytest.raises(InputError) as caught:
        load_tokenizer(folder)
    assert str(caught.value).startswith(str(folder))
    return str(caught.value)


@pytest.mark.parametrize(
    "content",
    ["", "null", "3", "[1]", '"x"', "{", "[" * 100_000, b"\xff\xfe{", '{"version": "1.0"'],
)
@pytest.mark.parametrize("name", [SETTINGS, VOCABULARY])
def test_a_file_that_is_no_object_of_json_is_refused(folder, name, content):
    content = content if isinstance(content, bytes) else content.encode()
    (folder / name).write_bytes(content)
    assert "no tokenizer could be loaded" in refusal(folder)


@pytest.mark.parametrize(
    "fields",
    [
        {"version": "9.0"},
        {"model": {"type": "OfTheFuture"}},
        {"model": {"type": "WordLevel", "vocab": {"a": -1}, "unk_token": "a"}},
        {"pre_tokenizer": {"type": "OfTheFuture"}},
        {"decoder": 3},
        {"normalizer": [{}]},
        {"truncation": {"a": 1}},
        {"added_tokens": [{"id": 10**12, "content": "x"}]},
        {"post_processor": UNKNOWN},  # which tokenizers answers with a panic
    ],
    ids=str,
)
def test_a_vocabulary_that_this_version_cannot_read_is_refused(folder, fields):
    change(folder, VOCABULARY, **fields)
    assert "newer tokenizers than" in refusal(folder)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("eos_token", 3),
        ("eos_token", "\ud800"),
        ("eos_token", ""),
        ("eos_token", None),
        ("eos_token", {"__type": "AddedToken"}),
        ("added_tokens_decoder", [3]),
        ("added_tokens_decoder", {"x": {"content": "y"}}),
        ("model_max_length", "long"),
        ("tokenizer_class", 3),
        ("tokenizer_class", [{}]),
        ("padding_side", "top"),
        ("extra_special_tokens", -1),
        ("chat_template", [{}]),
    ],
)
def test_an_odd_setting_is_refused(folder, field, value):
    change(folder, SETTINGS, **{field: value})
    assert refusal(folder)


@pytest.mark.parametrize("present", [[], [SETTINGS], [VOCABULARY]])
def test_a_file_that_is_missing_is_an_input_error(folder, present):
    for name in {SETTINGS, VOCABULARY} - set(present):
        (folder / name).unlink()
    assert refusal(folder)


# --- code ---


@pytest.fixture
def mark(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that the code which comes with the tokenizer would write; whoever asks gets a yes."""
    path = folder / "was_run"
    (folder / "own.py").write_text(
        f"open({str(path)!r}, 'w').close()\n"
        "from transformers import PreTrainedTokenizerFast\n"
        "class Own(PreTrainedTokenizerFast): pass\n"
        "class Config: pass\n"
    )
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    monkeypatch.setenv("HF_HOME", str(folder / "cache"))
    return path


@pytest.mark.parametrize("classes", [[None, "own.Own"], ["own.Own", "own.Own"], "own.Own"])
@pytest.mark.parametrize("extra", [{}, {"trust_remote_code": True}])
def test_a_class_that_comes_with_a_tokenizer_is_never_run(folder, mark, classes, extra):
    own = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": classes}}
    change(folder, SETTINGS, **own, **extra)
    assert "(auto_map) is code, which is never run" in refusal(folder)
    assert not mark.exists()


def test_a_class_that_config_json_names_is_never_run(folder, mark):
    own = {
        "model_type": "own",
        "auto_map": {"AutoConfig": "own.Config", "AutoTokenizer": "own.Own"},
    }
    (folder / "config.json").write_text(json.dumps(own))
    settings = json.loads((folder / SETTINGS).read_text())
    del settings["tokenizer_class"]
    (folder / SETTINGS).write_text(json.dumps(settings))
    try:
        load_tokenizer(folder)
    except InputError as error:
        assert str(folder) in str(error)
    assert not mark.exists()


def test_a_known_class_beside_one_that_comes_along_is_taken(folder, mark):
    change(folder, SETTINGS, auto_map={"AutoTokenizer": [None, "own.Own"]})
    assert load_tokenizer(folder).eos_token == "<eos>"
    assert not mark.exists()


def test_a_chat_template_is_not_rendered_where_a_tokenizer_is_loaded_and_used(folder, mark):
    template = "{{ cycler.__init__.__globals__.os.system('touch MARK') }}".replace(
        "MARK", str(mark)
    )
    change(folder, SETTINGS, chat_template=template)
    tokenizer = load_tokenizer(folder)
    assert tokenizer.decode(tokenizer("w1 w2")["input_ids"]) == "w1 w2"
    assert not mark.exists()
