"""Evaluation by generation: averages by hand, fixed prompts and samples."""

import dataclasses
import math
import os
import signal
from contextlib import nullcontext
from functools import partial
from typing import Any

import jax
import numpy as np
import pytest
from etils import epath

import experiments.evaluate
from copg_jax.config.reward_spec import RewardSpec
from copg_jax.config.sections import GenerationConfig
from copg_jax.data.groups import TokenGroup
from copg_jax.errors import InputError
from copg_jax.evaluate import GenerationEvaluator, Generator
from copg_jax.models.forward import make_token_logp
from copg_jax.models.params import init_params
from copg_jax.rewards.functions import WeightedRewards
from copg_jax.runtime import GracefulExit, LeaveRequest
from copg_jax.sampling import Samples, make_sampler
from copg_jax.summary import Generation, in_prompt_order, summarize
from tests.toys import LLAMA, mesh

EOS = 3


def generation(prompt: str, reward: float, **numbers: Any) -> Generation:
    """A generation with small defaults."""
    values = {"logp": -4.0, "ref_logp": -5.0, "kl_k3": 0.5, "length": 4, "has_eos": True}
    values |= {"completion": "", "index": "ab".index(prompt), "rewards": {}} | numbers
    return Generation(id=prompt, prompt=prompt, reward=reward, **values)


def test_averages_are_those_by_hand_with_prompts_as_observations():
    named = [{"judge": value, "gold": -value} for value in (1.0, 3.0, 6.0, math.nan)]
    named[3]["gold"] = 0.0
    rows = [
        generation("a", 1.0, logp=-4.0, ref_logp=-6.0, kl_k3=0.5, length=2, rewards=named[0]),
        generation("a", 3.0, logp=-4.0, ref_logp=-4.0, kl_k3=0.1, length=4, rewards=named[1]),
        generation(
            "b", 6.0, logp=-4.0, ref_logp=-3.0, kl_k3=0.3, length=6, has_eos=False, rewards=named[2]
        ),
        generation("b", math.nan, logp=-4.0, ref_logp=-5.0, kl_k3=0.3, length=4, rewards=named[3]),
    ]
    # Means of the prompts are 2 and 6; their standard error is sqrt(8) / sqrt(2) = 2. Those of gold
    # are -2 and -3, with sqrt(1/2) / sqrt(2).
    assert summarize(rows, beta=0.5) == pytest.approx(
        {
            "eval/reward_mean": 4.0,
            "eval/reward_stderr": 2.0,
            "eval/kl": (2.0 + 0.0 - 1.0 + 1.0) / 4,
            "eval/kl_k3": 0.3,
            "eval/objective": 4.0 - 0.5 * 0.5,
            "eval/length": 4.0,
            "eval/eos_rate": 0.75,
            "eval/num_prompts": 2,
            "eval/dropped_rewards": 1,
            "eval/residual": (-2.0 - 0.5 * 2.0) ** 2,  # of a; b has one reward
            "eval/reward/judge": 4.0,
            "eval/reward_stderr/judge": 2.0,
            "eval/dropped_rewards/judge": 1,
            "eval/reward/gold": -2.5,
            "eval/reward_stderr/gold": 0.5,
            "eval/dropped_rewards/gold": 0,
        }
    )


def test_the_residual_is_that_of_the_gaps_and_0_where_they_are_those_of_the_optimum():
    def pair(scale: float) -> list[Generation]:
        ratios = [(r, scale * r / 0.5) for r in (1.0, 4.0)]  # ln π − ln π_ref = R / β + constant
        return [generation("a", r, logp=d - 3.0, ref_logp=-5.0) for r, d in ratios]

    found = [summarize(pair(scale), beta=0.5)["eval/residual"] for scale in (0.0, 0.5, 1.0, 2.0)]
    assert found == pytest.approx([9.0, 9.0 / 4, 0.0, 9.0], abs=1e-12)
    assert "eval/residual" not in summarize(pair(1.0)[:1], beta=0.5)
    equal = [generation("a", 1.0, logp=-x) for x in (1.0, 3.0)]
    assert summarize(equal, beta=0.5)["eval/residual"] == pytest.approx(1.0)  # (0 − 0.5 · 2)²


