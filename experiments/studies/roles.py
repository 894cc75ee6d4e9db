"""What the stages of a study must be to each other."""

from typing import Any

from copg_jax.errors import InputError


def require_roles(trainer: str, policy: Any, evaluate: Any) -> None:
    """Raises InputError unless a study can read what it draws from these configs.

    Args:
        trainer: the stage that makes the policy.
        policy: its config.
        evaluate: that of the evaluation.
    """
    if policy.evaluation is None:
        raise InputError(
            f"{trainer}.evaluation: wanted evaluations by generation, whose rewards a study draws "
            "over steps, got null"
        )
    ends = [f"{policy.output_dir}/{name}" for name in ("model", "adapter")]
    read = [path.rstrip("/") for path in (evaluate.model.path, evaluate.model.adapter) if path]
    if not set(ends) & set(read):
        run = r"\${shared.folder}/" + "online_" * (trainer == "online") + r"\${shared.run}"
        raise InputError(
            f"evaluate.model: wanted what the policy ends as, {ends[0]}, or {ends[1]} on its base, "
            f"got {' with '.join(read)}. A study compares policies after training; best/ is chosen "
            "by the reward that it would report. Fix: in the study's settings, "
            f"evaluate.model.path={run}/model, for adapters evaluate.model.adapter={run}/adapter."
        )
    start, reference = (
        one and f"path={one.path} revision={one.revision} adapter={one.adapter}"
        for one in (policy.model, evaluate.reference)
    )
    if reference != start:
        raise InputError(
            f"evaluate.reference: wanted the model that policies start from, {start}, for their KL "
            f"and as the zero of their rewards, got {reference or 'null'}"
        )
