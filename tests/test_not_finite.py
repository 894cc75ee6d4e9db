"""A number of one of our models that is NaN or infinite is an error that names the model and the
text, never a reward that is missing.
"""

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from copg_jax import checksums
from copg_jax.config.load import load_config
from copg_jax.config.sections import MeshConfig, ModelConfig, TrainingConfig
from copg_jax.config.stages import EvaluateConfig, PolicyConfig, ScoreConfig, SFTConfig
from copg_jax.data.tokenizer import load_tokenizer
from copg_jax.errors import InputError
from copg_jax.hf.pretrained import open_model
from copg_jax.hf.weights import save_pretrained
from copg_jax.models.params import init_params
from copg_jax.sharding import make_mesh
from copg_jax.tracking import MetricsLogger
from copg_jax.train.loop import EvaluationHook
from copg_jax.train.state import TrainState
from experiments import evaluate, score, train_policy, train_sft
from experiments.generated import write_generated
from tests.toys import LLAMA, names_all

ROWS = [{"prompt": f"Name a thing, {i}.", "completions": ["red", "dark blue"]} for i in range(8)]
PAIRS = [{"prompt": row["prompt"], "completion": row["completions"][1]} for row in ROWS]
Change = Callable[[Any], Any]


def with_nan(params: Any) -> Any:
    """One weight is NaN."""
    return params | {"embed_tokens": params["embed_tokens"].at[5, 3].set(jnp.nan)}


def with_infinity(params: Any) -> Any:
    """One weight is infinite."""
    return params | {"norm": params["norm"].at[0].set(-jnp.inf)}


def too_large(params: Any) -> Any:
    """Finite weights whose products are not."""
    sizes = {"embed_tokens": 1e12, "norm": 1e32, "score": 1e12}
    return {name: x * sizes[name] if name in sizes else x for name, x in params.items()}


