"""Reward functions: what a spec may name, what a function may answer, and the shipped ones."""

import json
import math
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from copg_jax import checksums, rewards
from copg_jax.config.reward_spec import RewardSpec
from copg_jax.config.sections import Limits
from copg_jax.data.formats.choice import FormatChoice
from copg_jax.data.formats.columns import to_group
from copg_jax.data.formats.texts import TextGroup
from copg_jax.data.groups import collate, tokenize_group
from copg_jax.data.tokenizer import Encoder, load_tokenizer
from copg_jax.errors import InputError
from copg_jax.hf import weights as hf_weights
from copg_jax.models.forward import make_score
from copg_jax.models.params import init_params
from copg_jax.rewards import RewardModel
from copg_jax.rewards.functions import WeightedRewards, load_reward
from copg_jax.rewards.protocol import RewardFn, score_texts
from experiments.generated import write_generated
from experiments.studies.comparison import pairwise_accuracy
from tests.toys import LLAMA, names_all

NOT_CALLABLE = 3


def some(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
    """Length in characters; None for an empty text."""
    return [float(len(text)) if text else None for text in completions]


def make_scaled(factor: float) -> RewardFn:
    """Factory of a reward function."""
    return lambda prompts, completions, **_: [factor * len(text) for text in completions]


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("no_such_module.reward", "no_such_module"),
        ("copg_jax.rewards.rouge", "has no attribute 'rouge'"),
        ("rouge_l", "Empty module name"),
    ],
)
def test_a_path_that_leads_nowhere_is_named_with_the_form_of_one_that_does(path, reason):
    with pytest.raises(InputError) as caught:
        load_reward(RewardSpec(path))
    names_all(str(caught.value), [repr(path), reason, "copg_jax.rewards.rouge_l", "PYTHONPATH"])


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        (f"{__name__}.NOT_CALLABLE", "is not a function, got int"),
        ("copg_jax.rewards.RewardModel", "is not a function; a class needs `arguments`"),
    ],
)
def test_what_is_not_a_function_is_refused(name, reason):
    with pytest.raises(InputError) as caught:
        load_reward(RewardSpec(name))
    names_all(str(caught.value), [name, reason])


def test_arguments_go_to_a_factory_and_wrong_ones_are_named():
    path = f"{__name__}.make_scaled"
    function = load_reward(RewardSpec(path, {"factor": 2.0}))
    assert function(prompts=["p"], completions=["abc"]) == [6.0]
    with pytest.raises(InputError, match=r"arguments do not fit.*'scale'"):
        load_reward(RewardSpec(path, {"scale": 2.0}))


def test_a_column_that_a_function_wants_and_the_data_lacks_is_named():
    with pytest.raises(InputError) as caught:
        score_texts(rewards.rouge_l, ["p"], ["c"], {"subreddit": ["a"]}, name="rouge_l")
    names_all(str(caught.value), ["rouge_l", "reference", "subreddit"])


def test_the_total_is_the_weighted_sum_and_absent_where_a_part_is():
    total, parts = WeightedRewards(
        [
            RewardSpec("copg_jax.rewards.length", weight=0.5),
            RewardSpec(f"{__name__}.make_scaled", {"factor": 3.0}, weight=2.0),
            RewardSpec(f"{__name__}.some"),
        ]
    )(["p", "p"], ["a bc", ""], {}, num_tokens=[3, 1])
    np.testing.assert_allclose(total, [0.5 * -2 + 2 * 12 + 4, np.nan])
    assert parts["length"].tolist() == [-2.0, 0.0]
    assert parts["make_scaled"].tolist() == [12.0, 0.0]


def test_no_reward_function_at_all_is_refused():
    with pytest.raises(InputError, match=r"rewards: wanted at least one.*got none; e\.g\."):
        WeightedRewards([])


def test_the_provenance_changes_with_the_spec():
    first = WeightedRewards([RewardSpec("copg_jax.rewards.length")]).provenance
    assert first == WeightedRewards([RewardSpec("copg_jax.rewards.length")]).provenance
    assert first != WeightedRewards([RewardSpec("copg_jax.rewards.length", weight=2.0)]).provenance


def test_rouge_l_is_the_f1_of_the_longest_common_subsequence_of_stems():
    references = ["the cat sat on the mat", "dogs barked", "one two three", None, "alpha"]
    texts = ["the cat sat", "a dog barks", "three two one", "text", ""]
    got = rewards.rouge_l(["p"] * 5, texts, reference=references, other=["x"] * 5)
    # LCS 3 of 3 and 6 words; 2 of 3 and 2 stems; 1 of 3 and 3; no reference; nothing in common.
    assert got == [pytest.approx(2 / 3), pytest.approx(4 / 5), pytest.approx(1 / 3), None, 0.0]


def test_length_is_minus_the_number_of_words():
    assert rewards.length(["p"] * 3, [" one two", "", "x"], any_column=[1, 2, 3]) == [-2, 0, -1]


