"""The seam: losses made of a function of (params, batch) and an objective, and their metrics."""

import sys
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from copg_jax import losses, objective, relatives
from copg_jax.config.sections import POLICY_LOSSES, LossConfig
from copg_jax.errors import InputError
from copg_jax.objective import find_coefficients, find_objective
from tests.toys import group_batch, names_all


def look_up(params: Any, batch: Any) -> jax.Array:
    """A model whose ln π of each completion, or score, is a parameter."""
    return params["logp"]


def policy_loss(name: str) -> objective.LossFn:
    """The loss of this name, of the model above."""
    config = LossConfig(name, arguments=ARGUMENTS.get(name, {}))
    return objective.make_policy_loss(look_up, find_objective(config))


TIED = group_batch([[1.0, 1.0], [2.0, 0.5], [3.0, 3.0], [0.0, 1.0]])
LOGP = {"logp": jnp.array([[-1.0, -2.0], [-1.5, -1.0], [-3.0, -2.5], [-0.5, -2.0]])}
ARGUMENTS = {"pg": {"baseline": 0.3}, "asymre": {"delta_v": -0.1}, "topr": {"baseline": 0.0}}
NUMBERS = {name: {"beta": 0.5, **ARGUMENTS.get(name, {})} for name in POLICY_LOSSES}


@pytest.mark.parametrize(
    ("name", "counted"), [("dpo", 2), ("ipo", 2), ("copg", 4), ("rloo", 4), ("pg", 4)]
)
def test_groups_of_ties_leave_the_average_of_order_losses_only(name, counted):
    output = jax.jit(policy_loss(name))(LOGP, TIED, **NUMBERS[name])
    assert output.weight == counted
    total, weight = output.metrics["loss"]
    np.testing.assert_allclose(total, output.per_group.sum(), rtol=1e-6)
    np.testing.assert_allclose(output.total, total, rtol=1e-6)
    assert weight == counted
    # CoPG learns from a tie that both log-ratios should be equal; DPO and IPO learn nothing.
    assert bool(output.per_group[0] == 0) == (name in ("dpo", "ipo"))


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_a_lone_completion_is_left_out_of_the_average(name):
    batch = group_batch([[1.0, 0.0], [2.0, 0.5]], length=[[3, 0], [1, 4]])
    output = policy_loss(name)({"logp": LOGP["logp"][:2]}, batch, **NUMBERS[name])
    assert output.weight == 1
    assert output.total == output.per_group[1] != 0


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_absent_groups_and_completions_change_neither_loss_nor_gradient_nor_metrics(name):
    loss_fn = policy_loss(name)

    def with_output(params: Any, batch: Any) -> Any:
        output = loss_fn(params, batch, **NUMBERS[name])
        return output.total, output

    value_and_grad = jax.jit(jax.value_and_grad(with_output, has_aux=True))
    filled = TIED._replace(
        completion_length=np.pad(np.maximum(TIED.completion_length, 1), ((0, 2), (0, 1))),
        reward=np.pad(TIED.reward, ((0, 2), (0, 1)), constant_values=np.nan),
        ref_logp=np.pad(TIED.ref_logp, ((0, 2), (0, 1)), constant_values=np.nan),
        mu_logp=np.pad(TIED.mu_logp, ((0, 2), (0, 1)), constant_values=np.nan),
    )
    padded = {"logp": jnp.pad(LOGP["logp"], ((0, 2), (0, 1)), constant_values=jnp.nan)}
    (total, output), grads = value_and_grad(LOGP, TIED)
    (filled_total, filled_output), filled_grads = value_and_grad(padded, filled)
    np.testing.assert_allclose(filled_total, total, rtol=1e-6)
    np.testing.assert_allclose(filled_grads["logp"][:4, :2], grads["logp"], rtol=1e-6)
    assert np.abs(grads["logp"]).max() > 1e-2
    assert not filled_grads["logp"][4:].any() and not filled_grads["logp"][:, 2].any()
    assert filled_output.weight == output.weight
    for key, (value, weight) in output.metrics.items():
        np.testing.assert_allclose(
            filled_output.metrics[key], (value, weight), rtol=1e-6, err_msg=key
        )


