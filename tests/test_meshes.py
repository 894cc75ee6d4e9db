"""Every stage, on every kind of mesh, gives the numbers of one device."""

from collections.abc import Callable
from pathlib import Path

import jax
import pytest

from tests.runs import (
    assert_same_evaluation,
    assert_same_rounds,
    assert_same_scores,
    assert_same_training,
)
from tests.toys import LLAMA, RELATIVES
from tests.workplace import DATA, Workplace

FAMILIES = {"llama": LLAMA, **RELATIVES}

STAGES: dict[str, Callable[[Path, Path], None]] = {
    "sft": assert_same_training,
    "reward": assert_same_training,
    "sample": assert_same_scores,
    "score": assert_same_scores,
    "policy": assert_same_training,
    "online": assert_same_rounds,
    "evaluate": assert_same_evaluation,
}


class Pipeline(Workplace):
    """The stages in short: two steps each, no evaluation but the stage of that name."""

    def arguments(self, stage: str) -> list[str]:
        """Arguments of a run of the stage into `folder`/`stage`."""
        # A small weight: the loss of a policy that is still π_ref is rounding times the reward gap.
        folder, length = self.folder, "{function: copg_jax.rewards.length, weight: 0.125}"
        rewards, trained = f"rewards=[{length}]", f"arguments: {{path: {folder / 'reward/model'}}}"
        # Of weight 0: it is compared, but its fractions break no ties. Rounding would decide which
        # pairs a policy that is still π_ref orders rightly.
        judge = f"{{function: copg_jax.rewards.RewardModel, weight: 0, {trained}}}"
        judged = f"rewards=[{length}, {judge}]"
        training = ["training.batch_size=8", "training.max_steps=2", "training.remat=none"]
        training += ["model.dtype=float32", "optim.learning_rate=1e-4", *DATA]
        model = f"model.path={folder / 'sft' / 'model'}"
        own = {
            "sft": [f"model.path={folder / 'base'}", f"data.path={self.posts}", *training],
            "reward": [model, f"data.path={self.comparisons}", *training],
            "sample": [model, f"data.path={self.posts}", "model.dtype=float32", *DATA],
            "score": [
                f"reference.path={folder / 'sft' / 'model'}",
                "reference.dtype=float32",
                f"data.path={self.comparisons}",
                "batch_size=8",
                judged,
                *DATA,
            ],
            "policy": [model, f"data.path={folder / 'score'}", *training],
            "online": [
                model,
                f"data.path={self.posts}",
                rewards,
                "rounds=2",
                "prompts_per_round=8",
                "batch_size=8",
                "sampling.max_new_tokens=6",
                *(setting for setting in training if "max_steps" not in setting),
            ],
            "evaluate": [
                f"model.path={folder / 'policy' / 'model'}",
                "model.dtype=float32",
                f"reference.path={folder / 'sft' / 'model'}",
                "reference.dtype=float32",
                f"evaluation.data.path={self.posts}",
                f"evaluation.{rewards}",
                "evaluation.generation.num_prompts=5",
                "evaluation.generation.num_samples=2",
                "evaluation.generation.max_new_tokens=6",
            ],
        }[stage]
        return [*own, f"output_dir={folder / stage}"]


@pytest.fixture(scope="module")
def pipeline(request: pytest.FixtureRequest, tmp_path_factory) -> Pipeline:
    """All stages run in order on one device, by a model of a family."""
    found = Pipeline(tmp_path_factory.mktemp("meshes"), FAMILIES[request.param])
    with pytest.MonkeyPatch.context() as patch:
        first = jax.devices()[:1]
        patch.setattr(jax, "devices", lambda *arguments: first)
        for stage in STAGES:
            found.run(stage)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pipeline", "sizes"),
    [
        *(("llama", sizes) for sizes in ((1, 8, 1), (2, 2, 2))),
        ("qwen2", (2, 2, 2)),  # whose biases are cut too; of the others a step is compared
    ],
    indirect=["pipeline"],
    ids=lambda value: value if isinstance(value, str) else "x".join(map(str, value)),
)
def test_every_stage_on_eight_devices_equals_one_device(pipeline, tmp_path, sizes):
    mesh = [f"mesh.{name}={n}" for name, n in zip(("data", "fsdp", "tensor"), sizes, strict=True)]
    for stage, assert_same in STAGES.items():
        pipeline.run(stage, *mesh, f"output_dir={tmp_path / stage}")
        assert_same(tmp_path / stage, pipeline.folder / stage)
