"""The model card of a run."""

from collections.abc import Mapping

from etils import epath

from copg_jax.config.load import to_yaml
from copg_jax.config.stages import RunConfig
from copg_jax.files import read_json_lines
from copg_jax.hf.card import model_card
from copg_jax.tracking import FILE_NAME


def run_card(
    config: RunConfig,
    head: str,
    data: Mapping[str, str],
    step: int,
    is_adapter: bool = False,
) -> str:
    """The card of the parameters after a step: settings, data, and what was last measured by then.

    Args:
        config: of the run.
        head: "lm" or "score".
        data: name → what was read.
        step: number of updates.
        is_adapter: of the adapter alone, in place of the model with it.
    """
    metrics = [("step", float(step)), *sorted(_last_metrics(config.output_dir, step).items())]
    return model_card(
        head,
        is_adapter=is_adapter,
        base=config.model.path,
        settings=to_yaml(config),
        data=dict(data),
        metrics=metrics,
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
