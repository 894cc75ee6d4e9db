"""TRL's conversational columns become the same groups; messages that mean nothing are named."""

from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from copg_jax.config.sections import DataConfig
from copg_jax.data.formats.choice import FormatChoice
from copg_jax.data.formats.columns import to_group
from copg_jax.data.formats.texts import TextGroup, given_text, stored_text
from copg_jax.data.reader import GroupReader
from copg_jax.data.rows import InvalidRow
from copg_jax.errors import InputError

SYSTEM = {"role": "system", "content": "Be kind."}
ASKS = {"role": "user", "content": " My bike?"}
SAYS = {"role": "assistant", "content": "It broke. "}
OTHER = {"role": "assistant", "content": "Who cares?"}
PROMPT = [SYSTEM, ASKS, SAYS, ASKS]


def read(row: dict[str, Any]) -> TextGroup:
    """The group of a row that is the first of its data set."""
    group = to_group("f.jsonl:9", row)
    assert isinstance(group, TextGroup)
    rendered = FormatChoice("auto").render(group)
    assert isinstance(rendered, TextGroup)
    return rendered


PAIRS = [
    {"prompt": PROMPT, "chosen": [SAYS], "rejected": [OTHER]},
    {"prompt": PROMPT, "chosen": [*PROMPT, SAYS], "rejected": [*PROMPT, OTHER]},
    {"chosen": [*PROMPT, SAYS], "rejected": [*PROMPT, OTHER]},
    {"prompt": ASKS["content"], "chosen": [*PROMPT, SAYS], "rejected": [*PROMPT, OTHER]},
    {"prompt": PROMPT, "completions": [[SAYS], [OTHER]], "rewards": [1.0, 0.0]},
]


@pytest.mark.parametrize("row", PAIRS, ids=range(len(PAIRS)))
def test_pairs_and_groups_of_messages_are_the_same_however_they_are_written(row):
    group = read(row | {"topic": 3})
    assert (group.prompt, group.completions) == (PROMPT, ([SAYS], [OTHER]))
    assert (group.rewards, group.columns, group.format) == ((1.0, 0.0), {"topic": 3}, "chat")


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [*PROMPT, SAYS]},
        {"prompt": PROMPT, "completion": [SAYS]},
        {"prompt": PROMPT, "completion": [*PROMPT, SAYS]},
    ],
    ids=str,
)
def test_a_conversation_is_its_last_answer_behind_what_came_before(row):
    group = read(row)
    assert (group.prompt, group.completions) == (PROMPT, ([SAYS],))
    assert group.columns == {"reference": SAYS["content"]} and group.rewards is None


def test_scores_of_a_pair_of_conversations_are_its_rewards():
    group = read(PAIRS[2] | {"score_chosen": 8.0, "score_rejected": 3})
    assert group.rewards == (8.0, 3) and not group.is_choice and group.chosen == 0


def test_fields_of_messages_are_kept_unless_they_are_null():
    message = ASKS | {"name": "Ann", "tool_calls": None}
    group = read({"prompt": [message], "completion": [SAYS | {"weight": 1, "name": None}]})
    assert group.prompt == [ASKS | {"name": "Ann"}]
    assert group.completions == ([SAYS | {"weight": 1}],)


def test_messages_are_read_back_from_what_files_keep():
    messages = [{"role": "user", "content": " \u2028é\n"}, SAYS | {"weight": 1.5}]
    assert given_text(stored_text(messages), "chat") == messages
    assert given_text(stored_text('[{"role": "user"}]'), "text") == '[{"role": "user"}]'


