"""Plans: the real step of a stage, what one chip holds, and what is said about it."""

import dataclasses
import importlib.util
import json
import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from copg_jax import sharding
from copg_jax.config.load import load_config
from copg_jax.errors import InputError
from copg_jax.models.params import abstract_params
from experiments import plan as script
from experiments.matmuls import matmul_flops
from experiments.planning import plan as planning
from experiments.planning.plan import Plan, make_plan
from experiments.planning.program import STAGES, Program, make_program, open_architecture
from experiments.planning.topology import open_topology
from tests import toys
from tests.models import tiny

LLAMA2_7B = ["configs/tldr.yaml", "configs/sizes/llama2_7b.yaml"]
SLOW = pytest.mark.slow


def needs_gpu_compiler(test: Any) -> Any:
    old = jax.__version_info__ < (0, 12)
    skip = pytest.mark.skipif(old, reason="the GPU compiler of this JAX describes no GPUs")
    return skip(pytest.mark.oracle("jax_plugins")(test))


FIELDS = [field.name for field in dataclasses.fields(Plan)]


@pytest.fixture
def architecture(tmp_path: Path) -> Path:
    """A folder with a config.json and nothing else."""
    (tmp_path / "config.json").write_text(json.dumps(tiny.KINDS["llama3"]))
    return tmp_path


def config_of(stage: str, architecture: Path, *arguments: str) -> Any:
    data = "evaluation.data" if stage == "evaluate" else "data"
    sizes = [f"{data}.{name}=16" for name in ("max_prompt_tokens", "max_completion_tokens")]
    needed = ["output_dir=x", f"model.path={architecture}", f"{data}.path=x", *sizes]
    if stage != "evaluate":
        needed.append("training.batch_size=16")
    return load_config(STAGES[stage], [*needed, *arguments])


@pytest.mark.parametrize(
    "kind", ["llama3", *(pytest.param(kind, marks=SLOW) for kind in ("qwen2", "smollm3"))]
)
@pytest.mark.parametrize("stage", STAGES)
def test_the_step_of_every_stage_is_traced_with_its_shardings(
    stage: str, kind: str, architecture: Path
):
    (architecture / "config.json").write_text(json.dumps(tiny.KINDS[kind]))
    config = config_of(stage, architecture)
    mesh = sharding.make_mesh(sharding.MeshConfig())
    program = make_program(config, open_architecture(config.model), mesh)
    jaxpr = program.function.trace(*program.arguments, **program.keywords).jaxpr
    flops = matmul_flops(jaxpr, loop_trips=program.loop_trips)
    assert 0.5 < flops / program.useful_flops < 5
    assert program.trains == (stage != "evaluate")
    big = [leaf for leaf in jax.tree.leaves(program.arguments) if leaf.size > 1000]
    assert all(leaf.sharding.shard_shape(leaf.shape) != leaf.shape for leaf in big)


def test_a_batch_is_as_long_as_the_config_allows_and_filled_like_tldr(architecture: Path):
    limits = ["data.max_prompt_tokens=512", "data.max_completion_tokens=64"]
    config = config_of("policy", architecture, "training.batch_size=128", *limits)
    mesh = sharding.make_mesh(sharding.MeshConfig())
    program = make_program(config, open_architecture(config.model), mesh)
    batch = program.arguments[1]
    widths = list(batch.layout.prompt_sizes)
    assert widths[0] == 512 and widths == sorted(widths, reverse=True) and widths[-1] < 512
    assert batch.prompt_tokens.shape == (128, 512)
    assert batch.completion_tokens.shape == (128, 2, 64)
    assert program.num_tokens == pytest.approx(128 * (343 + 2 * 34), rel=0.01)
    assert program.num_tokens <= batch.layout.num_computed < 1.05 * program.num_tokens


