"""The seam from outside: a model that is no Llama trains under every loss, and what a study varies
in a loss compiles nothing.
"""

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from copg_jax import (
    GroupBatch,
    copg_loss,
    create_state,
    losses,
    make_bradley_terry_loss,
    make_nll_loss,
    make_policy_loss,
    make_train_step,
)
from copg_jax.config.load import load_config
from copg_jax.config.sections import POLICY_LOSSES, LossConfig, OptimConfig
from copg_jax.config.stages import PolicyConfig
from copg_jax.objective import find_objective
from copg_jax.train.optim import make_optimizer
from experiments import train_policy
from tests.toys import leaves, names_all
from tests.workplace import Workplace

REPOSITORY = Path(__file__).parents[1]


def present(batch: GroupBatch) -> jax.Array:
    """Marks the tokens of completions; [B, K, C]."""
    index = jnp.arange(batch.completion_tokens.shape[-1])[None, None, :]
    return index < batch.completion_length[..., None]


def seq_logp(params: Any, batch: GroupBatch) -> jax.Array:
    """A bag of tokens: their distribution depends on the first token of the prompt."""
    logits = jnp.take(params["w"], batch.prompt_tokens[:, 0], axis=0)  # [B, V]
    logp = jax.nn.log_softmax(logits)[:, None, None, :]
    logp = jnp.broadcast_to(logp, (*batch.completion_tokens.shape, 8))
    token = jnp.take_along_axis(logp, batch.completion_tokens[..., None], -1)[..., 0]
    return jnp.where(present(batch), token, 0).sum(-1)


def count_tokens(params: Any, batch: GroupBatch) -> jax.Array:
    """A reward model: the sum of a value of each token."""
    return jnp.where(present(batch), jnp.take(params["w"][0], batch.completion_tokens), 0).sum(-1)


def squared_residual(
    log_ratio: jax.Array, reward: jax.Array, *, beta: Any, offset: Any = 0.0, mask: Any = None
) -> jax.Array:
    """A loss of a user, a plain function: (ΔR − βΔ + offset)² of the first two completions."""
    gap = lambda x: x[:, 0] - x[:, 1]
    return (gap(reward) - beta * gap(log_ratio) + offset) ** 2


def params() -> dict[str, jax.Array]:
    """Every token is equally likely."""
    return {"w": jnp.zeros((8, 8))}


BATCH = GroupBatch(
    prompt_tokens=jnp.arange(4)[:, None],
    prompt_length=jnp.ones(4, int),
    completion_tokens=jnp.tile(jnp.array([[[1, 2], [3, 4]]]), (4, 1, 1)),
    completion_length=jnp.full((4, 2), 2),
    reward=jnp.tile(jnp.array([[1.0, 0.0]]), (4, 1)),
    ref_logp=jnp.full((4, 2), -2 * jnp.log(8.0)),
    mu_logp=jnp.full((4, 2), -2 * jnp.log(8.0)),
)


def train(loss_fn: Any, num_steps: int, **numbers: float) -> tuple[Any, list[dict[str, Any]]]:
    """Trains on one device without a mesh; the last state and the metrics of each step."""
    optimizer, trace = optax.adam(1e-2), []
    step, state = make_train_step(loss_fn, optimizer), create_state(optimizer, params())
    for _ in range(num_steps):
        state, metrics = step(state, BATCH, **numbers)
        trace.append(jax.device_get(metrics))
    return state, trace


ARGUMENTS = {"pg": {"baseline": 0.5}, "asymre": {"delta_v": -0.1}, "topr": {"baseline": 0.5}}
CONFIGS = {name: LossConfig(name, arguments=ARGUMENTS.get(name, {})) for name in POLICY_LOSSES}
OBJECTIVES = {name: find_objective(config) for name, config in CONFIGS.items()}


@pytest.mark.parametrize("name", [*OBJECTIVES, "squared_residual"])
def test_a_model_that_is_no_llama_trains_under_every_policy_loss(name):
    objective = OBJECTIVES.get(name, squared_residual)
    numbers = {"beta": 0.5, **ARGUMENTS.get(name, {})}
    _, trace = train(make_policy_loss(seq_logp, objective), 300, **numbers)
    assert trace[0]["rewards/margins"] == 0 and trace[-1]["rewards/margins"] > 0.2
    if name not in ("pg", "rloo", "asymre", "topr"):  # surrogates, whose value means nothing
        assert trace[-1]["loss"] < trace[0]["loss"] - 0.1
    # These know the size of a reward gap and end where βΔ is that gap.
    if name in ("copg", "rloo", "squared_residual"):
        assert trace[0]["copg/residual"] == 1
        assert abs(trace[-1]["copg/residual"]) < 1e-3