CHAT = {"prompt": [ASKS], "completion": [SAYS]}
BAD = [
    ({"messages": [{"role": "user"}, SAYS]}, "message without content", r"'messages\[0\].content'"),
    ({"messages": [{"content": "a"}, SAYS]}, "message without role", r"'messages\[0\].role'"),
    ({"messages": [ASKS | {"content": [{"type": "text"}]}, SAYS]}, "message without content",
     r"'messages\[0\].content': wanted a string, got \[.*images"),
    ({"messages": [ASKS | {"role": "critic"}, SAYS]}, "unknown role",
     r"'messages\[0\].role' is 'critic': wanted one of system, user, assistant"),
    ({"messages": ["hi", SAYS]}, "wrong type", r"'messages\[0\]': wanted a message.*got str"),
    ({"messages": []}, "no messages", "'messages' is an empty list"),
    ({"messages": "hi"}, "wrong type", "'messages': wanted a list"),
    ({"messages": [ASKS]}, "no answer", "'messages' ends in a turn of 'user'"),
    ({"messages": [SAYS]}, "empty prompt", "'messages' has no turn in front of the answer"),
    ({"messages": [ASKS, SAYS, OTHER]}, "two assistant turns at the end", "wanted a turn of"),
    ({"prompt": [ASKS, SAYS], "completion": [OTHER]}, "two assistant turns at the end", "answer"),
    (CHAT | {"completion": [SAYS, OTHER]}, "no single answer", "turns of .*assistant.*assistant"),
    (CHAT | {"completion": [ASKS]}, "no single answer", r"completion 0: wanted one .*\['user'\]"),
    (CHAT | {"completion": "b"}, "texts and messages", "a list of messages, .* answers it a text"),
    (CHAT | {"prompt": "a"}, "texts and messages", "'prompt' is a text"),
    (CHAT | {"completion": [SAYS | {"content": " \n"}]}, "empty completion",
     "completion 0 is an empty assistant turn"),
    (PAIRS[0] | {"rejected": [SAYS]}, "identical completions", "all 2 completions are the same"),
    ({"chosen": [ASKS, SAYS], "rejected": [SYSTEM, OTHER]}, "pair of two prompts",
     "differ at message 0"),
    ({"chosen": [ASKS, SAYS], "rejected": [ASKS, SAYS, ASKS, OTHER]}, "pair of two prompts",
     "differ at message 1"),
    (PAIRS[3] | {"prompt": "Another?"}, "two prompts", "'prompt' is 'Another.'"),
    (CHAT | {"tools": [{"name": "f"}]}, "tools", "'tools' has values, which are not supported"),
    (CHAT | {"chat_template_kwargs": {"a": 1}}, "chat_template_kwargs", "which are not read"),
    ({"messages": [ASKS, {"role": "tool", "content": "3"}, SAYS]}, "tools", r"'messages\[1\]' is"),
    ({"messages": [ASKS, SAYS | {"tool_calls": [{"name": "f"}]}]}, "tools", r"'messages\[1\]' is"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "reason", "text"), BAD)
def test_messages_that_mean_nothing_are_named(row, reason, text):
    with pytest.raises(InvalidRow, match=rf"f.jsonl:9: .*{text}") as error:
        read(row)
    assert error.value.reason == reason


def test_a_data_set_of_messages_is_chat_and_other_formats_refuse_it(write_lines):
    path = write_lines(CHAT, CHAT)
    reader = GroupReader(DataConfig(path=path))
    assert len(list(reader)) == 2 and reader.text_format == "chat"
    with pytest.raises(InputError, match=rf"{path}:1: .*not in the format 'text'.*format=chat"):
        list(GroupReader(DataConfig(path=path, format="text")))
    path = write_lines(CHAT, {"prompt": "a", "completion": "b"}, name="mixed.jsonl")
    with pytest.raises(InputError, match=rf"{path}:2: .*in the format 'text', but.* of one\. Fix"):
        list(GroupReader(DataConfig(path=path)))
    path = write_lines({"prompt": "a", "completion": "b"}, name="text.jsonl")
    with pytest.raises(InputError, match=rf"{path}:1: .*not in the format 'chat'.*format=text"):
        list(GroupReader(DataConfig(path=path, format="chat")))


def test_messages_in_columns_of_parquet_are_those_of_json(tmp_path):
    rows = [
        {"prompt": [SYSTEM, ASKS], "chosen": [SAYS | {"name": "x"}], "rejected": [OTHER]},
        {"prompt": [ASKS], "chosen": [OTHER], "rejected": [SAYS]},
    ]
    message = pa.struct(
        {"role": pa.dictionary(pa.int32(), pa.string()), "content": pa.large_string(),
         "name": pa.string()}
    )  # fmt: skip
    schema = pa.schema({name: pa.large_list(message) for name in rows[0]})
    pq.write_table(pa.Table.from_pylist(rows, schema), tmp_path / "rows.parquet")
    got = list(GroupReader(DataConfig(path=str(tmp_path))))
    assert [(g.prompt, *g.completions) for g in got] == [tuple(row.values()) for row in rows]