def test_a_policy_loss_sees_log_ratios_rewards_and_which_completions_are_present():
    seen: dict[str, Any] = {}

    def mine(log_ratio: Any, reward: Any, **others: Any) -> jax.Array:
        seen.update(log_ratio=log_ratio, reward=reward, **others)
        return jnp.array([7.0, 8.0])

    batch = group_batch(
        [[1.0, 2.0], [3.0, 4.0]], length=[[1, 2], [3, 0]], ref_logp=[[-5.0, -6.0], [-7.0, -8.0]]
    )
    logp = {"logp": jnp.array([[-1.0, -2.0], [-3.0, -4.0]])}
    output = objective.make_policy_loss(look_up, mine)(logp, batch, beta=0.5, mine=3.0)
    np.testing.assert_array_equal(seen["log_ratio"], [[4.0, 4.0], [4.0, 0.0]])
    np.testing.assert_array_equal(seen["reward"], batch.reward)
    np.testing.assert_array_equal(seen["mask"], [[True, True], [True, False]])
    assert (seen["beta"], seen["mine"]) == (0.5, 3.0)
    # It says nothing of what counts: groups of two or more do.
    assert (float(output.total), float(output.weight)) == (7.0, 1.0)


def test_policy_metrics_are_those_of_the_best_and_the_worst_completion():
    logp = jnp.array([[-3.0, -1.0, -9.0], [-2.0, -4.0, 0.0], [-1.0, -1.0, -1.0]])
    ratio = jnp.array([[0.5, -0.5, 9.0], [1.0, 2.0, 0.0], [0.0, 1.0, 7.0]])
    reward = jnp.array([[2.0, 0.0, 50.0], [1.0, 4.0, 2.0], [1.0, 1.0, 1.0]])
    mask = jnp.array([[True, True, False], [True, True, True], [True, True, False]])
    sums = objective.policy_metrics(logp, ratio, reward, mask, beta=0.5)
    got = {name: float(total / weight) for name, (total, weight) in sums.items()}
    # Gaps of reward 2, 3, 0 and of log-ratio 1, 1, 0 (a tie: best and worst are the same one).
    assert got == pytest.approx(
        {
            "rewards/chosen": 0.5 * (0.5 + 2.0 + 0.0) / 3,
            "rewards/rejected": 0.5 * (-0.5 + 1.0 + 0.0) / 3,
            "rewards/margins": 0.5 * (1.0 + 1.0) / 2,
            "rewards/accuracies": 1.0,
            "logps/chosen": (-3.0 - 4.0 - 1.0) / 3,
            "logps/rejected": (-1.0 - 2.0 - 1.0) / 3,
            "copg/residual": (1.5 + 2.5 + 0.0) / 3,
            "copg/reward_r2": 1 - (1.5**2 + 2.5**2) / (2.0**2 + 3.0**2),
            "data/ties": 1 / 3,
            "data/reward": (2.0 + 0.0 + 1.0 + 4.0 + 2.0 + 1.0 + 1.0) / 7,
        }
    )


def test_the_residual_vanishes_and_r2_is_one_at_the_optimum():
    reward = jnp.array([[2.0, 0.0], [1.0, 4.0]])
    mask = jnp.ones((2, 2), bool)
    sums = objective.policy_metrics(reward, reward / 0.25, reward, mask, beta=0.25)
    assert float(sums["copg/residual"][0]) == pytest.approx(0)
    assert float(sums["copg/reward_r2"][0] / sums["copg/reward_r2"][1]) == pytest.approx(1)


def test_the_sft_loss_is_the_mean_over_completion_tokens():
    batch = group_batch(np.zeros((2, 1)), length=[[4], [1]])
    logp = {"logp": jnp.array([[-8.0], [-1.0]])}
    loss_fn = objective.make_nll_loss(look_up)
    output = loss_fn(logp, batch)
    assert (float(output.total), float(output.weight)) == (9.0, 5.0)
    longer = batch._replace(prompt_length=batch.prompt_length + 100)
    assert loss_fn(logp, longer).weight == 5.0


