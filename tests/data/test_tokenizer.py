"""Claims about BOS, EOS and the leading blank, for each kind of tokenizer."""

import pytest
from transformers import PreTrainedTokenizerFast

from copg_jax.data.tokenizer import Encoder, load_tokenizer, tokenizer_hash
from copg_jax.errors import InputError

PROMPT = "my bike TL;DR:"


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
    completion, _ = encoder.encode_completion(PROMPT, " broke")
    assert completion[-1] == eos and completion.count(eos) == 1 and 1 not in completion


@pytest.mark.parametrize("kind", ["plain", "with_bos", "llama2_like"])
def test_prompt_and_completion_ids_decode_to_the_text_with_one_blank_between(kind, request):
    tokenizer = request.getfixturevalue(kind)
    encoder = Encoder(tokenizer)
    ids = encoder.encode_prompt(PROMPT) + encoder.encode_completion(PROMPT, " broke")[0]
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
