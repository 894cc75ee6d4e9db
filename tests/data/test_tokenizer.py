"""Claims about what is put in front of and behind texts, for each kind of tokenizer."""

import json

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from copg_jax.data.tokenizer import (
    NOT_EXACT,
    SEPARATE,
    Encoder,
    load_tokenizer,
    tokenizer_hash,
)
from copg_jax.errors import InputError

PROMPT = "my bike TL;DR:"


def encode(encoder, prompt, completion):
    """Ids of a completion and what was unusual."""
    (found,) = encoder.encode_completions(prompt, encoder.encode_prompt(prompt), [completion])
    return found


@pytest.mark.parametrize(
    ("kind", "prefix", "eos"), [("plain", [], 0), ("with_bos", [1], 0), ("llama2_like", [1], 2)]
)
def test_prompts_have_one_bos_where_there_is_one_and_completions_end_in_eos(
    kind, prefix, eos, request
):
    encoder = Encoder(request.getfixturevalue(kind))
    assert (encoder.prefix, encoder.eos_id) == (prefix, eos)
    for text in (PROMPT, f"<s>{PROMPT}"):
        ids = encoder.encode_prompt(text)
        assert ids.count(1) == (1 if prefix or text != PROMPT else 0)
        assert len(encoder.token_ends(text)) == len(ids)
        assert encoder.token_ends(text)[-1] == len(text)
    completion, _ = encode(encoder, PROMPT, " broke")
    assert completion[-1] == eos and completion.count(eos) == 1 and 1 not in completion


@pytest.mark.parametrize("kind", ["plain", "with_bos", "llama2_like"])
def test_prompt_and_completion_ids_decode_to_the_text_with_one_blank_between(kind, request):
    tokenizer = request.getfixturevalue(kind)
    encoder = Encoder(tokenizer)
    ids = encoder.encode_prompt(PROMPT) + encode(encoder, PROMPT, " broke")[0]
    assert tokenizer.decode(ids, skip_special_tokens=True) == PROMPT + " broke"


def test_padding_and_truncation_set_on_the_tokenizer_do_not_act(with_bos):
    before, name = Encoder(with_bos).encode_prompt(PROMPT), tokenizer_hash(with_bos)
    with_bos.pad_token = "</s>"
    with_bos(PROMPT, truncation=True, max_length=3, padding="max_length")
    assert Encoder(with_bos).encode_prompt(PROMPT) == before
    assert tokenizer_hash(with_bos) == name


def test_the_hash_survives_saving_and_tells_tokenizers_apart(
    plain, with_bos, llama2_like, tmp_path
):
    hashes = set()
    for index, tokenizer in enumerate((plain, with_bos, llama2_like)):
        folder = tmp_path / str(index)
        tokenizer.save_pretrained(str(folder))
        loaded = load_tokenizer(folder)
        assert tokenizer_hash(loaded) == tokenizer_hash(tokenizer)
        loaded.save_pretrained(str(folder))
        assert tokenizer_hash(load_tokenizer(folder)) == tokenizer_hash(tokenizer)
        assert Encoder(loaded).encode_prompt(PROMPT) == Encoder(tokenizer).encode_prompt(PROMPT)
        hashes.add(tokenizer_hash(tokenizer))
    assert len(hashes) == 3


def test_a_tokenizer_without_eos_is_refused(plain, tmp_path):
    bare = PreTrainedTokenizerFast(tokenizer_object=plain.backend_tokenizer)
    bare.save_pretrained(str(tmp_path))
    with pytest.raises(InputError, match=r"no end-of-sequence token.*Set eos_token"):
        load_tokenizer(tmp_path)


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(InputError, match=rf"{tmp_path}: no tokenizer could be loaded.*json"):
        load_tokenizer(tmp_path)


EXACT = ["plain", "with_bos", "metaspace", "prepending"]
PAIRS = [  # prompt and completion
    ("def f(x):\n", "    return x + 1\n"),
    ("def f(x):", "\n\treturn x\n"),
    ("Question: 2+2?\nAnswer: ", "four"),
    ("The capital is Par", "is."),
    ("Summarise: a b c", "TL;DR: abc "),
    ("my bike TL;DR:", " broke"),
    ("tab\t", "\ttab"),
    ("line\u2028", "\u2028\u2029\x85end"),
    ("NUL\x00", "\x00é😀\r\n"),
]


