"""Whatever a line of data holds, reading it gives groups or an error that names the line."""

import json

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from copg_jax.config.sections import TEXT_FORMATS, DataConfig
from copg_jax.data.dataset import prepare
from copg_jax.data.reader import GroupReader
from copg_jax.errors import InputError

TEXTS = st.text(st.characters(), max_size=8) | st.sampled_from(  # with halves of surrogate pairs
    [
        "SUBREDDIT: r/x\n\nTITLE: t\n\nPOST: p\n\nTL;DR:",
        "SUBREDDIT: r/x\nTITLE: t\nPOST: ",
        "TITLE: t\n\nx\n\nTL;DR:",
        "TL;DR:",
        "</s>",
        "<s>",
        "\ud800",
    ]
)
NUMBERS = st.integers(-2, 2) | st.integers() | st.floats() | st.just(10**400)
LEAVES = st.none() | st.booleans() | NUMBERS | TEXTS
VALUES = st.recursive(
    LEAVES, lambda v: st.lists(v, max_size=3) | st.dictionaries(TEXTS, v, max_size=3), max_leaves=6
)
PAIR = st.lists(TEXTS, min_size=2, max_size=2)
NAMES = [
    "prompt",
    "chosen",
    "rejected",
    "completion",
    "completions",
    "rewards",
    "label",
    "info",
    "summaries",
    "choice",
    "post",
    "title",
    "subreddit",
    "summary",
    "score_chosen",
    "score_rejected",
    "id",
    "split",
    "margin",
    "messages",
]
LIKELY = {
    "prompt": TEXTS,
    "chosen": TEXTS,
    "rejected": TEXTS,
    "completions": PAIR,
    "rewards": st.lists(NUMBERS | st.none(), min_size=2, max_size=2),
    "summaries": st.lists(st.fixed_dictionaries({"text": TEXTS}), min_size=2, max_size=2),
    "info": st.fixed_dictionaries({"post": TEXTS, "title": TEXTS, "subreddit": TEXTS}),
    "choice": st.integers(0, 1),
}
ROWS = st.one_of(
    st.dictionaries(st.sampled_from(NAMES) | TEXTS, VALUES, max_size=6),
    *(
        st.fixed_dictionaries({n: LIKELY[n] | VALUES for n in need}, optional={"id": VALUES})
        for need in (
            ("prompt", "chosen", "rejected"),
            ("prompt", "completions", "rewards"),
            ("info", "summaries", "choice"),
        )
    ),
)


@settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    rows=st.lists(ROWS | VALUES, min_size=1, max_size=3),
    format=st.sampled_from(TEXT_FORMATS),
    invalid_rows=st.sampled_from(["error", "drop"]),
    chosen_only=st.booleans(),
)
def test_a_row_becomes_a_group_or_is_named(
    rows, format, invalid_rows, chosen_only, plain, write_lines, tmp_path
):
    path = write_lines(*map(json.dumps, rows))
    config = DataConfig(path=path, format=format, invalid_rows=invalid_rows, max_prompt_tokens=40)
    reader = GroupReader(config, chosen_only=chosen_only)
    try:
        dataset = prepare(
            reader, plain, path=tmp_path / "a.arrow", limits=config.limits, vocab_size=500
        )
    except InputError as error:
        assert path in str(error) or "nothing was kept" in str(error)
        return
    assert 0 < len(dataset) <= reader.rows_read == len(rows)
    for group in dataset:
        assert len(group.completions) == len(group.completion_tokens) > 0
