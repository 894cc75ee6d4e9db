"""The training benchmark: the real step, on the rows it was given; numbers that fit together."""

import json
from typing import Any

import jax
import numpy as np
import pytest

from copg_jax.errors import InputError
from copg_jax.flops import useful_flops
from copg_jax.objective import LossOutput
from experiments.benchmark import train
from experiments.benchmark.__main__ import main
from experiments.benchmark.workload import MODELS, Workload
from tests.toys import LLAMA, mesh


def run(capsys, *arguments: str) -> dict[str, Any]:
    """The JSON line of a command."""
    main(arguments)
    (line,) = capsys.readouterr().out.splitlines()
    return json.loads(line)


def test_a_run_prints_one_line_of_numbers_that_fit_together(
    toy_model, rows, groups, write, capsys, tmp_path
):
    arguments = ("--batch", "8", "--steps", "2", "--warmup", "1", "--peak-tflops", "0.001")
    where = ("--workload", str(write(rows)), "--shape", "tiny", "--profile", str(tmp_path / "p"))
    found = run(capsys, "train", *where, *arguments, "--mesh", "data=2,fsdp=2,tensor=2")
    assert found["pairs_per_s"] * found["step_s"] == pytest.approx(8)
    assert found["num_traces"] == 1
    timed = train.make_batches(Workload(groups), 8, 4, 5)[1:3]
    sizes = [(batch.prompt_length, batch.completion_length) for batch in timed]
    tokens = np.mean([prompt.sum() + completion.sum() for prompt, completion in sizes])
    assert found["useful_tokens_per_s"] * found["step_s"] == pytest.approx(tokens)
    flops = np.mean([useful_flops(LLAMA, *lengths) for lengths in sizes])
    assert found["useful_flops"] == pytest.approx(flops)
    assert found["mfu"] * found["step_s"] == pytest.approx(flops / (0.001e12 * 8))
    assert found["compiled_flops"] > flops and found["temp_bytes"] > 0 and found["compile_s"] > 0
    assert found["utilisation"] == pytest.approx(tokens / timed[0].layout.num_computed)
    assert (found["shape"], found["batch"], found["dtype"]) == ("tiny", 8, "float32")
    assert (found["warmup"], found["microbatches"], found["logits_chunk"]) == (1, 1, None)
    assert found["mesh"] == {"data": 2, "fsdp": 2, "tensor": 2}
    assert list((tmp_path / "p").rglob("*.xplane.pb"))


def test_a_step_with_adapters_is_timed_beside_frozen_weights(rows, groups, write, capsys):
    arguments = ("--batch", "8", "--steps", "1", "--warmup", "1", "--lora-rank", "2")
    where = ("--workload", str(write(rows)), "--shape", "tiny")
    found = run(capsys, "train", *where, *arguments)
    assert (found["lora_rank"], found["num_traces"]) == (2, 1)
    (batch,) = train.make_batches(Workload(groups), 8, 8, 2)[1:]
    flops = useful_flops(MODELS["tiny"], batch.prompt_length, batch.completion_length)
    assert flops / 2 < found["useful_flops"] < 0.8 * flops
    model = train.make_model(MODELS["tiny"], mesh(), 2)
    frozen = train._random_frozen(model)["frozen"]
    assert frozen["lora_scale"] == 16.0 and "lora" not in frozen


def test_it_is_the_step_of_training_on_the_batches_of_its_stream(groups, monkeypatch):
    seen = []

    def recorded(*args: Any, **kwargs: Any) -> Any:
        step_fn = make_train_step(*args, **kwargs)

        class Recorder:
            trace = staticmethod(step_fn.trace)

            def __call__(self, state: Any, batch: Any, **arguments: Any) -> Any:
                before = np.asarray(jax.tree.leaves(state.params)[0])
                new, metrics = step_fn(state, batch, **arguments)
                assert np.abs(np.asarray(jax.tree.leaves(new.params)[0]) - before).max() > 0
                seen.append((int(new.step), np.asarray(batch.reward), metrics))
                return new, metrics

        return Recorder()

    make_train_step = train.make_train_step
    monkeypatch.setattr(train, "make_train_step", recorded)
    # Shapes and mesh of the test above: compiled once for both.
    train.measure(
        LLAMA, Workload(groups), batch_size=8, num_steps=2, num_warmup=1, mesh=mesh(2, 2, 2)
    )
    assert [number for number, _, _ in seen] == [1, 2, 3, 4, 5]
    for (_, reward, _), batch in zip(
        seen, train.make_batches(Workload(groups), 8, 4, 5), strict=True
    ):
        np.testing.assert_array_equal(reward, batch.reward)
    assert {"loss", "copg/residual", "optim/grad_norm", "optim/learning_rate"} <= seen[0][2].keys()


