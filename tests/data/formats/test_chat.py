"""Messages become the ids that `apply_chat_template` gives; what a template cannot do is named."""

from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from copg_jax.config.sections import Limits
from copg_jax.data.formats.chat import Chat
from copg_jax.data.formats.choice import text_format_hash
from copg_jax.data.formats.texts import TextGroup
from copg_jax.data.groups import EOS_INSIDE, TokenGroup, tokenize_group
from copg_jax.data.rows import InvalidRow
from copg_jax.data.tokenizer import NOT_EXACT, SEPARATE, Encoder
from copg_jax.errors import InputError
from tests.data.chat_templates import CHATML, ENDLESS, KINDS, THINKING, Kind, chat_tokenizer
from tests.toys import names_all

TOKENIZERS = {name: chat_tokenizer(kind) for name, kind in KINDS.items()}
SAYS = {"role": "assistant", "content": "Take it to the park."}


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


PROMPTS = {
    "one question": [user("Who broke my bike?")],
    "a system turn": [{"role": "system", "content": "Be kind.\n"}, user(" What now? ")],
    "a dialogue": [user("a b"), SAYS, user("día \u2028 😀\n")],
    "thoughts before": [
        user("a"),
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nb"},
        user("c"),
    ],
}
ANSWERS = [
    "My brother did.",
    "  def f(x):\n\treturn x\n",
    "día \u2028 😀",
    "<think>\nhm, who?\n</think>\n\nMy brother.",
]


def group_of(prompt: list[dict[str, Any]], *answers: str, **more: Any) -> TextGroup:
    """A group of messages, as a row gives it."""
    texts = tuple([{"role": "assistant", "content": answer, **more}] for answer in answers)
    return Chat().render(TextGroup("i", "f.jsonl:4", prompt, texts))


def tokenized(tokenizer: Any, group: TextGroup, *end_ids: int) -> tuple[TokenGroup, Counter[str]]:
    """Its tokens, and what was counted."""
    counts: Counter[str] = Counter()
    tokens = tokenize_group(group, Encoder(tokenizer, end_ids), Limits(), counts)
    assert isinstance(tokens, TokenGroup)
    return tokens, counts


def ids_of(tokenizer: Any, messages: Any, **options: Any) -> list[int]:
    """What transformers makes of messages."""
    return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **options)


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("name", KINDS)
def test_token_ids_equal_those_of_transformers(name, prompt):
    kind, tokenizer, prompt = KINDS[name], TOKENIZERS[name], PROMPTS[prompt]
    group, counts = tokenized(tokenizer, group_of(prompt, *ANSWERS))
    prompt_ids = ids_of(tokenizer, prompt, add_generation_prompt=True)
    assert group.prompt_tokens.tolist() == prompt_ids
    end = tokenizer.convert_tokens_to_ids(kind.end)
    for answer, ids in zip(group.completions, group.completion_tokens, strict=True):
        whole = ids_of(tokenizer, [*prompt, *answer])
        both = [*prompt_ids, *ids.tolist()]
        assert whole[: len(both)] == both  # so that no generation prompt is inside a completion
        assert ids[-1] == end and end not in ids[:-1]
        assert tokenizer.decode(whole[len(both) :]) in ("", "\n", f"\n{kind.eos}")
        rendered = tokenizer.apply_chat_template([*prompt, *answer], tokenize=False)
        if kind.bos and kind.bos != "<|im_start|>":
            bos = tokenizer.convert_tokens_to_ids(kind.bos)
            assert both[0] == bos and both.count(bos) == rendered.count(kind.bos)
    assert not counts[SEPARATE] and not counts[NOT_EXACT]


def test_messages_stay_those_of_the_row():
    prompt = [user("  a "), SAYS, user(" b")]
    group, _ = tokenized(TOKENIZERS["Llama-3"], group_of(prompt, " c ", "d", weight=1.0))
    assert group.prompt == prompt
    assert group.completions[0] == [{"role": "assistant", "content": " c ", "weight": 1.0}]
    assert group.format == "chat"


def test_fields_of_a_message_that_a_template_reads_are_read():
    tokenizer = TOKENIZERS["Qwen3"]
    group, _ = tokenized(tokenizer, group_of([user("a")], "b", "c", reasoning_content="hm"))
    text = Encoder(tokenizer).completion_text(group.completion_tokens[0])
    assert text == "<think>\nhm\n</think>\n\nb<|im_end|>"


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    answer=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(
        lambda text: text.strip() and "\0" not in text
    ),
    lead=st.sampled_from(["", " ", "\n", "\n\n", "\t", "    "]),
)
def test_any_answer_of_chatml_is_learnt_as_it_is(answer, lead):
    tokenizer, answer = TOKENIZERS["ChatML"], lead + answer
    group, counts = tokenized(tokenizer, group_of([user("a")], answer))
    ids = group.completion_tokens[0]
    assert Encoder(tokenizer).completion_text(ids[:-1]) == answer
    both = [*group.prompt_tokens.tolist(), *ids.tolist()]
    if not counts[SEPARATE]:  # else a token reaches over from "assistant\n"
        assert ids_of(tokenizer, [user("a"), *group.completions[0]])[: len(both)] == both
    else:
        assert lead or answer[0].isspace()