def test_sampling_is_planned_for_the_longest_prompts_of_an_evaluation(architecture: Path):
    sizes = ["num_prompts=64", "batch_size=16", "max_new_tokens=8"]
    limits = [f"evaluation.generation.{size}" for size in sizes]
    config = config_of("evaluate", architecture, "evaluation.data.max_prompt_tokens=1024", *limits)
    mesh = sharding.make_mesh(sharding.MeshConfig())
    program = make_program(config, open_architecture(config.model), mesh)
    _, tokens, length, layout, _ = program.arguments
    assert tokens.shape == (16, 1024) and length.shape == (16,)
    prompts = program.num_tokens - 16 * 8
    assert prompts <= layout.num_computed < tokens.size
    # The top quarter of TL;DR's lengths has 410 tokens and more.
    assert program.num_tokens > 16 * (410 + 8)


def test_a_plan_has_the_fields_of_its_json_line_and_fits_where_it_should(architecture: Path):
    config = config_of("sft", architecture)
    found, remarks = make_plan(config, open_topology("cpu:2xh200"))
    line = json.loads(json.dumps(dataclasses.asdict(found)))
    assert " ".join(line) == (
        "topology compiled_for stage model trained num_microbatches num_chips mesh "
        "hbm_gib_per_chip fits arguments_gib temp_gib frozen_gib "
        "collectives useful_tflops_per_chip roofline_step_s bound_by compile_s"
    )
    assert line["fits"] is True and line["num_chips"] == 2
    assert line["mesh"] == {"data": 1, "fsdp": 2, "tensor": 1}
    assert line["collectives"]["all-gather"]["bytes"] > 0
    assert set(line["roofline_step_s"]) == {"compute", "hbm", "interconnect"}
    assert line["bound_by"] == max(line["roofline_step_s"], key=line["roofline_step_s"].get)
    assert any("estimate" in remark for remark in remarks)


@pytest.fixture
def no_cache() -> Iterator[None]:
    """Compiled anew, as the planner does: without a GPU nothing can be read from a cache."""
    compilation_cache.reset_cache()
    jax.config.update("jax_enable_compilation_cache", False)
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()


@needs_gpu_compiler
@pytest.mark.usefixtures("no_cache")
def test_the_gpu_compiler_compiles_the_step_of_a_policy_for_a_node(
    architecture: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "3")  # as the planner sets it, and undone
    config = config_of("policy", architecture, "model.attention=xla")
    topology = open_topology("gpu:8xh100")
    assert topology.chip is not None
    # It compiles what is too large for the GPU, too: the plan has to say so.
    small = topology._replace(chip=topology.chip._replace(hbm_gib=1e-6))
    found, remarks = make_plan(config, small)
    assert found.fits is False and "does not fit" in "\n".join(remarks)
    assert (found.compiled_for, found.num_chips) == ("NVIDIA H100 80GB HBM3", 8)
    messages = found.collectives or {}
    assert messages["all-gather"]["bytes"] > 0 and messages["reduce-scatter"]["bytes"] > 0


def test_attention_that_cannot_be_compiled_is_refused(monkeypatch: pytest.MonkeyPatch):
    def find(name: str) -> None:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(importlib.util, "find_spec", find)
    with pytest.raises(InputError, match=r"cuDNN.*jax_cuda13_plugin.*plan-gpu.*attention=xla"):
        planning._check_cudnn(open_topology("cpu:1xh100"))


def plan_of(**values: Any) -> Plan:
    defaults: dict[str, Any] = dict.fromkeys(FIELDS)
    return Plan(**defaults | {"num_chips": 128, "fits": True} | values)


def remarks_of(plan: Plan) -> str:
    program = Program(None, True, (), 128, 52_608, 1e15, 0.0, 1)
    return "\n".join(planning._remarks(plan, program, open_topology("cpu:8xh200")))


def test_a_slice_whose_messages_take_longer_than_its_products_is_called_too_large():
    terms = {"compute": 0.05, "hbm": 0.02, "interconnect": 0.1}
    text = remarks_of(plan_of(roofline_step_s=terms, bound_by="interconnect"))
    assert "too large to keep busy: 128 groups a step are 52,608 tokens" in text
    assert "up to about 64 of these chips" in text
    busy = remarks_of(plan_of(roofline_step_s=terms | {"compute": 0.2}, bound_by="compute"))
    assert "too large" not in busy


