"""The model card of a run."""

from collections.abc import Mapping

from etils import epath

from copg_jax.config.load import to_yaml
from copg_jax.config.stages import TrainConfig
from copg_jax.data.dataset import GroupDataset
from copg_jax.files import read_json_lines
from copg_jax.hf.card import model_card
from copg_jax.tracking import FILE_NAME


def run_card(
    config: TrainConfig, head: str, datasets: Mapping[str, GroupDataset | None], step: int
) -> str:
    """The card of the parameters after a step: settings, data, and what was last measured by then.

    Args:
        config: of the run.
        head: "lm" or "score".
        datasets: name → data that was read; None where there was none.
        step: number of updates.
    """
    sections = {"train": config.data, "validation": config.validation}
    data = {
        name: f"`{section.path}`, {len(dataset)} groups, fingerprint {dataset.fingerprint[:12]}"
        for name, section in sections.items()
        if section is not None and (dataset := datasets[name]) is not None
    }
    metrics = [("step", float(step)), *sorted(_last_metrics(config.output_dir, step).items())]
    return model_card(
        head, base=config.model.path, settings=to_yaml(config), data=data, metrics=metrics
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