def test_the_bradley_terry_loss_and_its_metrics_are_those_of_preferred_pairs():
    # Gaps of preferred pairs: 2 of the first group, -1 of the second; the third is a tie.
    # The preferred one is the longer one in the first, and as long as the other in the second.
    batch = group_batch(
        [[1.0, 0.0, 9.0], [0.0, 1.0, 9.0], [1.0, 1.0, 9.0]], [[3, 2, 0], [2, 2, 0], [1, 2, 0]]
    )
    scores = {"logp": jnp.array([[3.0, 1.0, 5.0], [2.0, 1.0, 5.0], [4.0, 1.0, 5.0]])}
    output = objective.make_bradley_terry_loss(look_up)(scores, batch)
    got = {name: float(total / weight) for name, (total, weight) in output.metrics.items()}
    assert got == pytest.approx(
        {
            "loss": (np.log1p(np.exp(-2)) + np.log1p(np.exp(1))) / 2,
            "rewards/accuracies": 0.5,
            "data/longer_accuracies": (1 + 0.5) / 2,
            "rewards/margins": 0.5,
            "rewards/mean": 2.0,
        }
    )
    assert output.weight == 2


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_a_short_name_is_the_loss_of_that_name(name):
    home = relatives if name in ("opmd", "oapl", "asymre", "topr") else losses
    config = LossConfig(name, arguments=ARGUMENTS.get(name, {}))
    assert find_objective(config) is getattr(home, f"{name}_loss")


def mine(
    log_ratio: Any, reward: Any, *, beta: Any, margin: Any, scale: Any = 1.0, mask: Any = None
) -> jax.Array:
    """A loss of a user."""
    return scale * losses.ipo_loss(log_ratio, reward - margin, beta=beta, mask=mask)


def takes_any(log_ratio: Any, reward: Any, **numbers: Any) -> jax.Array:
    """A loss that takes whatever number it is given."""
    return losses.copg_loss(log_ratio, reward, beta=numbers["beta"], mask=numbers["mask"])


def takes_no_mask(log_ratio: Any, reward: Any, *, beta: Any) -> jax.Array:
    """Not a loss: it cannot know which completions are absent."""
    return losses.copg_loss(log_ratio, reward, beta=beta)


NOT_CALLABLE = 3


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("mine", {"margin": 1.0}), ("mine", {"margin": 1.0, "scale": 2.0}), ("takes_any", {"x": 1.0})],
)
def test_a_dotted_path_is_the_function_behind_it_and_its_numbers_are_those_of_the_config(
    name, arguments
):
    config = LossConfig(f"{__name__}.{name}", beta=0.25, arguments=arguments)
    assert find_objective(config) is globals()[name]
    assert find_coefficients(config) == {"beta": 0.25, **arguments}


def test_a_first_beta_goes_to_the_last_by_equal_factors():
    config = LossConfig("copg", beta=0.01, first_beta=1.0)
    found = [find_coefficients(config, done)["beta"] for done in (0.0, 0.25, 0.5, 1.0)]
    assert found == pytest.approx([1.0, 10**-0.5, 0.1, 0.01], rel=1e-12)
    plain = LossConfig("copg", beta=0.3)
    assert {find_coefficients(plain, done / 7)["beta"] for done in range(8)} == {0.3}


@pytest.mark.parametrize(
    ("name", "arguments", "parts"),
    [
        ("copg", {"baseline": 1.0}, ["copg", "baseline", "it takes beta."]),
        ("pg", {"base": 1.0}, ["pg", "'base'", "it takes beta, baseline."]),
        (f"{__name__}.mine", {}, ["mine", "missing", "'margin'", "beta, margin, scale."]),
        (f"{__name__}.mine", {"margn": 1.0}, ["mine", "'margin'", "beta, margin, scale."]),
        (f"{__name__}.mine", {"margin": 1.0, "gain": 1.0}, ["mine", "'gain'", "margin, scale."]),
        (f"{__name__}.takes_no_mask", {}, ["takes_no_mask", "'mask'", "it takes beta."]),
    ],
)
def test_numbers_that_do_not_fit_a_loss_are_refused_with_those_it_takes(name, arguments, parts):
    with pytest.raises(InputError) as caught:
        find_objective(LossConfig(name, arguments=arguments))
    names_all(str(caught.value), ["loss.arguments", *parts])