def test_nothing_known_gives_nan_and_no_warning():
    metrics = summarize([generation("a", math.nan, ref_logp=math.nan, kl_k3=math.nan)], beta=1.0)
    assert metrics["eval/dropped_rewards"] == 1
    assert all(
        math.isnan(metrics[f"eval/{name}"])
        for name in ("reward_mean", "reward_stderr", "kl", "kl_k3", "objective")
    )


def decode(ids: Any) -> str:
    """Stands in for a tokenizer: ids as words."""
    return " ".join(f"w{i}" for i in ids)


def count_words(
    prompts: list[str], completions: list[str], *, bonus: list[float | None], **columns: Any
) -> list[float | None]:
    """Number of words plus a column; None where the column is None."""
    return [
        None if extra is None else len(text.split()) + extra
        for text, extra in zip(completions, bonus, strict=True)
    ]


REWARDS = WeightedRewards([RewardSpec(f"{__name__}.count_words")])
PROMPTS = [
    TokenGroup(
        id=f"p{i}",
        where="",
        prompt=f"prompt {i}",
        prompt_tokens=np.arange(1, 2 + i, dtype=np.int32),
        completions=(),
        completion_tokens=(),
        columns={"bonus": None if i == 4 else 10.0 * i},
    )
    for i in range(5)
]
GENERATION = GenerationConfig(num_prompts=5, num_samples=3, max_new_tokens=6, batch_size=4)


def without_columns(prompts: list[str], completions: list[str]) -> list[float]:
    """Takes no column."""
    return [0.0] * len(completions)


def of_another_column(
    prompts: list[str], completions: list[str], *, absent: list[float], **columns: Any
) -> list[float]:
    """Wants a column that the prompts lack."""
    return absent


@pytest.mark.parametrize("name", ["without_columns", "of_another_column"])
def test_a_reward_that_does_not_fit_the_columns_is_refused_before_anything_is_generated(name):
    rewards = WeightedRewards([RewardSpec(f"{__name__}.{name}")])
    generator = Generator(lambda *_: pytest.fail("generated"), decode, mesh())
    with pytest.raises(InputError, match=rf"{name}.*\['bonus'\]"):
        GenerationEvaluator(GENERATION, PROMPTS, generator, rewards, beta=1.0)


@pytest.mark.parametrize(("count", "others"), [(1, []), (2, []), (2, [["x"]])])
def test_columns_of_the_data_s_completions_are_said_to_come_whole(count, others, caplog):
    columns = [{"bonus": 1.0, "scores": [0.5] * count, "tags": ["a"] * 3}] * 5
    for row, tags in enumerate(others):
        columns[row] = columns[row] | {"scores": tags}
    prompts = [
        dataclasses.replace(prompt, columns=own, completions=("a",) * count)
        for prompt, own in zip(PROMPTS, columns, strict=True)
    ]
    generator = Generator(lambda *_: pytest.fail("generated"), decode, mesh())
    GenerationEvaluator(GENERATION, prompts, generator, REWARDS, beta=1.0)
    said = [text for text in caplog.messages if "whole list" in text]
    assert len(said) == (not others)
    assert all(": scores: " in text and "tags" not in text for text in said)


@pytest.fixture(scope="module")
def params() -> Any:
    """A model sure enough of EOS that a third of the samples end."""
    drawn = init_params(LLAMA, jax.random.key(2))
    return jax.tree.map(lambda x: x if x.ndim == 1 else 6 * x, drawn)


@pytest.fixture(scope="module")
def sampler(params) -> Any:
    """Compiled once for all tests."""
    return sampler_on(mesh())


def sampler_on(on: jax.sharding.Mesh) -> Any:
    """Draws as `GENERATION` says."""
    return make_sampler(
        LLAMA,
        end_ids=[EOS],
        max_new_tokens=GENERATION.max_new_tokens,
        num_samples=GENERATION.num_samples,
        mesh=on,
    )


