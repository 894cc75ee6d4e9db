"""Claims about the schemas: each becomes the same group; bad rows name place, field and fix."""

import pytest

from copg_jax.data.formats.choice import FormatChoice
from copg_jax.data.formats.columns import to_group
from copg_jax.data.formats.texts import TextGroup
from copg_jax.data.formats.tldr import NEWS
from copg_jax.data.rows import InvalidRow

CARPER = "SUBREDDIT: r/tifu\nTITLE: My bike\nPOST: It broke.\nTwice.\nTL;DR: "
ARTICLE = {
    "id": "b",
    "site": "cnn",
    "title": "t",
    "article": "text",
    "post": None,
    "subreddit": None,
}


def read(where, row):
    """The group of a row that is the first of its data set."""
    group = to_group(where, row)
    return FormatChoice("auto").render(group) if isinstance(group, TextGroup) else group


def sft_rows(sft_row, prompt):
    """One post in all schemas with a single completion."""
    return [
        sft_row,
        sft_row | {"query": "x", "query_token": [1], "reference_response": " x<|endoftext|>"},
        {"prompt": prompt, "completion": " bike broke"},
        {"prompt": CARPER, "label": "bike broke"},
    ]


def pair_rows(prompt):
    """One pair in all schemas with chosen and rejected."""
    return [
        {"prompt": prompt, "chosen": " no bike", "rejected": " bike broke"},
        {
            "prompt": CARPER.removesuffix("\nTL;DR: "),
            "chosen": "TL;DR: no bike",
            "rejected": "TL;DR: bike broke",
        },
        {"prompt": prompt, "completions": ["no bike", "bike broke"], "rewards": [1, 0.0]},
    ]


def test_every_single_completion_schema_gives_the_same_group(sft_row, prompt):
    for row in sft_rows(sft_row, prompt):
        group = read("f:1", row)
        assert (group.prompt, group.completions, group.rewards) == (prompt, (" bike broke",), None)
        reference = group.columns.pop("reference")
        assert reference == row.get("completion", "bike broke")  # as it was given
        assert group.columns == {"subreddit": "tifu", "title": "My bike"}


def test_every_pair_schema_gives_reward_one_to_the_chosen(comparison_row, prompt):
    for row in pair_rows(prompt):
        group = read("f:1", row)
        assert (group.prompt, group.completions) == (prompt, (" no bike", " bike broke"))
        assert group.rewards == (1.0, 0.0)
        assert group.columns == {"subreddit": "tifu", "title": "My bike"}
    group = read("f:1", comparison_row)
    assert (group.prompt, group.completions) == (prompt, (" bike broke", " no bike"))
    assert group.rewards == (0.0, 1.0) and group.id == "t3_a"
    comparison_row["choice"] = 0
    assert read("f:1", comparison_row).rewards == (1.0, 0.0)


@pytest.mark.parametrize("names", ["score_{}", "{}_score", "reward_{}", "{}_reward"])
def test_scores_of_a_pair_are_its_rewards_and_a_margin_is_none(names, prompt):
    pair = {"prompt": prompt, "chosen": "a", "rejected": "b", "margin": 3.0}
    scores = {names.format("chosen"): 7, names.format("rejected"): 7.5}
    group = read("f:1", pair | scores)
    assert group.rewards == (7, 7.5) and not group.is_choice
    scores[names.format("chosen")] = None
    assert read("f:1", pair | scores).rewards == (None, 7.5)
    unscored = read("f:1", pair | dict.fromkeys(scores))
    assert unscored.rewards == (None, None) and not unscored.is_choice
    group = read("f:1", pair)
    assert group.rewards == (1.0, 0.0) and group.is_choice


def test_a_choice_is_told_from_scores_that_look_like_one(comparison_row, prompt):
    assert read("f:1", comparison_row).is_choice
    pairs, scored = pair_rows(prompt)[:2], pair_rows(prompt)[2]
    assert [read("f:1", row).is_choice for row in (*pairs, scored)] == [True, True, False]