@pytest.mark.parametrize(
    ("path", "parts"),
    [
        ("no_such_module.my_loss", ["no_such_module", "my_module.my_loss", "PYTHONPATH"]),
        ("copg_jax.losses.cpg_loss", ["has no attribute 'cpg_loss'", "my_module.my_loss"]),
        (f"{__name__}.NOT_CALLABLE", ["is not a function", "int"]),
    ],
)
def test_a_path_that_leads_to_no_function_is_refused_with_the_form_of_one_that_does(path, parts):
    with pytest.raises(InputError) as caught:
        find_objective(LossConfig(path))
    names_all(str(caught.value), ["loss.name", repr(path), *parts])


def test_an_error_inside_a_user_s_module_is_named_with_its_line(tmp_path, monkeypatch):
    (tmp_path / "broken_losses.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError) as caught:
        find_objective(LossConfig("broken_losses.mine"))
    names_all(str(caught.value), ["broken_losses.mine", "ZeroDivisionError", "broken_losses.py:1"])


def test_functions_without_a_signature_are_refused(monkeypatch):
    module = ModuleType("without_signature")
    module.my_loss = min  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "without_signature", module)
    with pytest.raises(InputError, match="signature"):
        find_objective(LossConfig("without_signature.my_loss"))


def test_a_loss_that_takes_origins_is_given_those_of_the_batch():
    cross = find_objective(LossConfig(pairs="cross"))
    assert cross is losses.cross_copg_loss
    loss_fn = objective.make_policy_loss(look_up, cross)
    batch = TIED._replace(origin=np.array([[0, 1], [1, 1], [1, 0], [0, 0]], np.int8))
    output = jax.jit(loss_fn)(LOGP, batch, beta=0.5)
    both = policy_loss("copg")(LOGP, batch, beta=0.5)
    assert output.weight == 2
    np.testing.assert_allclose(output.per_group[0::2], both.per_group[0::2], rtol=1e-5)
    assert not output.per_group[1::2].any()


def test_a_loss_that_takes_the_policy_that_wrote_is_given_it_against_the_reference():
    mu_logp, ref_logp = np.full((4, 2), -1.25, np.float32), np.full((4, 2), -0.5, np.float32)
    batch = TIED._replace(mu_logp=mu_logp, ref_logp=ref_logp, reward=TIED.reward - 2)
    output = jax.jit(policy_loss("topr"))(LOGP, batch, beta=0.5, baseline=0.0)
    numbers = {"beta": 0.5, "baseline": 0.0, "mu_log_ratio": jnp.full((4, 2), -0.75)}
    wanted = relatives.topr_loss(LOGP["logp"] + 0.5, batch.reward, **numbers)
    np.testing.assert_allclose(output.per_group, wanted, rtol=1e-5)
    other = relatives.topr_loss(LOGP["logp"] + 0.5, batch.reward, **numbers | {
        "mu_log_ratio": jnp.full((4, 2), -1.25)})  # fmt: skip
    assert np.abs(output.per_group - other).max() > 1e-2
    with pytest.raises(InputError, match=r"GroupBatch\.mu_logp: wanted \[B, K\].*mu_log_ratio"):
        policy_loss("topr")(LOGP, batch._replace(mu_logp=None), beta=0.5, baseline=0.0)


@pytest.mark.parametrize("name", ["rloo", "dpo", "my.loss"])
def test_pairs_across_origins_are_of_copg_alone(name):
    with pytest.raises(InputError, match=r"pairs=cross is for name=copg"):
        LossConfig(name, pairs="cross")