@pytest.mark.parametrize("kind", EXACT)
@pytest.mark.parametrize(("prompt", "completion"), PAIRS)
def test_ids_of_both_are_trl_s_or_each_text_s_own_and_decode_to_what_was_given(
    kind, prompt, completion, request
):
    tokenizer = request.getfixturevalue(kind)
    encoder = Encoder(tokenizer)
    prompt_ids = encoder.encode_prompt(prompt)
    assert prompt_ids == tokenizer(prompt)["input_ids"]
    ids, note = encode(encoder, prompt, completion)
    both = tokenizer(prompt + completion)["input_ids"]  # which TRL cuts at the prompt's length
    if both[: len(prompt_ids)] == prompt_ids:
        assert (prompt_ids + ids, note) == ([*both, encoder.eos_id], "")
    else:
        assert note == SEPARATE
    bos = len(encoder.prefix)
    whole = tokenizer.decode((prompt_ids + ids)[bos:-1], clean_up_tokenization_spaces=False)
    assert whole == prompt + completion
    assert encoder.completion_text(ids[:-1]) == completion and encoder.gives_back(
        prompt, prompt_ids
    )


def test_some_of_these_borders_are_crossed_by_a_token_and_others_are_not(with_bos, metaspace):
    notes = {
        (kind, encode(Encoder(tokenizer), *pair)[1])
        for kind, tokenizer in (("bytes", with_bos), ("sentences", metaspace))
        for pair in PAIRS
    }
    assert notes == {(kind, note) for kind in ("bytes", "sentences") for note in ("", SEPARATE)}


ANY = st.text(min_size=1, max_size=12) | st.text(" \t\n\r\u2028ab", min_size=1, max_size=8)


@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(prompt=ANY, completion=ANY, kind=st.sampled_from(EXACT))
def test_any_text_is_given_back_character_by_character(prompt, completion, kind, request):
    assume(not prompt.startswith("<s>"))  # which spells BOS: it is there once
    encoder = Encoder(request.getfixturevalue(kind))
    ids, note = encode(encoder, prompt, completion)
    if "▁" in completion and kind in ("metaspace", "prepending"):
        assert note == NOT_EXACT
        return
    assert encoder.completion_text(ids[:-1]) == completion and note != NOT_EXACT
    prompt_ids = encoder.encode_prompt(prompt)
    if encoder.gives_back(prompt, prompt_ids):
        whole = encoder._decode([*prompt_ids, *ids[:-1]][len(encoder.prefix) :])
        assert whole == prompt + completion


LONG = st.lists(ANY | st.sampled_from([" bike", " my", " 12", "</s>", "\n"]), max_size=90)


@pytest.mark.parametrize("kind", ["plain", "llama_3", "words", "metaspace"])
@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(prompt=LONG.map("".join), completions=st.lists(ANY, min_size=1, max_size=3))
def test_a_long_prompt_s_completions_get_the_ids_of_both_texts_together(
    kind, prompt, completions, request
):
    encoder = Encoder(request.getfixturevalue(kind))
    prompt_ids = encoder.encode_prompt(prompt)
    plainly = [
        encoder._completion(encoder.encode_prompt(prompt + text), prompt_ids, text)
        for text in completions
    ]
    assert encoder.encode_completions(prompt, prompt_ids, completions) == plainly


@pytest.mark.parametrize(
    ("kind", "is_short"),
    [("plain", True), ("llama_3", True), ("words", True), ("metaspace", False)],
)
def test_only_the_last_words_of_a_prompt_are_encoded_again_where_words_are_apart(
    kind, is_short, request, monkeypatch
):
    encoder, prompt = Encoder(request.getfixturevalue(kind)), "my bike broke " * 99
    prompt_ids, lengths = encoder.encode_prompt(prompt), []
    own = encoder._batch_ids
    monkeypatch.setattr(
        encoder, "_batch_ids", lambda texts: lengths.extend(map(len, texts)) or own(texts)
    )
    encoder.encode_completions(prompt, prompt_ids, ["a", "b"])
    assert [length < 300 for length in lengths] == [is_short] * 2


BLANKS_BEHIND = {"type": "Split", "pattern": {"Regex": r"(?<= )\S"}, "behavior": "Isolated"}
UNSPLIT = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}


