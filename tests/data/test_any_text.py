"""Whatever text a row has, models read it, rewards see it and files keep it byte for byte."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from copg_jax.config.sections import DataConfig
from copg_jax.data.dataset import prepare
from copg_jax.data.reader import GroupReader
from copg_jax.data.rows import InvalidRow
from copg_jax.data.scored_rows import SCHEMA, ScoredGroup, make_row, read_row
from copg_jax.data.tokenizer import NOT_EXACT, Encoder
from copg_jax.rewards.protocol import score_texts

EDGES = st.sampled_from(["", " ", "  ", "\t", "\n", "\r\n", "\u2028", "\x85", "\u00a0", "    "])
# "▁" is how a tokenizer like SentencePiece's writes a blank.
INSIDE = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0▁"), max_size=12)
TEXTS = st.builds("{}{}{}".format, EDGES, INSIDE, EDGES).filter(str.strip)
PAIRS = st.tuples(TEXTS, TEXTS, TEXTS).filter(lambda texts: texts[1] != texts[2])
TOKENIZERS = ["plain", "llama_3", "metaspace", "prepending"]


@settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    pairs=st.lists(PAIRS, min_size=1, max_size=4),
    kind=st.sampled_from(TOKENIZERS),
    is_ascii=st.booleans(),
    is_parquet=st.booleans(),
)
def test_text_is_trained_on_judged_and_written_back_as_it_was_given(
    pairs, kind, is_ascii, is_parquet, request, tmp_path
):
    tokenizer = request.getfixturevalue(kind)
    rows = [dict(zip(("prompt", "chosen", "rejected"), texts, strict=True)) for texts in pairs]
    path = tmp_path / f"rows.{'parquet' if is_parquet else 'jsonl'}"
    if is_parquet:
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_bytes(
            b"".join(json.dumps(row, ensure_ascii=is_ascii).encode() + b"\n" for row in rows)
        )
    config = DataConfig(path=str(path), format="text")
    made = prepare(
        GroupReader(config),
        tokenizer,
        path=tmp_path / "a.arrow",
        limits=config.limits,
        vocab_size=len(tokenizer),
    )
    encoder, seen = Encoder(tokenizer), []

    def watching(prompts: list[str], completions: list[str]) -> list[float]:
        seen.extend(zip(prompts, completions, strict=True))
        return [0.0] * len(prompts)

    # Llama 2's newer files make the same ids of a prompt with a blank in front as of one without.
    unsure = [prompt for prompt, *_ in pairs if kind == "metaspace" and prompt.startswith(" ")]
    assert len(made) == len(pairs)
    assert made.stats["changed"].get(NOT_EXACT, 0) == len(unsure)
    for group, (prompt, *texts) in zip(made, pairs, strict=True):
        trained = [encoder.completion_text(ids[:-1]) for ids in group.completion_tokens]
        assert trained == texts
        assert encoder.gives_back(prompt, group.prompt_tokens.tolist()) == (prompt not in unsure)
        score_texts(watching, [group.prompt] * 2, group.completions, {}, name="watching")
        assert seen[-2:] == [(prompt, text) for text in texts]
        again = written_back(group)
        assert (again.prompt, list(again.completions)) == (prompt, texts)
        for ids, others in zip(group.completion_tokens, again.completion_tokens, strict=True):
            np.testing.assert_array_equal(ids, others)


def written_back(group: Any) -> Any:
    """A group after it was scored, written and read."""
    group = replace(group, ref_logps=np.zeros(len(group.completions), np.float32))
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist([make_row(ScoredGroup(group, {}))], SCHEMA), sink)
    (row,) = pq.read_table(pa.BufferReader(sink.getvalue())).to_pylist()
    return read_row("part:1", row, text_format="text")


@pytest.mark.parametrize("field", ["prompt", "completion", "id", "topic"])
def test_nul_is_refused_by_name(field, write_lines):
    row = {"prompt": "a", "completion": "b"}
    path = write_lines(row, row | {field: "x\0"})
    with pytest.raises(InvalidRow, match=rf"{path}:2: field '{field}' has the character NUL"):
        list(GroupReader(DataConfig(path=path)))
    reader = GroupReader(DataConfig(path=path, invalid_rows="drop"))
    assert len(list(reader)) == 1 and reader.counts == {"NUL in a text": 1}