def test_a_gpu_that_stands_in_for_another_is_named():
    gpu = SimpleNamespace(platform="gpu")
    topology = open_topology("cpu:1xrtx3090")._replace(devices=[gpu], stand_in="an RTX A6000")
    (remark,) = planning._remarks(plan_of(), Program(None, True, (), 1, 1, 1.0, 0.0, 1), topology)
    assert "compiled for an RTX A6000" in remark


def test_what_does_not_fit_comes_with_what_helps():
    assert "training.num_microbatches" in remarks_of(plan_of(fits=False))
    assert "does not fit" not in remarks_of(plan_of())


def test_a_policy_that_evaluates_shares_its_chips_with_the_reference_and_the_reward_model(
    architecture: Path, monkeypatch: pytest.MonkeyPatch
):
    reward = "{function: copg_jax.rewards.RewardModel, arguments: {path: x, dtype: bfloat16}}"
    evaluation = ["evaluation.data.path=x", f"evaluation.rewards=[{reward}]"]
    config = config_of("policy", architecture, "model.dtype=float32", *evaluation)
    arch, mesh = open_architecture(config.model), sharding.make_mesh(sharding.MeshConfig(data=2))
    sizes = [leaf.size for leaf in jax.tree.leaves(abstract_params(arch))]
    # The reward model is cut over all devices, the reference as the policy is.
    assert make_program(config, arch, mesh).frozen_bytes == (2 / 8 + 4 / 4) * sum(sizes)
    assert make_program(replace(config, evaluation=None), arch, mesh).frozen_bytes == 0

    def large(*arguments: Any) -> Program:
        return make_program(*arguments)._replace(frozen_bytes=200 * 2**30)

    monkeypatch.setattr(planning, "make_program", large)
    plan, remarks = make_plan(config, open_topology("cpu:8xh200"))
    assert (plan.fits, plan.frozen_gib) == (False, 200)
    assert "evaluation=null" in "\n".join(remarks)


def test_adapters_hold_their_base_once_and_evaluate_against_it(architecture: Path):
    def program_of(*arguments: str, adapter: str = "") -> Program:
        path = str(architecture) if adapter else "x"
        reward = f"{{path: {path}, dtype: bfloat16{adapter}}}"
        rewards = f"[{{function: copg_jax.rewards.RewardModel, arguments: {reward}}}]"
        evaluation = ["evaluation.data.path=x", f"evaluation.rewards={rewards}"]
        config = config_of("policy", architecture, *evaluation, *arguments)
        return make_program(config, open_architecture(config.model), mesh)

    mesh = sharding.make_mesh(sharding.MeshConfig())
    full, lora = program_of(), program_of("lora.rank=2")
    shared = program_of("lora.rank=2", adapter=", adapter: x")
    frozen = lora.keywords["frozen"]
    assert "frozen" not in full.keywords and "lora" not in frozen
    count = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
    trained = lora.arguments[0].params
    base = count(full.arguments[0].params)
    assert count(frozen) == base + 1  # and the scale of the adapters
    assert set(trained) == {"lora"} and count(trained) < base / 4
    matrices = [leaf for leaf in jax.tree.leaves(frozen) if leaf.size > 1000]
    assert all(leaf.dtype == "bfloat16" for leaf in matrices)
    assert all(leaf.sharding.shard_shape(leaf.shape) != leaf.shape for leaf in matrices)
    # With all weights a reference and a reward model, with adapters the latter, on the policy's
    # base its own adapter alone.
    assert full.frozen_bytes == 2 * lora.frozen_bytes == 2 * 2 * base / 8
    assert shared.frozen_bytes == 4 * count(trained) / 8
    assert full.useful_flops / 2 < lora.useful_flops < full.useful_flops
    arguments = sum(
        np.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves((lora.arguments, frozen))
    )
    assert planning._argument_bytes(lora) == arguments


@pytest.mark.parametrize(
    ("stage", "arguments", "words"),
    [
        ("policy", ["lora.rank=64"], "lora.rank: wanted less than"),
        ("policy", ["lora.rank=2", "lora.targets=[lm_head]"], "lora.targets: wanted some of"),
        ("evaluate", ["model.adapter=x"], "model.adapter: wanted none.*model.adapter=null"),
    ],
)
def test_adapters_that_cannot_be_planned_are_refused(
    stage: str, arguments: list[str], words: str, architecture: Path
):
    config = config_of(stage, architecture, *arguments)
    mesh = sharding.make_mesh(sharding.MeshConfig())
    with pytest.raises(InputError, match=words):
        make_program(config, open_architecture(config.model), mesh)