def test_groups_of_k_keep_null_rewards_and_other_columns():
    row = {
        "prompt": "Say a.",
        "completions": ["a", "b", "c"],
        "rewards": [0.5, None, 2],
        "topic": "letters",
    }
    group = read("dir/f.jsonl:7", row)
    assert group.prompt == "Say a." and group.completions == ("a", "b", "c")
    assert group.rewards == (0.5, None, 2)
    assert group.columns == {"topic": "letters"} and group.id == "f.jsonl:7"
    assert read("f:1", {"prompt": "Say a.", "completions": ["a"]}).rewards is None
    # ln π_ref comes with scored data only: here it is a column like any other.
    group = read("f:1", row | {"ref_logps": [-1.0, -2.0, -3.0]})
    assert group.columns == {"topic": "letters", "ref_logps": [-1.0, -2.0, -3.0]}


def test_a_tldr_prefix_is_cut_off_behind_a_prompt_in_carper_s_frame_alone(prompt):
    for frame, wanted in ((CARPER, " a"), (prompt, " TL;DR: a"), ("Summarise: x", "TL;DR: a")):
        group = read("f:1", {"prompt": frame, "chosen": "TL;DR: a", "rejected": "b"})
        assert group.completions[0] == wanted


def test_news_articles_are_left_out_in_every_schema(comparison_row):
    news = "TITLE: t\n\ntext\n\nTL;DR:"
    assert read("f:1", comparison_row | {"info": ARTICLE}) == NEWS
    assert read("f:1", {"prompt": news, "chosen": "a", "rejected": "b"}) == NEWS


def test_an_unknown_schema_lists_what_was_got_and_all_that_is_known():
    with pytest.raises(InvalidRow) as error:
        read("f.jsonl:3", {"prompt": "p", "chosen": "c", "extra": 1})
    text = str(error.value)
    assert text.startswith("f.jsonl:3: fields ['rejected'] are missing")
    assert "got ['chosen', 'extra', 'prompt']" in text
    for fields in ("info, summaries, choice", "prompt, label", "subreddit, title, post, summary"):
        assert fields in text
    assert "data.invalid_rows=drop" in text


def bad(row, **changes):
    return {name: value for name, value in (row | changes).items() if value is not ...}


def nested(depth):
    """A list of a list of a list."""
    value = []
    for _ in range(depth - 1):
        value = [value]
    return value