@pytest.mark.parametrize(
    "changes",
    [
        {"pre_tokenizer": {**UNSPLIT, "trim_offsets": True}},
        {"pre_tokenizer": {**BLANKS_BEHIND, "invert": False}},
        {"normalizer": {"type": "Strip", "strip_left": True, "strip_right": False}},
    ],
)
def test_a_tokenizer_whose_words_depend_on_the_text_before_encodes_the_whole(plain, changes):
    rules = json.loads(plain.backend_tokenizer.to_str()) | changes
    tokenizer = Tokenizer.from_str(json.dumps(rules))
    encoder = Encoder(PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>"))
    prompt = "my bike broke " * 99
    assert encoder._border(prompt, encoder.encode_prompt(prompt)) == ([], prompt)


def test_text_that_a_tokenizer_changes_is_noted(llama2_like, metaspace):
    assert encode(Encoder(llama2_like), "a", " Zürich")[1] == NOT_EXACT
    encoder = Encoder(metaspace)
    assert not encoder.gives_back(" a", encoder.encode_prompt(" a"))  # its own blank is that blank
    assert encoder.gives_back("a", encoder.encode_prompt("a"))


def test_a_completion_has_one_text_whether_it_was_given_or_generated(metaspace, prepending):
    for tokenizer in (metaspace, prepending):
        encoder = Encoder(tokenizer)
        for text in (" broke", "broke", "  broke", "\tbroke"):
            ids, _ = encode(encoder, "my bike:", text)
            assert encoder.completion_text(ids[:-1]) == text
        # The tokenizer's own decoding of these ids alone has lost the blank.
        ids, _ = encode(encoder, "my bike:", " broke")
        assert tokenizer.decode(ids[:-1], clean_up_tokenization_spaces=False) == "broke"


def with_template(tokenizer, template, **names):
    """A copy that puts other tokens around texts, and declares `names` in its config."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    ids = [(token, backend.token_to_id(token)) for token in ("<s>", "</s>", "a")]
    backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", **names)


@pytest.mark.parametrize(
    ("template", "names", "prefix"),
    [
        ("<s> $A", {}, ["<s>"]),  # a BOS that the config does not declare
        ("<s> $A", {"bos_token": "</s>"}, ["<s>"]),  # or declares otherwise
        ("$A", {"bos_token": "<s>"}, []),  # or that is declared and not put
        ("a <s> $A", {"bos_token": "<s>"}, ["a", "<s>"]),
        ("<s> <s> $A", {}, ["<s>", "<s>"]),
        ("<s> $A </s>", {}, ["<s>"]),
        ("$A </s>", {}, []),
        ("</s> $A", {}, ["</s>"]),
    ],
)
def test_what_the_tokenizer_puts_in_front_of_a_text_is_in_front_of_prompts(
    plain, template, names, prefix
):
    encoder, inner = Encoder(with_template(plain, template, **names)), Encoder(plain)
    ids = plain.convert_tokens_to_ids(prefix)
    assert encoder.prefix == ids
    assert encoder.encode_prompt(PROMPT) == [*ids, *inner.encode_prompt(PROMPT)]
    assert encoder.encode_prompt("".join(prefix) + PROMPT) == encoder.encode_prompt(PROMPT)
    assert encoder.token_ends(PROMPT) == [0] * len(ids) + inner.token_ends(PROMPT)
    completion = encode(encoder, PROMPT, " broke")
    assert completion == encode(inner, PROMPT, " broke")
    assert completion[0].count(encoder.eos_id) == 1


@pytest.mark.parametrize("template", ["$A <s>", "<s> $A a", "<s> $A </s> </s>", "$A <s> $A"])
def test_what_a_tokenizer_puts_elsewhere_is_refused_with_what_it_gave(plain, template, tmp_path):
    with_template(plain, template).save_pretrained(str(tmp_path))
    with pytest.raises(InputError, match=r"for the text 'a b' the tokenizer gives \[.*post_proc"):
        load_tokenizer(tmp_path)


def test_a_special_token_in_a_generated_text_is_seen(with_bos):
    ids = [with_bos.convert_tokens_to_ids("<s>"), *with_bos("a")["input_ids"][1:]]
    assert Encoder(with_bos).completion_text(ids) == "<s>a"


def test_a_text_that_a_tokenizer_cannot_encode_is_named():
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "</s>": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    encoder = Encoder(PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>"))
    assert encoder.encode_prompt("a b") == [0, 1]
    with pytest.raises(InputError, match=r"cannot encode 'a c'.*unk_token"):
        encoder.encode_prompt("a c")
