"""Text of the user's own goes byte for byte to rewards, scored data and the model; a reward sees
the same text when it scores and when it evaluates.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from etils import epath

from copg_jax import inputs
from copg_jax.config.load import load_config
from copg_jax.config.reward_spec import RewardSpec
from copg_jax.config.sections import DataConfig, GenerationConfig, ModelConfig
from copg_jax.config.stages import PolicyEvaluationConfig, ScoreConfig
from copg_jax.data import scored
from copg_jax.data.formats import verbatim
from copg_jax.data.formats.choice import FORMATS
from copg_jax.data.reader import GroupReader
from copg_jax.data.tokenizer import Encoder, load_tokenizer
from copg_jax.errors import InputError
from copg_jax.hf.pretrained import open_model
from experiments import score
from tests.data.conftest import TEXT, byte_fallback
from tests.toys import mesh, names_all
from tests.workplace import tiny_model

TEXTS = [
    {"prompt": "def f(x):\n", "chosen": "    return x + 1\n", "rejected": "    return x\n"},
    {"prompt": "<|user|>\nhi\n<|assistant|>\n", "chosen": "Hello!", "rejected": "Go away."},
    {"prompt": "Question: 2+2?\nAnswer: ", "chosen": "four", "rejected": "\tfive "},
    {"prompt": "Summarise: a b c", "chosen": "TL;DR: abc", "rejected": "TL;DR: cba\u2028"},
    {"prompt": "The capital is Par", "chosen": "is.", "rejected": "ty."},
    {"prompt": "my", "chosen": " bike", "rejected": " brother"},
]
FRAME = "SUBREDDIT: r/x\nTITLE: my bike {}\nPOST: my brother broke it\nTL;DR: "
POSTS = [{"prompt": FRAME.format(i), "chosen": "bike", "rejected": " brother"} for i in range(8)]
seen: list[tuple[str, str]] = []


def watching(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """A reward that notes what it sees."""
    seen.extend(zip(prompts, completions, strict=True))
    return [float(len(text)) for text in completions]


WATCHING = f"rewards=[{{function: {__name__}.watching}}]"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A tiny model whose tokenizer puts a blank in front of texts."""
    folder = tmp_path_factory.mktemp("text") / "base"
    tokenizer = byte_fallback(TEXT.split("\n"), 200, old=False)
    tiny_model(folder, tokenizer, len(tokenizer))
    return folder


def scored_rows(model: Path, folder: Path, rows: list[Any], *more: str) -> list[dict[str, Any]]:
    """Scores the rows; returns those of the scored folder."""
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = [f"reference.path={model}", "reference.dtype=float32", f"data.path={path}"]
    arguments += [f"output_dir={folder / 'scored'}", WATCHING, *more]
    seen.clear()
    score.main(load_config(ScoreConfig, arguments))
    return pq.read_table(folder / "scored" / "part-00000.parquet").to_pylist()


@pytest.mark.parametrize("kind", ["text", "tldr"])
def test_rewards_and_the_scored_folder_have_what_was_given_and_evaluation_reads_it_back(
    kind, model, tmp_path, capfd
):
    rows = TEXTS if kind == "text" else POSTS
    got = scored_rows(model, tmp_path, rows)
    wanted = [(r["prompt"], (r["chosen"], r["rejected"])) for r in rows]
    if kind == "tldr":
        frame = "SUBREDDIT: r/x\n\nTITLE: my bike {}\n\nPOST: my brother broke it\n\nTL;DR:"
        wanted = [(frame.format(i), (" bike", " brother")) for i in range(len(rows))]
    assert seen == [(prompt, text) for prompt, texts in wanted for text in texts]
    assert [(row["prompt"], tuple(row["completions"])) for row in got] == wanted
    side_car = scored.read_side_car(epath.Path(tmp_path / "scored"))
    assert (side_car.text_format, side_car.text_format_hash) == (kind, FORMATS[kind].hash)
    said = capfd.readouterr().err
    names_all(said, [f"text format '{kind}', by its first row", f"1 file: {tmp_path}/rows.jsonl"])

    text_of = generator_of(model, tmp_path, rows)
    tokenizer = load_tokenizer(model)
    for row, (prompt, texts) in zip(got, wanted, strict=True):
        for ids, text in zip(row["completion_token_ids"], texts, strict=True):
            assert text_of(np.array(ids[:-1], np.int32)) == text
            both = tokenizer.decode(row["prompt_token_ids"][1:] + ids[:-1])
            assert both == prompt + text