def evaluator(
    sampler: Any,
    ref_params: Any = None,
    *,
    prompts: Any = PROMPTS,
    on: jax.sharding.Mesh | None = None,
    **options: Any,
) -> GenerationEvaluator:
    """Evaluator of the five prompts in two batches of four."""
    ref_token_logp = None
    if ref_params is not None:
        ref_token_logp = partial(jax.jit(make_token_logp(LLAMA)), ref_params)
    return GenerationEvaluator(
        GenerationConfig(**{**vars(GENERATION), **options}),
        prompts,
        Generator(sampler, decode, on or mesh(), ref_token_logp),
        REWARDS,
        beta=0.5,
    )


def generate(on: GenerationEvaluator, params: Any, step: int) -> list[Generation]:
    """All generations of a step."""
    return [g for batch in on.batches(params, step) for g in batch]


@pytest.fixture(scope="module")
def against_itself(sampler, params) -> list[Generation]:
    """Generations of a model whose reference it is."""
    return generate(evaluator(sampler, params), params, 0)


def test_a_signal_ends_an_evaluation_after_the_batch_that_runs(sampler, params):
    found: list[Generation] = []
    with GracefulExit(), pytest.raises(LeaveRequest, match="SIGTERM"):
        for batch in evaluator(sampler, batch_size=2).batches(params, 0):
            found += batch
            os.kill(os.getpid(), signal.SIGTERM)
    assert {g.id for g in found} == {"p4"}  # the longest prompt comes first


def test_an_evaluation_says_that_it_compiles_once_and_how_long_that_took(sampler, params, caplog):
    caplog.set_level("INFO", "copg_jax")
    measured = evaluator(sampler)
    for step in range(2):
        generate(measured, params, step)
    texts = [record.getMessage() for record in caplog.records]
    assert [text for text in texts if "compil" in text] == [
        "generation: compiling, then 5 prompts",
        next(text for text in texts if text.startswith("generation: compiled, first ")),
    ]


def test_the_kl_of_a_model_to_itself_is_zero(against_itself):
    for g in against_itself:
        assert g.logp == pytest.approx(g.ref_logp, abs=1e-5)
        assert g.kl_k3 == pytest.approx(0, abs=1e-5)


def test_k3_is_never_negative_and_k1_is_the_difference_of_the_sums(sampler, params):
    other = jax.tree.map(lambda x: 1.3 * x, params)
    found = generate(evaluator(sampler, other), params, 0)
    assert min(g.kl_k3 for g in found) > 0
    metrics = summarize(found, beta=0.5)
    assert metrics["eval/kl"] == pytest.approx(np.mean([g.logp - g.ref_logp for g in found]))


def test_every_prompt_has_its_own_column_and_texts_without_eos(against_itself):
    ids = [g.id for g in against_itself]
    assert ids[::3] == ids[1::3] == ids[2::3]
    assert sorted(ids[::3]) == [f"p{i}" for i in range(5)]
    for g in against_itself:
        words = len(g.completion.split())
        assert words == g.length - g.has_eos
        assert math.isnan(g.reward) == (g.id == "p4")
        if g.id != "p4":
            assert g.reward == words + 10.0 * int(g.id[1:])
    assert summarize(against_itself, beta=1.0)["eval/dropped_rewards"] == 3


def test_the_same_step_draws_the_same_samples_and_another_step_others(sampler, params):
    without = evaluator(sampler)
    first, again, later = (generate(without, params, at) for at in (7, 7, 8))
    assert [g.completion for g in first] == [g.completion for g in again]
    assert [g.completion for g in first] != [g.completion for g in later]
    assert [g.id for g in first] == [g.id for g in later]
    assert all(math.isnan(g.ref_logp) for g in first)


def prompts_of(lengths: list[int]) -> list[TokenGroup]:
    """Prompts p0, p1, ... with these numbers of tokens."""
    return [
        dataclasses.replace(PROMPTS[0], id=f"p{i}", prompt=f"p{i}", prompt_tokens=np.arange(n) % 60)
        for i, n in enumerate(lengths)
    ]


