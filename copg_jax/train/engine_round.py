"""The samples of a round from a program of its own, such as an inference engine.

Beside the folder of the policy it gets `prompts.jsonl`, and writes `written.jsonl`, which becomes
`completions.jsonl` once the program has ended well. The policy is removed once that is read and
right: while it is there, the program is called again.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath

from copg_jax import distributed, inputs
from copg_jax.config.policy_data import GeneratorConfig
from copg_jax.config.sections import DataConfig
from copg_jax.config.stages import OnlineConfig
from copg_jax.data.dataset import GroupDataset
from copg_jax.data.groups import TokenGroup
from copg_jax.errors import InputError
from copg_jax.hf.pretrained import PretrainedModel
from copg_jax.outside import call_engine, write_prompts
from copg_jax.train.exports import export


def draw_with_engine(
    folder: epath.Path,
    prompts: Sequence[TokenGroup],
    *,
    number: int,
    trained: Any,
    model: PretrainedModel,
    config: OnlineConfig,
    text_format: str,
    pause: Callable[[], None],
) -> GroupDataset:
    """Samples of an engine, checked; it is called unless they are there.

    Args:
        folder: of the round.
        prompts: that it is asked.
        number: of the round.
        trained: the weights that are trained.
        model: whose architecture, tokenizer and mesh those are.
        config: of the run, with a generator.
        text_format: of the prompts.
        pause: called while it runs; may raise, which ends it.

    Raises:
        InputError: it fails, takes too long, or its file is not what was asked for.
    """
    assert config.generator is not None
    asked, completions = folder / "prompts.jsonl", folder / "completions.jsonl"
    policies = [folder / name for name in ("model", "adapter")]
    is_drawn = completions.exists() and not any(policy.exists() for policy in policies)
    if not distributed.from_main(is_drawn):
        if distributed.is_main_process():
            completions.unlink(missing_ok=True)  # first, so that what is refused is never taken
        export(
            folder,
            "model",
            model,
            trained,
            base=config.model,
            card=lambda _: f"The policy of round {number}.",
        )
        with distributed.main_first(completions):
            if distributed.is_main_process():
                write_prompts(asked, prompts)
                _call(config.generator, config.sampling.seed, number, folder, pause)
                (folder / "written.jsonl").rename(completions)
    dataset = _open(completions, asked, prompts, model, config, text_format)
    with distributed.main_first(completions):
        if distributed.is_main_process():
            for policy in policies:
                if policy.exists():
                    policy.rmtree()
    return dataset


def _call(
    generator: GeneratorConfig,
    seed: int,
    number: int,
    folder: epath.Path,
    pause: Callable[[], None],
) -> None:
    """Calls the engine, in process 0."""
    own = np.random.SeedSequence([seed, number]).generate_state(1)[0]
    (folder / "written.jsonl").unlink(missing_ok=True)
    call_engine(
        [item.replace("{seed}", str(own)) for item in generator.command],
        [Path(folder / name) for name in ("model", "prompts.jsonl", "written.jsonl")],
        said=Path(folder / "generator.log"),
        timeout_sec=generator.timeout_sec,
        # Of several processes the others wait for its end.
        pause=pause if jax.process_count() == 1 else lambda: None,
    )


def _open(
    path: epath.Path,
    asked: epath.Path,
    prompts: Sequence[TokenGroup],
    model: PretrainedModel,
    config: OnlineConfig,
    text_format: str,
) -> GroupDataset:
    """What an engine wrote, of the prompts that it was asked."""
    numbers = config.sampling
    section = DataConfig(
        str(path),
        format=text_format,
        max_prompt_tokens=max(len(prompt.prompt_tokens) for prompt in prompts),
        max_completion_tokens=2**30,
    )
    folder = epath.Path(config.output_dir)
    dataset = inputs.open_data(section, model, folder, "completions", changes=True)
    inputs.require_answers(str(asked), section, dataset)
    for group in dataset:
        sizes = list(map(len, group.completion_tokens))
        if len(sizes) != numbers.num_samples or max(sizes) > numbers.max_new_tokens:
            raise InputError(
                f"{group.where}: wanted sampling.num_samples={numbers.num_samples} completions "
                f"of at most sampling.max_new_tokens={numbers.max_new_tokens} tokens, got "
                f"{len(sizes)} of {sizes}. Fix: give generator.command the same numbers."
            )
    return dataset