GROUP = {"prompt": "p", "completions": ["a", "b"], "rewards": [1.0, 0.0]}
PAIR = {"prompt": "p", "chosen": "a", "rejected": "b"}
BAD_ROWS = [
    (bad(PAIR, prompt=" "), "empty prompt", "'prompt' is empty"),
    (
        bad(PAIR, prompt=3),
        "wrong type",
        r"field 'prompt': wanted a string or messages, got int \(3\)",
    ),
    (bad(PAIR, chosen=""), "empty completion", "completion 0 is empty"),
    (
        bad(PAIR, rejected=None),
        "wrong type",
        "'rejected': wanted a string or messages, got NoneType",
    ),
    (bad(PAIR, chosen="b"), "identical completions", "all 2 completions are the same text"),
    (bad(GROUP, completions=["a", "a"]), "identical completions", "all 2 completions"),
    (bad(GROUP, completions=[]), "empty completion", "'completions' is an empty list"),
    (bad(GROUP, completions="a"), "wrong type", "'completions': wanted a list, got str"),
    (bad(GROUP, completions=["a", 1]), "wrong type", r"'completions\[1\]': wanted a string"),
    (bad(GROUP, rewards=[1.0]), "rewards count", "'rewards' has 1 entries for 2 completions"),
    (bad(GROUP, rewards=[1.0, "x"]), "wrong type", r"'rewards\[1\]': wanted a number or null"),
    (bad(GROUP, rewards=[1.0, True]), "wrong type", r"'rewards\[1\]': wanted a number or null"),
    (bad(GROUP, rewards=[1.0, float("nan")]), "non-finite rewards", r"'rewards\[1\]' is nan"),
    (bad(GROUP, rewards=[float("inf"), 1]), "non-finite rewards", r"'rewards\[0\]' is inf"),
    (bad(GROUP, rewards=[1, -1e39]), "non-finite rewards", r"'rewards\[1\]' is -1e\+39: .*float32"),
    (bad(GROUP, rewards=[1, 10**400]), "non-finite rewards", r"'rewards\[1\]' is 1000"),
    (bad(PAIR, prompt="hi \ud83d"), "half a surrogate pair", r"'prompt' has .*'\\ud83d'"),
    (bad(PAIR, rejected="\udc00x"), "half a surrogate pair", "'rejected' has half"),
    (bad(GROUP, completions=["a", "\ud800"]), "half a surrogate pair", "'completions' has half"),
    (bad(GROUP, id="\ud800"), "half a surrogate pair", "'id' has half"),
    (bad(GROUP, topic={"a": ["\ud800"]}), "half a surrogate pair", "'topic' has half"),
    (bad(GROUP, **{"\ud800": 1}), "half a surrogate pair", r"'\\ud800' has half"),
    (bad(GROUP, topic=nested(200)), "nested too deep", "'topic' is nested deeper than 100"),
    (bad(GROUP, topic={"a": nested(100)}), "nested too deep", "'topic' is nested deeper"),
    (bad(PAIR, score_chosen=1), "missing field", "'score_rejected' is missing"),
    (bad(PAIR, rejected_reward=1), "missing field", "'chosen_reward' is missing"),
    (bad(PAIR, rewards=[1]), "rewards count", "'rewards' has 1 entries for 2 completions"),
    (
        bad(PAIR, chosen_score="8", rejected_score=1),
        "wrong type",
        "'chosen_score': wanted a number or null, got str",
    ),
    (
        bad(PAIR, score_chosen=8, score_rejected=float("nan")),
        "non-finite rewards",
        "'score_rejected' is nan",
    ),
    (
        bad(PAIR, score_chosen=8, score_rejected=1, chosen_reward=1, rejected_reward=8),
        "scores more than once",
        r"'score_chosen', 'score_rejected', 'chosen_reward', 'rejected_reward'\]: wanted .* once",
    ),
    (
        bad(PAIR, reward_chosen=8, reward_rejected=1, rewards=[1, 2]),
        "scores more than once",
        r"'reward_chosen', 'reward_rejected', 'rewards'\]",
    ),
]


@pytest.mark.parametrize(("row", "reason", "text"), BAD_ROWS)
def test_a_bad_row_names_place_field_and_what_was_got(row, reason, text):
    with pytest.raises(InvalidRow, match=rf"f.jsonl:9: .*{text}") as error:
        read("f.jsonl:9", row)
    assert error.value.reason == reason


def test_bad_posts_and_comparisons_are_named(sft_row, comparison_row):
    with pytest.raises(InvalidRow, match="the post is empty"):
        read("f:1", sft_row | {"post": "\n "})
    with pytest.raises(InvalidRow, match=r"field 'title': wanted a string, got NoneType"):
        read("f:1", sft_row | {"title": None})
    for choice in (2, None, True, "1"):
        with pytest.raises(InvalidRow, match="wanted 2 summaries and choice 0 or 1"):
            read("f:1", comparison_row | {"choice": choice})
    with pytest.raises(InvalidRow, match="got 1 and choice 1"):
        read("f:1", comparison_row | {"summaries": comparison_row["summaries"][:1]})
    with pytest.raises(InvalidRow, match=r"field 'summaries\[0\].text' is missing"):
        read("f:1", comparison_row | {"summaries": [{}, {}]})
    with pytest.raises(InvalidRow, match=r"field 'info.title' is missing"):
        read("f:1", comparison_row | {"info": {"post": "p", "subreddit": "x"}})


def test_what_is_nested_as_deep_as_data_may_be_is_kept():
    assert read("f:1", GROUP | {"topic": nested(100)}).columns == {"topic": nested(100)}