def test_a_model_that_is_no_llama_is_fine_tuned():
    _, trace = train(make_nll_loss(seq_logp), 200)
    assert trace[0]["loss"] == pytest.approx(np.log(8))
    # All completions together have four tokens, each as often.
    assert np.log(4) - 1e-3 < trace[-1]["loss"] < np.log(4) + 0.2


def test_a_reward_model_that_is_no_llama_trains():
    _, trace = train(make_bradley_terry_loss(count_tokens), 200)
    assert trace[0]["loss"] == pytest.approx(np.log(2))
    assert trace[-1]["loss"] < 0.1 and trace[-1]["rewards/accuracies"] == 1


def test_the_parameters_of_the_caller_are_alive_after_training():
    optimizer, mine = optax.adam(1e-2), params()
    step = make_train_step(make_policy_loss(seq_logp, copg_loss), optimizer)
    first = create_state(optimizer, mine)
    state, _ = step(first, BATCH, beta=0.5)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(first))
    np.testing.assert_array_equal(mine["w"], leaves(params())[0])
    assert np.abs(state.params["w"]).max() > 1e-3


class Compiled(logging.Handler):
    """Which compilations of a train step were done, and which found in the persistent cache."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if "train_step" in text:
            for name, mark in (("hit", "cache hit for"), ("miss", "CACHE MISS for")):
                self.found += [name] * (mark in text)


@contextmanager
def compilations() -> Iterator[list[str]]:
    """The hits and misses of a train step in the cache, while it is open."""
    logger, handler = logging.getLogger("jax._src.compiler"), Compiled()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        yield handler.found
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


@pytest.fixture
def empty_cache(tmp_path) -> Iterator[None]:
    """A persistent cache of the test's own that keeps every compilation."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path / "xla"),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for values in (settings, before):
        for name, value in values.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        if values is settings:
            yield


def test_two_betas_two_baselines_and_two_learning_rates_share_one_compilation(empty_cache):
    optimizer = optax.chain(optax.scale_by_adam(), scale_by_given_rate())
    step = make_train_step(make_policy_loss(seq_logp, losses.pg_loss), optimizer)
    moved = []
    with compilations() as found:
        for beta, baseline, rate in ((0.5, 0.2, 0.1), (0.1, 0.2, 0.1), (0.1, 0.7, 0.3)):
            state = create_state(optimizer, params())
            for _ in range(2):
                state, metrics = step(
                    state, BATCH, beta=beta, baseline=baseline, learning_rate=rate
                )
            assert metrics["optim/learning_rate"] == np.float32(rate)
            moved.append(leaves(state.params)[0])
    assert found == ["miss"] and step._cache_size() == 1
    # And yet each number does something.
    assert np.abs(moved[0] - moved[1]).max() > 1e-4
    assert np.abs(moved[1] - moved[2]).max() > 1e-2


def scale_by_given_rate() -> optax.GradientTransformationExtraArgs:
    """A user's own transform that takes the learning rate with every update."""

    def update(updates: Any, state: Any, params: Any = None, *, learning_rate: Any, **_: Any):
        return jax.tree.map(lambda x: -learning_rate * x, updates), state

    return optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)


PROCESS = """
import sys
import jax
from copg_jax import create_state, losses, make_policy_loss, make_train_step
from copg_jax.config.sections import OptimConfig
from copg_jax.train.optim import learning_rate, make_optimizer
from tests.test_seam import BATCH, params, seq_logp

counts = dict.fromkeys(("hits", "misses"), 0)
def count(event, **_):
    for name in counts:
        counts[name] += event == f"/jax/compilation_cache/cache_{name}"
jax.monitoring.register_event_listener(count)
beta, baseline, peak, num_steps = map(float, sys.argv[1:])
config = OptimConfig(learning_rate=peak, decay="cosine")
optimizer = make_optimizer(config)
step = make_train_step(make_policy_loss(seq_logp, losses.pg_loss), optimizer)
state = create_state(optimizer, params())
for at in range(int(num_steps)):
    rate = learning_rate(config, int(num_steps), at)
    state, metrics = step(state, BATCH, beta=beta, baseline=baseline, learning_rate=rate)
print(counts["hits"], counts["misses"])
"""