def generator_of(model: Path, folder: Path, rows: list[Any]) -> Any:
    """What makes texts of generated tokens in evaluations of this model."""
    section = PolicyEvaluationConfig(
        DataConfig(path=str(folder / "rows.jsonl")),
        [RewardSpec(f"{__name__}.watching")],
        GenerationConfig(num_prompts=len(rows)),
    )
    opened = open_model(ModelConfig(str(model), dtype="float32"), mesh())
    evaluator, _ = inputs.open_evaluation(
        section, opened, epath.Path(folder / "evaluation"), beta=1.0, reference=None
    )
    return evaluator._generator.decode


@pytest.fixture(scope="module")
def scored_text(model, tmp_path_factory) -> Path:
    """A scored folder of text."""
    folder = tmp_path_factory.mktemp("scored_text")
    scored_rows(model, folder, TEXTS)
    return folder / "scored"


def read(model: Path, path: Path, **settings: Any) -> GroupReader:
    """Reads scored data to its end, as training does."""
    reader = GroupReader(DataConfig(path=str(path), **settings))
    reader.check_ids(Encoder(load_tokenizer(model)))
    assert len(list(reader)) == len(TEXTS)
    return reader


def test_scored_data_keeps_its_format_and_is_refused_under_another_or_with_other_conventions(
    model, scored_text, monkeypatch
):
    assert read(model, scored_text).text_format == "text"
    assert read(model, scored_text, format="text").text_format == "text"
    with pytest.raises(InputError) as caught:
        read(model, scored_text, format="tldr")
    names_all(str(caught.value), [str(scored_text), "'text'", "'tldr'", "data.format=text"])
    monkeypatch.setattr(verbatim, "VERSION", 99)
    with pytest.raises(InputError, match="'text_format_hash': the data was scored with the text"):
        read(model, scored_text)


def test_scored_data_of_a_format_that_is_not_known_is_refused(model, scored_text, tmp_path):
    folder = epath.Path(tmp_path / "scored")
    shutil.copytree(scored_text, folder)
    side_car = scored.read_side_car(folder)
    scored.write_side_car(folder, replace(side_car, text_format="verse"))
    with pytest.raises(InputError, match=r"'text_format_hash'.*no format 'verse'"):
        read(model, Path(folder))


def test_posts_can_be_read_as_the_text_that_they_are(model, tmp_path):
    got = scored_rows(model, tmp_path, POSTS, "data.format=text")
    assert [row["prompt"] for row in got] == [row["prompt"] for row in POSTS]
    assert [row["completions"] for row in got] == [["bike", " brother"]] * len(POSTS)


def test_prompts_that_their_completions_repeat_are_counted_and_kept(model, tmp_path, capfd):
    rows = [
        {"prompt": prompt, "chosen": f"{lead}{prompt} hello", "rejected": f"{prompt} bye"}
        for prompt, lead in (("Q: hi\nA:", ""), ("Q: ho\nA:", "\n"))
    ]
    got = scored_rows(model, tmp_path, [*rows, *TEXTS])
    assert got[1]["completions"] == [rows[1]["chosen"], rows[1]["rejected"]]
    (said,) = [line for line in capfd.readouterr().err.split("\n") if "WARNING" in line]
    names_all(said, ["in 2 of 8 rows every completion begins with the prompt"])