class Models:
    """Tiny models that differ by a change of their weights, and data."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        write_generated(folder / "data", num_examples=20, num_comparisons=2, seed=0, vocab_size=300)
        self.tokenizer = load_tokenizer(folder / "data" / "tokenizer")
        for name, rows in (("rows", ROWS), ("pairs", PAIRS)):
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / f"{name}.jsonl").write_text(text)

    def make(self, change: Change | None = None, head: str = "lm") -> Path:
        """The folder of a model; made once."""
        folder = self.folder / f"{change.__name__ if change else 'good'}-{head}"
        if not folder.exists():
            arch = replace(LLAMA, vocab_size=len(self.tokenizer), tie_word_embeddings=True)
            params = init_params(arch, jax.random.key(0), head=head)
            params = change(params) if change else params
            save_pretrained(folder, arch, params, head=head, tokenizer=self.tokenizer)
        return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Models:
    """One folder of them."""
    return Models(tmp_path_factory.mktemp("models"))


def run(stage: Any, cls: type, output: Path, *arguments: str) -> Any:
    """Runs a stage."""
    return stage.main(load_config(cls, [*arguments, f"output_dir={output}"]))


def reward_model(folder: Path) -> str:
    """As an item of `rewards`."""
    return f"{{function: copg_jax.rewards.RewardModel, arguments: {{path: {folder}}}}}"


LENGTH = "{function: copg_jax.rewards.length}"


def evaluation(models: Models, model: Path, *more: str) -> list[str]:
    """Arguments of an evaluation of two prompts."""
    return [
        f"model.path={model}",
        "model.dtype=float32",
        f"evaluation.data.path={models.folder / 'pairs.jsonl'}",
        "evaluation.generation.num_prompts=2",
        "evaluation.generation.max_new_tokens=4",
        f"evaluation.rewards=[{LENGTH}]",
        *more,
    ]


def scoring(models: Models, reference: Path, reward: str = LENGTH) -> list[str]:
    """Arguments of a scoring of all rows."""
    data = f"data.path={models.folder / 'rows.jsonl'}"
    return [f"reference.path={reference}", "reference.dtype=float32", data, f"rewards=[{reward}]"]


@pytest.mark.parametrize("change", [with_nan, with_infinity])
@pytest.mark.parametrize("part", ["reference", "reward model", "policy", "its reference", "start"])
def test_weights_that_are_not_finite_are_refused_with_their_folder(part, change, models, tmp_path):
    good = models.make()
    bad = models.make(change, "score" if part == "reward model" else "lm")
    with pytest.raises(InputError) as caught:
        if part == "reference":
            run(score, ScoreConfig, tmp_path, *scoring(models, bad))
        elif part == "reward model":
            run(score, ScoreConfig, tmp_path, *scoring(models, good, reward_model(bad)))
        elif part == "policy":
            run(evaluate, EvaluateConfig, tmp_path, *evaluation(models, bad))
        elif part == "its reference":
            more = [f"reference.path={bad}", "reference.dtype=float32"]
            run(evaluate, EvaluateConfig, tmp_path, *evaluation(models, good, *more))
        else:
            data = [f"data.path={models.folder / 'pairs.jsonl'}", "training.batch_size=8"]
            run(train_sft, SFTConfig, tmp_path, f"model.path={bad}", "model.dtype=float32", *data)
    leaf = {"with_nan": "embed_tokens", "with_infinity": "norm"}[change.__name__]
    names_all(str(caught.value), [str(bad), "finite weights", f"in {leaf}."])
    assert not list(tmp_path.glob("*.parquet")) and not (tmp_path / "evaluation.json").exists()


def test_a_reference_that_overflows_is_named_with_the_row_and_the_completion(models, tmp_path):
    bad = models.make(too_large)
    with pytest.raises(InputError) as caught:
        run(score, ScoreConfig, tmp_path, *scoring(models, bad))
    message = str(caught.value).replace("' red'", "'red'")
    names_all(message, [f"reference {bad}", "rows.jsonl:1:", "completion 'red'", "float32"])
    assert "got nan" in message or "got -inf" in message  # as the order of the sums decides
    assert not list(tmp_path.glob("*.parquet"))


def test_a_reward_model_that_overflows_is_no_missing_reward(models, tmp_path):
    bad = models.make(too_large, "score")
    with pytest.raises(InputError) as caught:
        run(score, ScoreConfig, tmp_path, *scoring(models, models.make(), reward_model(bad)))
    names_all(str(caught.value), [f"reward model {bad}", "prompt 'Name a thing", "finite number"])
    assert not list(tmp_path.glob("*.parquet"))


@pytest.mark.parametrize("temperature", [0, 1])
def test_an_evaluation_of_a_policy_that_overflows_gives_no_numbers(temperature, models, tmp_path):
    bad = models.make(too_large)
    more = f"evaluation.generation.sampling_temperature={temperature}"
    with pytest.raises(InputError) as caught:
        run(evaluate, EvaluateConfig, tmp_path, *evaluation(models, bad, more))
    names_all(str(caught.value), [f"policy {bad}", "pairs.jsonl:", "finite number"])
    assert not (tmp_path / "evaluation.json").exists()


def test_a_held_out_loss_that_is_not_finite_names_its_rows(models, tmp_path):
    bad, data = models.make(too_large), models.folder / "pairs.jsonl"
    with pytest.raises(InputError) as caught:
        run(
            train_sft,
            SFTConfig,
            tmp_path,
            f"model.path={bad}",
            "model.dtype=float32",
            f"data.path={data}",
            f"validation.path={data}",
            "training.batch_size=8",
            "training.remat=none",
        )
    names_all(str(caught.value), ["validation", "pairs.jsonl:3", "not finite"])


def no_reward(prompts: list[str], completions: list[str], **columns: Any) -> list[None]:
    """None for all."""
    return [None] * len(completions)


def some_rewards(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
    """None for the second prompt."""
    return [None if "1." in prompt else 1.0 for prompt in prompts]


def test_an_evaluation_without_any_reward_is_an_error_and_keeps_what_it_generated(models, tmp_path):
    more = f"evaluation.rewards=[{{function: {__name__}.no_reward}}]"
    with pytest.raises(InputError) as caught:
        run(evaluate, EvaluateConfig, tmp_path, *evaluation(models, models.make(), more))
    names_all(str(caught.value), ["not one of 2 generations has a reward", "None"])
    assert len((tmp_path / "generations.jsonl").read_text().split("\n")) == 3


def test_generations_without_a_reward_are_counted_in_the_log(models, tmp_path, capfd):
    more = f"evaluation.rewards=[{{function: {__name__}.some_rewards}}]"
    found = run(evaluate, EvaluateConfig, tmp_path, *evaluation(models, models.make(), more))
    assert found["eval/reward_mean"] == 1.0 and found["eval/dropped_rewards"] == 1
    assert "1 of 2 generations have no reward: left out" in capfd.readouterr().err


def test_a_tokenizer_with_an_id_beyond_the_embedding_is_refused(models, tmp_path):
    folder = tmp_path / "gap"
    arch = replace(LLAMA, vocab_size=len(models.tokenizer), tie_word_embeddings=True)
    params = init_params(arch, jax.random.key(0), head="score")
    save_pretrained(folder, arch, params, head="score", tokenizer=models.tokenizer)
    path = folder / "tokenizer.json"
    tokens = json.loads(path.read_text())
    vocab = tokens["model"]["vocab"]
    last = max(vocab, key=vocab.get)
    vocab[last] += 7  # as many tokens as before, with a gap
    path.write_text(json.dumps(tokens))
    (folder / checksums.NAME).unlink()  # changed on purpose
    with pytest.raises(InputError) as caught:
        open_model(ModelConfig(str(folder)), make_mesh(MeshConfig(1)), head="score")
    wanted = [str(folder), f"{arch.vocab_size + 7} ids", f"only {arch.vocab_size}"]
    names_all(str(caught.value), wanted)


@pytest.mark.parametrize(("value", "is_said"), [(np.nan, True), (0.5, False)])
def test_a_step_that_has_no_rank_is_said(value, is_said, tmp_path, caplog):
    with MetricsLogger(tmp_path, total_steps=3, quiet=True) as logger:
        found = lambda *_: ({"m": value}, {})
        hook = EvaluationHook(TrainingConfig(), 3, found, logger, "m")
        with caplog.at_level(logging.WARNING, "copg_jax"):
            hook(3, TrainState(step=3, params=None, opt_state=None, halted=False))
    assert ("step 3: no m, so that it cannot be the best" in caplog.text) == is_said


HUGE = [row | {"rewards": [1e38 * (1 + i % 3), -1e38]} for i, row in enumerate(ROWS)]


@pytest.mark.parametrize("loss", ["pg", "copg"])
def test_rewards_whose_sums_overflow_end_in_an_error_that_names_the_step(loss, models, tmp_path):
    (tmp_path / "huge.jsonl").write_text("".join(json.dumps(row) + "\n" for row in HUGE))
    good = models.make()
    arguments = [f"reference.path={good}", "reference.dtype=float32"]
    run(score, ScoreConfig, tmp_path / "s", *arguments, f"data.path={tmp_path / 'huge.jsonl'}")
    arguments = [f"model.path={good}", "model.dtype=float32", f"data.path={tmp_path / 's'}"]
    arguments += [f"loss.name={loss}", "training.batch_size=8", "training.remat=none"]
    with pytest.raises(InputError) as caught:
        run(train_policy, PolicyConfig, tmp_path / "p", *arguments)
    names_all(str(caught.value), ["step 1", "not finite", "rewards"])
    assert not (tmp_path / "p" / "model").exists()