def test_a_second_process_with_other_numbers_finds_every_compilation_in_the_cache(tmp_path):
    environment = os.environ | {
        "PYTHONPATH": str(REPOSITORY),
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "xla"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }

    def counts(*numbers: str) -> list[int]:
        answer = subprocess.run(
            [sys.executable, "-c", PROCESS, *numbers],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
        )
        return list(map(int, answer.stdout.split()))

    _, first_misses = counts("0.5", "0.0", "1e-3", "3")
    hits, misses = counts("0.1", "0.7", "1e-2", "5")
    assert first_misses > 0
    assert hits > 0 and misses == 0


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Workplace:
    """A scored folder of a base model."""
    place = Workplace(tmp_path_factory.mktemp("seam"))
    base = f"reference.path={place.folder / 'base'}"
    place.run("score", base, "rewards=[{function: copg_jax.rewards.length}]")
    return place


def policy_config(place: Workplace, name: str, *more: str) -> PolicyConfig:
    """Config of a policy run without an evaluation, into a folder of this name."""
    own = [text for text in place.arguments("policy") if not text.startswith("evaluation.")]
    folders = [f"model.path={place.folder / 'base'}", f"output_dir={place.folder / name}"]
    return load_config(PolicyConfig, [*own, *folders, *more])


def test_policy_runs_that_differ_in_numbers_only_compile_the_step_once(workplace, empty_cache):
    mine = f"loss.name={__name__}.squared_residual"
    runs = {
        "first": ["loss.beta=0.1"],
        "other beta, rate and length": [
            "loss.beta=0.5",
            "optim.learning_rate=1e-3",
            "optim.warmup_fraction=0.5",
            "training.max_steps=2",
        ],
        "a user's loss": [mine, "loss.arguments={offset: 0.0}"],
        "its other number": [mine, "loss.arguments={offset: 2.0}", "loss.beta=0.3"],
    }
    found: dict[str, list[str]] = {}
    for name, more in runs.items():
        with compilations() as found[name]:
            train_policy.main(policy_config(workplace, name, *more))
    assert list(found.values()) == [["miss"], ["hit"], ["miss"], ["hit"]]
    # The user's losses are those of its numbers: (ΔR + offset)² where the policy is π_ref.
    plain, offset = (
        next(row for row in workplace.metrics(name) if "loss" in row)["loss"]
        for name in ("a user's loss", "its other number")
    )
    assert plain > 0 and abs(offset - plain) > 0.1
    for name in runs:
        assert (workplace.folder / name / "model" / "config.json").exists()


@pytest.mark.parametrize(
    ("more", "parts"),
    [
        (["loss.arguments={ofset: 1.0}"], ["loss.arguments", "'ofset'", "it takes beta, offset."]),
        (["loss.arguments={offset: high}"], ["loss.arguments", "high"]),
        (["loss.arguments={beta: 1.0}"], ["loss.arguments", "loss.beta"]),
    ],
    ids=str,
)
def test_numbers_that_a_user_s_loss_does_not_take_are_refused(workplace, more, parts):
    text = workplace.refusal("policy", f"loss.name={__name__}.squared_residual", *more)
    names_all(text, parts)
    assert not (workplace.folder / "policy").exists()


def test_a_learning_rate_that_the_optimizer_would_ignore_or_lacks_is_refused():
    loss_fn = make_policy_loss(seq_logp, copg_loss)
    step = make_train_step(loss_fn, optax.adam(1e-2))
    with pytest.raises(TypeError, match="has its own and would ignore another"):
        step(create_state(optax.adam(1e-2), params()), BATCH, beta=0.5, learning_rate=1.0)
    ours = make_optimizer(OptimConfig())
    with pytest.raises(TypeError, match=r"step\(\.\.\., learning_rate=1e-6\)"):
        make_train_step(loss_fn, ours)(create_state(ours, params()), BATCH, beta=0.5)


@pytest.mark.parametrize(
    "wrapped",
    [
        make_policy_loss(seq_logp, partial(losses.dpo_loss)),
        make_policy_loss(seq_logp, lambda *a, **k: losses.dpo_loss(*a, **k), losses.has_preference),
    ],
    ids=["partial", "counts given"],
)
def test_a_wrapped_preference_loss_leaves_ties_out_as_the_loss_itself(wrapped):
    tied = BATCH._replace(reward=BATCH.reward.at[:2].set(1.0))
    loss = make_policy_loss(seq_logp, losses.dpo_loss)
    got, wanted = (fn(params(), tied, 0.5) for fn in (wrapped, loss))
    assert float(got.weight) == float(wanted.weight) == 2.0
    assert float(got.total) == float(wanted.total)


def test_a_batch_that_microbatches_do_not_divide_is_refused_with_both_numbers():
    step = make_train_step(
        make_policy_loss(seq_logp, copg_loss), optax.adam(1e-2), num_microbatches=3
    )
    with pytest.raises(ValueError, match="4 groups or bins cannot be cut into 1 x 3 pieces"):
        step(create_state(optax.adam(1e-2), params()), BATCH, beta=0.5)
