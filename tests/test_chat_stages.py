"""Chat through the stages: messages for rewards, ids for models, generations as rows again."""

import json
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from etils import epath

from copg_jax import inputs, reuse
from copg_jax.config.load import load_config
from copg_jax.config.sections import DataConfig, ModelConfig
from copg_jax.config.stages import EvaluateConfig, ScoreConfig
from copg_jax.data import scored
from copg_jax.data.chat_template import ChatTemplate
from copg_jax.data.reader import GroupReader
from copg_jax.data.tokenizer import Encoder, load_tokenizer
from copg_jax.errors import InputError
from copg_jax.files import read_json_lines
from copg_jax.hf import weights
from copg_jax.hf.pretrained import open_model
from copg_jax.models.params import init_params
from experiments import evaluate, score
from tests.data.chat_templates import KINDS, LLAMA_3, chat_tokenizer
from tests.toys import LLAMA, mesh
from tests.workplace import tiny_model


def says(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


PAIR = (("chosen", "b "), ("rejected", "c"))
SYSTEM = {"role": "system", "content": "Be kind."}
ROWS = [
    {side: [SYSTEM, {"role": "user", "content": text}, says(answer)] for side, answer in PAIR}
    | {"topic": text}
    for text in ("My bike?", " And my\n brother?")
]
seen: list[tuple[Any, Any, str]] = []


def watching(prompts: list[Any], completions: list[Any], *, topic: list[str]) -> list[float]:
    """A reward that notes what it sees, and then spoils it."""
    seen.extend(json.loads(json.dumps(list(zip(prompts, completions, topic, strict=True)))))
    rewards = [float(len(answer[0]["content"])) for answer in completions]
    for messages in (*prompts, *completions):
        messages.clear()
    return rewards


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A policy, a reward model with another template, rows, and their scored folder."""
    folder = tmp_path_factory.mktemp("chat")
    tokenizer = chat_tokenizer(KINDS["ChatML"])
    tiny_model(folder / "base", tokenizer, len(tokenizer))
    (folder / "base" / "generation_config.json").write_text('{"eos_token_id": [3, 5]}')
    judge = chat_tokenizer(KINDS["Llama-3"])
    arch = replace(LLAMA, vocab_size=len(judge))
    params = init_params(arch, jax.random.key(1), head="score")
    weights.save_pretrained(folder / "judge", arch, params, head="score", tokenizer=judge)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    rewards = [
        f"{{function: {__name__}.watching}}",
        f"{{function: copg_jax.rewards.RewardModel, arguments: {{path: {folder / 'judge'}}}}}",
        "{function: copg_jax.rewards.length, weight: 0.5}",
    ]
    seen.clear()
    score.main(
        load_config(
            ScoreConfig,
            [
                f"output_dir={folder / 'scored'}",
                f"reference.path={folder / 'base'}",
                "reference.dtype=float32",
                f"data.path={folder / 'rows.jsonl'}",
                f"rewards=[{', '.join(rewards)}]",
            ],
        )
    )
    return folder


def test_rewards_see_messages_and_the_scored_folder_gives_them_back(place):
    wanted = [
        [row[side][:-1], row[side][-1:], row["topic"]]
        for row in ROWS
        for side in ("chosen", "rejected")
    ]
    assert seen[:4] == wanted
    groups = list(GroupReader(DataConfig(path=str(place / "scored"))))
    assert [[g.prompt, k, g.columns["topic"]] for g in groups for k in g.completions] == wanted
    side_car = scored.read_side_car(epath.Path(place / "scored"))
    assert side_car.text_format == "chat"


def test_scored_messages_are_trained_on_without_the_template(place, monkeypatch, tmp_path):
    def fail(*_: Any) -> None:
        raise AssertionError("rendered again")

    tokenizer = load_tokenizer(place / "base")
    model = open_model(ModelConfig(str(place / "base"), dtype="float32"), mesh())
    with monkeypatch.context() as patch:
        patch.setattr(ChatTemplate, "split", fail)
        section = DataConfig(path=str(place / "scored"))
        dataset = inputs.open_data(section, model, epath.Path(tmp_path), "train")
    for group, row in zip(dataset, ROWS, strict=True):
        for ids, side in zip(group.completion_tokens, ("chosen", "rejected"), strict=True):
            whole = tokenizer.apply_chat_template(row[side], return_dict=False)
            both = [*group.prompt_tokens.tolist(), *ids.tolist()]
            assert whole[: len(both)] == both
            assert tokenizer.decode(whole[len(both) :]) == "\n"


def test_scored_messages_are_refused_under_another_template(place):
    tokenizer = load_tokenizer(place / "base")
    reader = GroupReader(DataConfig(path=str(place / "scored")))
    reader.check_ids(Encoder(tokenizer))
    tokenizer.chat_template = LLAMA_3
    with pytest.raises(InputError, match="'text_format_hash': the data was scored with the text"):
        reader.check_ids(Encoder(tokenizer))
    with pytest.raises(InputError, match=r"fields that they were given.*data\.columns"):
        renamed = DataConfig(path=str(place / "scored"), columns={"prompt": "question"})
        GroupReader(renamed).check_ids(Encoder(tokenizer))


def test_runs_of_one_process_share_data_only_where_the_template_is_the_same(place, tmp_path):
    model = open_model(ModelConfig(str(place / "base"), dtype="float32"), mesh())
    other = deepcopy(model.tokenizer)
    other.chat_template += "{# another #}"
    section = DataConfig(path=str(place / "rows.jsonl"))
    with reuse.shared_by_runs():
        first, again, rendered = (
            inputs.open_data(section, one, epath.Path(tmp_path / str(number)), "train")
            for number, one in enumerate((model, model, replace(model, tokenizer=other)))
        )
    assert again is first
    assert rendered is not first and rendered.fingerprint != first.fingerprint


def test_generations_of_chat_are_messages_that_rewards_judge_and_stages_read(place, capfd):
    seen.clear()
    folder = place / "evaluation"
    evaluate.main(
        load_config(
            EvaluateConfig,
            [
                f"output_dir={folder}",
                f"model.path={place / 'base'}",
                "model.dtype=float32",
                f"evaluation.data.path={place / 'rows.jsonl'}",
                f"evaluation.rewards=[{{function: {__name__}.watching}}]",
                "evaluation.generation.num_prompts=2",
                "evaluation.generation.num_samples=40",
                "evaluation.generation.max_new_tokens=24",
            ],
        )
    )
    rows = [row for _, row in read_json_lines(folder / "generations.jsonl")]
    assert [row["prompt"] for row in rows[::40]] == [row["chosen"][:-1] for row in ROWS]
    found = [[row["prompt"], row["completion"], ROWS[row["index"]]["topic"]] for row in rows]
    assert sorted(seen, key=str) == sorted(found, key=str)
    for row in rows:
        ((message),) = row["completion"]
        assert message["role"] == "assistant" and row["reward"] == len(message["content"])
    assert 0 < np.mean([row["has_eos"] for row in rows]) < 1
    assert "generations end in one of: '</s>', '<|im_end|>', " in capfd.readouterr().err
    again = GroupReader(DataConfig(path=str(folder / "generations.jsonl"), invalid_rows="drop"))
    texts = [group.completions for group in again]
    assert again.text_format == "chat"
    said = [row["completion"] for row in rows]
    is_text = lambda message: message["content"].strip() and "\0" not in message["content"]
    assert texts == [(messages,) for messages in said if is_text(messages[0])]


def test_an_exported_model_names_every_end_token(place, tmp_path):
    model = open_model(ModelConfig(str(place / "base"), dtype="float32"), mesh())
    tokenizer = model.tokenizer
    ends = [*tokenizer.convert_tokens_to_ids(["</s>", "<|im_end|>"]), 3, 5]
    assert model.end_ids == ends
    weights.save_pretrained(
        tmp_path / "out",
        model.arch,
        model.load(),
        head="lm",
        tokenizer=tokenizer,
        end_ids=model.end_ids,
    )
    exported = open_model(ModelConfig(str(tmp_path / "out"), dtype="float32"), mesh())
    assert exported.end_ids == ends and exported.config["eos_token_id"] == ends
    assert exported.tokenizer.chat_template == tokenizer.chat_template


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("[1]", "wanted a JSON object"),
        ("{", "wanted JSON, got"),
        ('{"eos_token_id": [1, 9999]}', "eos_token_id: wanted ids below vocab_size"),
        ('{"eos_token_id": "</s>"}', "eos_token_id: wanted ids below vocab_size"),
    ],
)
def test_a_generation_config_that_cannot_be_meant_is_named(place, content, text, tmp_path):
    model = open_model(ModelConfig(str(place / "base"), dtype="float32"), mesh())
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(InputError, match=rf"{tmp_path}/generation_config.json: {text}"):
        _ = replace(model, folder=tmp_path).end_ids