@pytest.mark.parametrize("name", KINDS)
def test_end_ids_are_those_of_the_tokenizer_the_template_and_the_model(name):
    kind, tokenizer = KINDS[name], TOKENIZERS[name]
    eos, end = tokenizer.convert_tokens_to_ids([kind.eos, kind.end])
    encoder = Encoder(tokenizer, [7, eos])
    assert encoder.end_ids == list(dict.fromkeys([eos, end, 7]))
    assert encoder.of_turns.end_ids == encoder.end_ids
    assert (encoder.eos_id, encoder.of_turns.eos_id) == (eos, end)


@pytest.mark.parametrize("spelled", ["<|im_end|>", "</s>", "park"])
@pytest.mark.parametrize("text", ["Hello{}there", "Hello{}"])
def test_an_answer_that_spells_an_end_token_is_refused(spelled, text):
    tokenizer = TOKENIZERS["ChatML"]
    further = tokenizer("park", add_special_tokens=False)["input_ids"][:1]
    with pytest.raises(
        InvalidRow, match=r"f.jsonl:4: completion 1 contains the end token"
    ) as error:
        tokenized(tokenizer, group_of([user("a")], "b", text.format(spelled)), *further)
    assert error.value.reason == EOS_INSIDE


def test_a_template_that_is_not_prefix_preserving_is_refused_with_both_renderings():
    tokenizer = chat_tokenizer(Kind(THINKING, "<|im_end|>", "</s>"))
    with pytest.raises(InputError) as caught:
        tokenized(tokenizer, group_of([user("a")], "b"))
    names_all(
        str(caught.value),
        ["not prefix-preserving", r"assistant\n<think>\n'", r"assistant\nthe answer<|im_end|>\n'"],
    )


def test_an_answer_that_changes_how_its_prompt_is_written_is_refused_with_its_row():
    counting = "{{ messages | length if messages[0]['content'] == 'count' else '' }}" + CHATML
    tokenizer = chat_tokenizer(Kind(counting, "<|im_end|>", "</s>"))
    assert tokenized(tokenizer, group_of([user("a")], "b"))
    with pytest.raises(InvalidRow) as caught:
        tokenized(tokenizer, group_of([user("count")], "b"))
    names_all(str(caught.value), ["f.jsonl:4", "prompt: '1<|im_start|>", "whole:  '2<|im_start|>"])


def test_roles_that_a_template_refuses_are_named_with_the_row():
    with pytest.raises(InvalidRow, match=r"f.jsonl:4: the chat template .* roles must alternate"):
        tokenized(TOKENIZERS["Llama-2-chat"], group_of([user("a"), user("b")], "c"))


def test_a_template_that_fails_is_named_with_the_row():
    failing = "{{ 1 / 0 if messages[0]['content'] == 'fail' else '' }}" + CHATML
    tokenizer = chat_tokenizer(Kind(failing, "<|im_end|>", "</s>"))
    with pytest.raises(InvalidRow, match=r"f.jsonl:4: .* fails at .*ZeroDivisionError"):
        tokenized(tokenizer, group_of([user("fail")], "c"))


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (None, "the data have messages, but the tokenizer has no chat template"),
        ("{% for", "the chat template of .* refuses these messages"),
        (ENDLESS, r"ends an assistant's turn in a special token, got '\\n' behind its text"),
        ("{{ ''.__class__.__mro__ }}", "the chat template of .* refuses .*unsafe"),
    ],
)
def test_a_tokenizer_without_a_template_that_can_be_used_is_named_and_reads_texts(template, text):
    tokenizer = chat_tokenizer(KINDS["ChatML"])
    tokenizer.chat_template = template
    with pytest.raises(InputError, match=text):
        tokenized(tokenizer, group_of([user("a")], "b"))
    group, _ = tokenized(tokenizer, TextGroup("i", "f:1", "a", ("b",)))
    assert group.completion_tokens[0][-1] == tokenizer.eos_token_id


def test_a_prompt_that_is_too_long_is_refused_and_never_cut():
    with pytest.raises(InvalidRow, match=r"the prompt has \d+ tokens, over .* never cut") as error:
        tokenized(TOKENIZERS["ChatML"], group_of([user("bike " * 600), SAYS, user("b")], "c"))
    assert error.value.reason == "prompt over 512 tokens"


def test_the_hash_of_the_format_has_the_template_in_it():
    hashes = {text_format_hash("chat", Encoder(tokenizer)) for tokenizer in TOKENIZERS.values()}
    assert len(hashes) == len({kind.template for kind in KINDS.values()})
    assert text_format_hash("text", Encoder(TOKENIZERS["Qwen3"])) == text_format_hash(
        "text", Encoder(TOKENIZERS["ChatML"])
    )