def test_short_prompts_do_not_pay_for_long_ones_and_later_evaluations_have_the_same_shapes():
    seen = []

    def sampler(*args: Any) -> Samples:
        _, prompt_tokens, length, layout, keys = args
        shapes = map(np.shape, (prompt_tokens, length, keys))
        seen.append((layout.prompt_sizes, layout.token_slots.shape[1], *shapes))
        tokens = np.full((2, 1, 6), EOS)
        return Samples(
            tokens, np.ones((2, 1), int), *[np.zeros((2, 1, 6))] * 2, np.ones((2, 1), bool)
        )

    prompts = prompts_of([3, 90, 5, 130, 66, 2, 70])
    on = evaluator(sampler, prompts=prompts, batch_size=2, num_samples=1)
    found = generate(on, None, 0)
    assert sorted(g.id for g in found) == [prompt.id for prompt in prompts]
    # In each place of a batch a width of its own; the batch is as wide as the widest.
    assert [widths for widths, *_ in seen] == [(192, 128), (96, 96), (64, 64), (64, 64)]
    assert [shape for _, _, shape, *_ in seen] == [(2, 192), (2, 96), (2, 64), (2, 64)]
    # A place without a prompt counts as one token.
    assert [capacity for _, capacity, *_ in seen] == [130 + 90, 70 + 66, 5 + 1, 5 + 1]
    generate(on, None, 1)
    assert seen[4:] == seen[:4]


def test_samples_do_not_depend_on_the_batches_and_texts_are_of_the_first_prompts(sampler, params):
    def texts(batch_size: int) -> tuple[dict[str, str], dict[str, str]]:
        options = {"prompts": prompts_of([3, 66, 2]), "batch_size": batch_size, "num_texts": 2}
        on = evaluator(sampler, **options)
        by_id = {g.id: g.completion for g in generate(on, params, 7)[::3]}
        return by_id, on(params, 7)[1]

    (by_id, shown), others = texts(1), texts(4)
    assert (by_id, shown) == others
    assert list(shown.values()) == [
        f"[reward {len(by_id[p].split())}.000] {by_id[p]}" for p in ("p0", "p1")
    ]


@pytest.mark.parametrize("num_devices", [1, 2])
def test_the_kl_of_a_model_to_itself_is_zero_on_prompts_in_several_buckets(params, num_devices):
    on = mesh(num_devices)
    widths = []

    def noted(*args: Any) -> Samples:
        widths.append(sorted(set(args[3].prompt_sizes), reverse=True))
        return draw(*args)

    draw = sampler_on(on)
    prompts = prompts_of([3, 130, 2, 5, 150, 70, 6, 4])
    found = generate(evaluator(noted, params, prompts=prompts, batch_size=8, on=on), params, 0)
    assert widths == [[192, 128, 64]]
    assert len(found) == len(prompts) * GENERATION.num_samples
    for g in found:
        assert g.kl_k3 == pytest.approx(0, abs=1e-5)
        assert g.logp == pytest.approx(g.ref_logp, abs=1e-5)


def test_an_interrupted_evaluation_goes_on_with_the_other_prompts_on_another_mesh(sampler, params):
    prompts = prompts_of([3, 66, 2, 5, 4, 70, 6])
    begun = evaluator(sampler, prompts=prompts, batch_size=3).batches(params, 7)
    done = [next(begun), next(begun)]
    finished = {g.index for batch in done for g in batch}
    assert finished != set(range(len(finished)))  # a count would not say which
    devices = mesh(2)
    other = evaluator(sampler_on(devices), prompts=prompts, batch_size=4, on=devices)
    rest = list(other.batches(params, 7, finished))
    whole = in_prompt_order(generate(evaluator(sampler, prompts=prompts), params, 7))
    got = in_prompt_order(g for batch in [*done, *rest] for g in batch)
    assert [g.index for g in whole] == [i for i in range(7) for _ in range(3)]
    assert [(g.index, g.id, g.completion, g.logp) for g in got] == [
        (g.index, g.id, g.completion, pytest.approx(g.logp, abs=1e-5)) for g in whole
    ]
    assert list(other.batches(params, 7, set(range(7)))) == []