def test_batches_are_packed_and_have_every_group_equally_often(groups):
    batches = train.make_batches(Workload(groups), 5, 1, 4)
    rewards = np.concatenate([batch.reward for batch in batches])
    wanted = np.repeat([group.rewards for group in groups], 2, axis=0)
    np.testing.assert_array_equal(np.sort(rewards, axis=0), np.sort(wanted, axis=0))
    padded = batches[0].prompt_tokens.size + batches[0].completion_tokens.size
    assert batches[0].layout.num_computed < 0.8 * padded


def test_a_step_that_is_not_finite_is_no_measurement(groups, monkeypatch):
    losing = lambda *args, **kwargs: (
        lambda params, batch, **_: LossOutput(
            jax.numpy.nan * params["norm"].sum(),
            jax.numpy.float32(1),
            batch.reward[:, 0],
            {},
        )
    )
    monkeypatch.setattr(train, "make_policy_loss", losing)
    with pytest.raises(RuntimeError, match="not finite"):
        train.measure(LLAMA, Workload(groups), batch_size=4, num_steps=1, num_warmup=1, mesh=mesh())


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"num_steps": 0}, "--steps and --warmup must be >= 1"),
        ({"num_warmup": 0}, "--steps and --warmup must be >= 1"),
        ({"batch_size": 3}, "multiple of num_microbatches"),
    ],
    ids=str,
)
def test_numbers_that_cannot_be_run_are_refused(groups, options, wanted):
    options = {"batch_size": 4, "num_steps": 1, "num_warmup": 1} | options
    with pytest.raises(InputError, match=wanted):
        train.measure(LLAMA, Workload(groups), mesh=mesh(), num_microbatches=2, **options)


@pytest.mark.parametrize(
    ("command", "option", "value"),
    [
        ("train", "--batch", "0"),
        ("train", "--batch", "-8"),
        ("train", "--steps", "0"),
        ("train", "--microbatches", "0"),
        ("train", "--logits-chunk", "0"),
        ("train", "--peak-tflops", "nan"),
        ("train", "--peak-tflops", "0"),
        ("generate", "--batch", "0"),
        ("generate", "--new", "0"),
        ("generate", "--samples", "-1"),
        ("workload", "--pairs", "0"),
        ("workload", "--seed", "-1"),
    ],
)
def test_numbers_of_the_command_line_are_checked_before_a_file_is_read(
    capsys, tmp_path, command, option, value
):
    name = "--out" if command == "workload" else "--workload"
    with pytest.raises(SystemExit) as caught:
        main([command, name, str(tmp_path / "none"), f"{option}={value}"])
    assert caught.value.code == 2
    assert f"error: {option} must be >= " in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_bad_input_ends_with_its_text_and_status_two(capsys, tmp_path):
    with pytest.raises(SystemExit) as caught:
        main(["train", "--workload", str(tmp_path / "none")])
    assert caught.value.code == 2
    assert "error: --workload" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["train", "generate"])
def test_without_the_accelerator_that_is_asked_for_nothing_is_timed(capsys, monkeypatch, command):
    monkeypatch.setenv("JAX_PLATFORMS", "cuda,cpu")
    with pytest.raises(SystemExit) as ended:
        main([command, "--workload", "w"])
    assert ended.value.code == 2
    assert "JAX_PLATFORMS=cuda,cpu: wanted cuda, got cpu" in capsys.readouterr().err


def test_a_mesh_is_sizes_by_axis(capsys):
    for text in ("data", "data=x", "rows=2"):
        with pytest.raises(SystemExit):
            main(["train", "--workload", "w", "--mesh", text])
        assert "wanted sizes of axes such as data=1,fsdp=4,tensor=2" in capsys.readouterr().err


def test_a_workload_is_written(capsys, tmp_path):
    path = tmp_path / "w.jsonl"
    assert run(capsys, "workload", "--pairs", "3", "--out", str(path))["pairs"] == 3
    assert len(path.read_text().splitlines()) == 3
