"""The model card of a run."""

from collections.abc import Mapping

from etils import epath

from copg_jax.config.load import to_yaml
from copg_jax.config.policy_data import PolicyDataConfig
from copg_jax.config.sections import DataConfig
from copg_jax.config.stages import TrainConfig
from copg_jax.data.stream import Groups
from copg_jax.files import read_json_lines
from copg_jax.hf.card import model_card
from copg_jax.tracking import FILE_NAME


def run_card(
    config: TrainConfig,
    head: str,
    datasets: Mapping[str, Groups | None],
    step: int,
    is_adapter: bool = False,
) -> str:
    """The card of the parameters after a step: settings, data, and what was last measured by then.

    Args:
        config: of the run.
        head: "lm" or "score".
        datasets: name → data that was read; None where there was none.
        step: number of updates.
        is_adapter: of the adapter alone, in place of the model with it.
    """
    sections = {"train": config.data, "validation": config.validation}
    data = {
        name: f"{_places(section)}, {len(dataset)} groups, fingerprint {dataset.fingerprint[:12]}"
        for name, section in sections.items()
        if section is not None and (dataset := datasets[name]) is not None
    }
    metrics = [("step", float(step)), *sorted(_last_metrics(config.output_dir, step).items())]
    return model_card(
        head,
        is_adapter=is_adapter,
        base=config.model.path,
        settings=to_yaml(config),
        data=data,
        metrics=metrics,
    )


def _places(section: DataConfig) -> str:
    """Where data is: its path, or those of its sources with their shares."""
    if not isinstance(section, PolicyDataConfig) or not section.sources:
        return f"`{section.path}`"
    return " and ".join(
        f"`{source.path}`" + ("" if source.share is None else f" (share {source.share:g})")
        for source in section.sources
    )


def _last_metrics(output_dir: str, step: int) -> dict[str, float]:
    """The newest value of each metric up to a step; rates of this machine are left out."""
    path, found = epath.Path(output_dir) / FILE_NAME, {}
    for _, row in read_json_lines(path) if path.exists() else ():
        if isinstance(row, dict) and isinstance(row.get("step"), int) and row["step"] <= step:
            found |= {
                name: float(value)
                for name, value in row.items()
                if isinstance(value, int | float)
                and name not in ("step", "time")
                and not name.startswith("perf/")
            }
    return found