def test_what_was_written_is_read_again_up_to_the_last_whole_prompt(tmp_path):
    rows = [
        generation(id, 1.0, completion=f"two\u2028lines\n{id}", index=index, rewards={"a": 0.5})
        for id, index in zip("aabb", (0, 0, 1, 1), strict=True)
    ]
    lines = [experiments.evaluate._line(row) for row in rows]
    path = tmp_path / "generations.jsonl"
    for text, num_read in (("".join(lines), 4), ("".join(lines)[:-3], 2), ("".join(lines[:3]), 2)):
        path.write_text(text, encoding="utf-8")
        assert experiments.evaluate._read(epath.Path(path), 2) == rows[:num_read]
    assert experiments.evaluate._read(epath.Path(tmp_path / "none"), 2) == []


@pytest.mark.parametrize("change", ["a number", "a foreign line", "a key", "not JSON"])
def test_a_damaged_generation_is_not_averaged_but_all_done_again(tmp_path, caplog, change):
    rows = [generation("a", 1.25), generation("b", 2.0, index=1)]
    lines = [experiments.evaluate._line(row) for row in rows]
    lines[0] = {
        "a number": lines[0].replace("1.25", "1.75"),
        "a foreign line": '{"a": null}\n',
        "a key": lines[0].replace('"reward"', '"rewarf"'),
        "not JSON": lines[0].replace("{", "", 1),
    }[change]
    path = tmp_path / "generations.jsonl"
    path.write_text("".join(lines))
    assert experiments.evaluate._read(epath.Path(path), 1) == []
    assert "generations.jsonl:1: damaged" in caplog.text


def test_places_without_a_prompt_generate_nothing(sampler, params):
    lengths = []

    def noted(*args: Any) -> Samples:
        samples = sampler(*args)
        lengths.append(np.asarray(samples.length))
        return samples

    generate(evaluator(noted), params, 0)
    # Five prompts in batches of four.
    by_place = np.concatenate(lengths)
    assert ((by_place > 0).all(-1).sum(), (by_place == 0).all(-1).sum()) == (5, 3)


def test_missing_eos_reward_replaces_the_reward_of_completions_cut_short(sampler, params):
    plain = generate(evaluator(sampler), params, 0)
    judged = generate(evaluator(sampler, missing_eos_reward=-7.0), params, 0)
    assert 0 < sum(g.has_eos for g in plain) < len(plain)
    for before, after in zip(plain, judged, strict=True):
        np.testing.assert_equal(after.reward, before.reward if before.has_eos else -7.0)


@pytest.mark.parametrize("num_missing", [1, 2])
def test_a_missing_reward_has_the_reasons_of_its_absence_and_no_other_counts(num_missing, caplog):
    counts = {"eval/rewards/length/clipped": 2.0, "eval/rewards/length/dropped/none": num_missing}
    with pytest.raises(InputError) if num_missing == 2 else nullcontext() as caught:
        experiments.evaluate._report_rewards(num_missing, 2, epath.Path("g.jsonl"), counts)
    text = str(caught.value) if caught else caplog.text
    assert f"(eval/rewards/length/dropped/none: {num_missing})" in text


def test_texts_are_of_different_prompts(sampler, params):
    metrics, texts = evaluator(sampler, num_texts=2)(params, 0)
    assert list(texts) == ["sample/0", "sample/1"]
    assert all(text.startswith("[reward ") for text in texts.values())
    assert metrics["eval/num_prompts"] == 5


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_prompts", 0),
        ("num_samples", 0),
        ("max_new_tokens", 0),
        ("batch_size", -1),
        ("sampling_temperature", -0.1),
        ("num_texts", -1),
    ],
)
def test_a_value_out_of_range_is_named(field, value):
    with pytest.raises(InputError, match=field):
        GenerationConfig(**{field: value})
