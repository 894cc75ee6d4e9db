"""Claims about tokenising one group and padding groups into a batch."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from tokenizers import Tokenizer, normalizers
from transformers import PreTrainedTokenizerFast

from copg_jax.config.sections import Limits
from copg_jax.data.formats.texts import TextGroup
from copg_jax.data.formats.tldr import Post, format_prompt
from copg_jax.data.groups import NO_TOKENS, TOO_FEW, TokenGroup, collate, tokenize_group
from copg_jax.data.rows import InvalidRow
from copg_jax.data.tokenizer import Encoder
from copg_jax.errors import InputError
from copg_jax.models.layout import Capacity, Layout, Shape


def text_group(completions=(" a", " b"), **changes):
    """A small group; `changes` replace its fields."""
    fields = {"id": "i", "where": "f.jsonl:4", "prompt": "my bike", "completions": completions}
    return TextGroup(**(fields | changes))


def test_completions_without_reward_or_over_the_limit_are_left_out_and_counted(plain):
    counts: Counter[str] = Counter()
    group = text_group(
        (" a", " b b b b b b b b", " c", " d", " e"),
        rewards=(1.0, 2.0, None, 4.0, 5.0),
    )
    tokens = tokenize_group(group, Encoder(plain), Limits(20, 6), counts)
    assert tokens.completions == (" a", " d", " e")
    assert tokens.rewards.tolist() == [1.0, 4.0, 5.0]
    assert +counts == {
        "completion over 6 tokens": 1,
        "completion without a reward": 1,
    }


def test_a_pair_with_one_completion_left_is_dropped_but_a_single_one_is_kept(plain):
    encoder = Encoder(plain)
    pair = text_group(rewards=(1.0, None))
    assert tokenize_group(pair, encoder, Limits(), Counter()) == TOO_FEW
    single = tokenize_group(text_group((" a",)), encoder, Limits(), Counter())
    assert single.completions == (" a",)
    too_long = text_group((" a" * 50,))
    assert tokenize_group(too_long, encoder, Limits(20, 5), Counter()) == TOO_FEW


def test_a_cut_prompt_has_the_text_that_its_tokens_encode(with_bos):
    encoder, counts = Encoder(with_bos), Counter()
    prompt = format_prompt(Post("x", "t", "my bike broke\n" * 9))
    group = text_group(prompt=prompt, format="tldr")
    tokens = tokenize_group(group, encoder, Limits(60, 9), counts)
    assert tokens.prompt != prompt and len(tokens.prompt_tokens) <= 60
    assert tokens.prompt_tokens.tolist() == encoder.encode_prompt(tokens.prompt)
    assert counts["prompt cut"] == 1


def test_prompts_that_cannot_be_cut_name_place_limit_and_fix(plain):
    encoder, limits = Encoder(plain), Limits(10, 9)
    text = r"f.jsonl:4: the prompt has \d+ tokens, over the limit of 10, and it has no post"
    with pytest.raises(InvalidRow, match=text + r".*data.max_prompt_tokens") as error:
        tokenize_group(text_group(prompt="bike " * 30), encoder, limits, Counter())
    assert error.value.reason == "prompt over 10 tokens"
    prompt = format_prompt(Post("x", "long title " * 9, "post"))
    with pytest.raises(InvalidRow, match="even with the post cut away"):
        tokenize_group(text_group(prompt=prompt, format="tldr"), encoder, limits, Counter())
    with pytest.raises(InvalidRow, match="and it has no post that could be cut"):
        tokenize_group(text_group(prompt=prompt), encoder, limits, Counter())


def test_eos_inside_a_completion_is_refused(plain):
    with pytest.raises(InvalidRow, match=r"completion 1 contains the end token '</s>'"):
        tokenize_group(text_group((" a", " b</s>")), Encoder(plain), Limits(), Counter())


@pytest.mark.parametrize("text", ["\u200b", "\u200b\u200c "])
def test_a_completion_whose_text_has_no_tokens_is_refused(words, text):
    tokenizer = Tokenizer.from_str(words.backend_tokenizer.to_str())
    tokenizer.normalizer = normalizers.BertNormalizer()
    encoder = Encoder(PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>"))
    with pytest.raises(InvalidRow, match=r"f.jsonl:4: completion 1, .* has no tokens") as error:
        tokenize_group(text_group(("a", text)), encoder, Limits(), Counter())
    assert error.value.reason == NO_TOKENS
    empty = tokenize_group(text_group(("a", "")), encoder, Limits(), Counter())
    assert empty.completion_tokens[1].tolist() == [encoder.eos_id]  # as a model may write it


def test_collate_pads_on_the_right_and_fills_up_with_absent_groups(with_bos):
    encoder = Encoder(with_bos)
    groups = [
        tokenize_group(text_group(rewards=(1.0, -1.0)), encoder, Limits(), Counter()),
        tokenize_group(text_group((" a b",)), encoder, Limits(), Counter()),
    ]
    numbers = {"ref_logps": np.array([-3.0, -4.0], np.float32), "origin": np.array([1, 2], np.int8)}
    numbers["mu_logps"] = np.array([-5.0, -6.0], np.float32)
    groups[0] = replace(groups[0], **numbers)
    batch = collate([*groups, None], prompt_size=16, num_completions=3, completion_size=8)
    *fields, layout = batch
    assert [np.asarray(x).shape for x in fields] == [
        (3, 16),
        (3,),
        (3, 3, 8),
        (3, 3),
        (3, 3),
        (3, 3),
        (3, 3),
        (3, 3),
    ]
    assert layout is None
    assert [x.dtype for x in fields] == [np.int32] * 4 + [np.float32] * 2 + [np.int8, np.float32]
    np.testing.assert_array_equal(batch.mu_logp[0], [-5.0, -6.0, np.nan])
    assert np.isnan(batch.mu_logp[1:]).all()
    assert batch.origin[0].tolist() == [1, 2, 0] and not batch.origin[1:].any()
    for row, group in enumerate(groups):
        length = batch.prompt_length[row]
        assert batch.prompt_tokens[row, :length].tolist() == group.prompt_tokens.tolist()
        assert not batch.prompt_tokens[row, length:].any()
        for slot, ids in enumerate(group.completion_tokens):
            assert batch.completion_tokens[row, slot, : len(ids)].tolist() == ids.tolist()
            assert batch.completion_length[row, slot] == len(ids)
            assert not batch.completion_tokens[row, slot, len(ids) :].any()
    assert batch.prompt_length[2] == 1 and not batch.completion_length[2].any()
    assert batch.completion_length[1].tolist()[1:] == [0, 0]
    assert batch.reward[0].tolist() == [1.0, -1.0, 0.0] and batch.ref_logp[0, 1] == -4.0
    with pytest.raises(InputError, match=r"f.jsonl:4: .* over the batch's \(16, 1, 8\)"):
        collate([*groups, None], prompt_size=16, num_completions=1, completion_size=8)


def test_a_shape_collates_the_same_batch_with_the_layout_of_its_bins():
    lengths = [5, 3, 2, 6, 1, 2]  # two bins of three places
    groups = [
        TokenGroup("i", f"f:{n}", "", np.full(n, n, np.int32), ("",), (np.array([7, 7, 1]),))
        for n in lengths
    ]
    shape = Shape(
        num_bins=2,
        prompt_sizes=(6, 3, 3),
        prompt_size=6,
        num_completions=1,
        completion_size=4,
        capacity=Capacity(20, 10),
    )
    batch = shape.collate(groups)
    assert shape.batch_size == 6
    plain = collate(groups, prompt_size=6, num_completions=1, completion_size=4)
    for got, wanted in zip(batch[:6], plain[:6], strict=True):
        np.testing.assert_array_equal(got, wanted)
    assert batch.prompt_length.tolist() == lengths
    assert isinstance(batch.layout, Layout) and batch.layout.prompt_sizes == (6, 3, 3)
    # Slots of a bin: 6 + 3 + 3 of prompts, then 3 times 4 of completions.
    own = [12, 13, 14, 16, 17, 18, 20, 21, 22]
    assert batch.layout.token_slots.tolist() == [
        [0, 1, 2, 3, 4, 6, 7, 8, 9, 10, *own, 24],
        [0, 1, 2, 3, 4, 5, 6, 9, 10, *own, 24, 24],
    ]
    completions = [0, 1, 2, 4, 5, 6, 8, 9, 10, 12]
    assert batch.layout.completion_slots.tolist() == [completions] * 2
    # A host's share of the bins has their layout alone.
    share = shape.collate(groups[3:])
    assert share.layout.token_slots.tolist() == batch.layout.token_slots[1:].tolist()
    with pytest.raises(InputError, match=r"f:6: .* are \(6, 1, 3\), over the batch's \(5, 1, 4\)"):
        shape._replace(prompt_size=5).collate(groups)
    with pytest.raises(InputError, match="bin has 19 tokens but a capacity of 18"):
        shape._replace(capacity=Capacity(18, 10)).collate(groups)