def test_a_model_that_is_not_here_is_refused_with_one_that_is():
    with pytest.raises(InputError, match=r"meta-llama/Llama-2-7b-hf.*configs/models/llama2_7b"):
        open_architecture(load_config(STAGES["sft"], LLAMA2_7B).model)


@pytest.mark.parametrize(("size", "layers"), [("7b", 32), ("70b", 80)])
def test_published_architectures_are_at_hand(size: str, layers: int):
    path = f"configs/models/llama2_{size}"
    assert (
        open_architecture(
            load_config(STAGES["sft"], ["output_dir=x", "data.path=x", f"model.path={path}"]).model
        ).num_hidden_layers
        == layers
    )


@pytest.mark.parametrize(
    ("names", "stage"),
    [
        ([*LLAMA2_7B, "configs/losses/dpo.yaml", "output_dir=reward.x"], "policy"),
        (["configs/losses/ipo.yaml", *LLAMA2_7B], "policy"),
        ([*LLAMA2_7B, "my_sft.yaml"], "sft"),
        (["configs/reward-small.yml", "seed=1"], "reward"),
        (["evaluate.yaml"], "evaluate"),
    ],
)
def test_the_names_of_the_configs_tell_the_stage(names: list[str], stage: str):
    assert script.stage_of(names) == stage


@pytest.mark.parametrize("names", [LLAMA2_7B, [*LLAMA2_7B, "evaluate.yaml", "copg.yaml"], []])
def test_names_that_tell_no_stage_or_two_are_refused(names: list[str]):
    with pytest.raises(InputError, match="--stage: wanted one of sft"):
        script.stage_of(names)


def test_the_script_prints_a_json_line_and_a_column_a_topology(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    def planned(_, topology):
        found = {"all-gather": {"count": 3, "bytes": 2_000_000_000}}
        plan = plan_of(topology=topology.name, mesh={"data": 1, "fsdp": 2}, collectives=found)
        return plan, ["a remark"]

    monkeypatch.setattr(script, "make_plan", planned)
    names = ["--topology", "cpu:2", "--topology", "cpu:2xh200"]
    script.main([*LLAMA2_7B, "--stage", "sft", *names])
    first, second, *rest = capsys.readouterr().out.splitlines()
    assert [json.loads(line)["topology"] for line in (first, second)] == ["cpu:2", "cpu:2xh200"]
    toys.names_all("\n".join(rest), ["cpu:2", "cpu:2xh200", "3 x, 2.00 GB", "a remark"])


def test_without_a_topology_or_a_stage_the_script_says_what_it_wants(capsys):
    with pytest.raises(SystemExit, match="0"):
        script.main(["--help"])
    assert "--topology v5e:4x4" in capsys.readouterr().out
    with pytest.raises(InputError, match="--topology: wanted at least one"):
        script.main(["--stage", "sft", "output_dir=x", "model.path=x", "data.path=x"])
    with pytest.raises(InputError, match="--stage: wanted one of sft"):
        script.main(["--topology", "cpu:1", "some.yaml"])


def test_plan_commands_of_the_docs_are_accepted(monkeypatch: pytest.MonkeyPatch):
    lines = Path("docs/plan.md").read_text(encoding="utf-8").replace("\\\n", " ").splitlines()
    words = [shlex.split(line) for line in lines if "--topology " in line]
    commands = [line[line.index("experiments.plan") + 1 :] for line in words]
    seen = []
    monkeypatch.setattr(script, "open_topology", lambda name: name)
    monkeypatch.setattr(script, "print_table", lambda found: None)
    monkeypatch.setattr(
        script, "make_plan", lambda config, name: (seen.append(name), (plan_of(), []))[1]
    )
    for command in commands:
        script.main(command)
    assert len(commands) >= 2 and len(seen) >= len(commands)