def test_pairwise_accuracy_counts_strictly_ordered_pairs_and_ties_as_wrong():
    def group(texts: str, labels: tuple[float | None, ...] | None) -> TextGroup:
        return TextGroup("i", "w", "p", tuple(texts.split(",")), labels)

    labelled = [
        group("aaa,b", (1.0, 0.0)),  # longer is preferred: right
        group("a,bbb", (1.0, 0.0)),  # wrong
        group("a,b", (0.0, 1.0)),  # the function ties: wrong
        group("a,b", (1.0, 1.0)),  # no preference: not counted
        group("aaa,bb,c", (3.0, 2.0, None)),  # one pair with labels: right
        group("a,b", None),
    ]
    assert pairwise_accuracy(some, labelled) == pytest.approx(2 / 4)
    assert math.isnan(pairwise_accuracy(some, [group("a,b", (1.0, 1.0))]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny random reward model with the tokenizer of generated posts."""
    folder = tmp_path_factory.mktemp("reward")
    write_generated(folder / "data", num_examples=20, num_comparisons=2, seed=0, vocab_size=300)
    tokenizer = load_tokenizer(folder / "data" / "tokenizer")
    arch = replace(LLAMA, vocab_size=len(tokenizer))
    params = init_params(arch, jax.random.key(0), head="score")
    params = jax.tree.map(lambda x: x if x.ndim == 1 else 10 * x, params)
    hf_weights.save_pretrained(folder / "m", arch, params, head="score", tokenizer=tokenizer)
    return folder / "m"


PROMPTS = ["A short prompt", "A short prompt", "Another", "A short prompt"]
TEXTS = [" one summary", "another, longer summary", " x", "one summary"]
POST = "SUBREDDIT: r/tifu\n\nTITLE: My bike\n\nPOST: It broke.\n\nTL;DR:"


@pytest.fixture(scope="module")
def together(folder) -> list[float]:
    """Rewards of all texts in one call."""
    return list(RewardModel(str(folder))(PROMPTS, TEXTS, reference=[None] * 4))


def test_the_reward_model_s_numbers_do_not_depend_on_the_batch(folder, together):
    model = RewardModel(str(folder))
    assert np.ptp(together) > 0.1
    alone = [model([p], [t])[0] for p, t in zip(PROMPTS, TEXTS, strict=True)]
    np.testing.assert_allclose(alone, together, atol=1e-5)
    order = [2, 3, 1, 0]
    moved = model([PROMPTS[i] for i in order], [TEXTS[i] for i in order])
    np.testing.assert_allclose(moved, np.array(together)[order], atol=1e-5)


def test_the_reward_model_uses_all_devices_where_their_number_does_not_divide_its_width(
    folder, together, monkeypatch
):
    six = jax.devices()[:6]
    monkeypatch.setattr(jax, "devices", lambda: six)
    model = RewardModel(str(folder))
    assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(model._forward.params)} == {6}
    np.testing.assert_allclose(model(PROMPTS, TEXTS), together, atol=1e-5)


@pytest.mark.parametrize("field", ["sliding_window", "max_position_embeddings"])
def test_a_text_longer_than_the_reward_model_sees_is_refused_with_the_numbers(
    folder, tmp_path, field
):
    shutil.copytree(folder, tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mistral", "sliding_window": None, field: 12}
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    (tmp_path / "m" / checksums.NAME).unlink()
    model = RewardModel(str(tmp_path / "m"))
    with pytest.raises(InputError) as caught:
        model(["A short prompt"], ["one summary " * 9])
    names_all(str(caught.value), ["reward model", "A short prompt", f"{field}=12", "Fix"])


NEWS = "TITLE: t\n\nnews\n\nTL;DR:"
NO_POST = POST.replace("It broke.", " ")


@pytest.mark.parametrize(
    ("prompt", "text_format"),
    [
        ("A short prompt", "auto"),
        ("Answer: ", "auto"),
        (POST, "auto"),
        (POST, "tldr"),
        (POST, "text"),
        (NEWS, "text"),
        (NO_POST, "text"),
    ],
)
def test_the_reward_model_gives_the_number_that_its_training_saw(folder, prompt, text_format):
    arch = hf_weights.read_architecture(folder)
    params = hf_weights.load_params(folder, arch, head="score")
    row = {"prompt": prompt, "chosen": TEXTS[0], "rejected": TEXTS[1]}
    group = FormatChoice(text_format).render(to_group("f:1", row))
    tokens = tokenize_group(group, Encoder(load_tokenizer(folder)), Limits(), Counter())
    batch = collate([tokens, None], prompt_size=64, num_completions=3, completion_size=40)
    scores = jax.jit(make_score(arch))(params, batch)
    given = RewardModel(str(folder), text_format=text_format)([prompt] * 2, TEXTS[:2])
    np.testing.assert_allclose(scores[0, :2], given, atol=1e-5)


@pytest.mark.parametrize(
    ("prompt", "text_format", "reason"),
    [
        (NEWS, "auto", "news"),
        (NEWS, "tldr", "CNN/DM article"),
        (NO_POST, "auto", "the post is empty"),
        ("A short prompt", "tldr", "not in the format 'tldr'"),
    ],
)
def test_a_prompt_that_the_reward_model_s_format_leaves_out_is_refused_with_the_one_that_does_not(
    folder, prompt, text_format, reason
):
    with pytest.raises(InputError) as caught:
        RewardModel(str(folder), text_format=text_format)([prompt], ["one"])
    names_all(str(caught.value), ["reward model", reason, "text_format=text"])


@pytest.mark.parametrize("name", ["TLDR", "", None])
def test_a_text_format_that_there_is_not_is_refused_with_those_that_there_are(folder, name):
    with pytest.raises(InputError, match=r"text_format: wanted one of auto, tldr, text, chat, got"):
        RewardModel(str(folder), text_format=name)


def test_one_leading_blank_or_none_is_the_same_behind_a_post_alone(folder):
    post, other = (RewardModel(str(folder))([p] * 2, ["one", " one"]) for p in (POST, "Say one:"))
    assert post[0] == pytest.approx(post[1], abs=1e-6)
    assert abs(other[0] - other[1]) > 1e-3


def test_an_empty_generation_has_a_reward_too(folder):
    (reward,) = RewardModel(str(folder))(["A short prompt"], [""])
    assert math.isfinite(reward)
