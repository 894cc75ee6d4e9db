"""What the stage scripts share: a model, its data, and an evaluation by generation.

1. `open_model` reads everything about a model but its weights, which `Model.load` reads straight
   into their shards.
2. `open_data` tokenises a data set once and reports what was kept, cut and dropped.
3. The `require_*` functions refuse inputs that do not belong together.
4. `open_evaluation` puts prompts, sampler, reward functions and π_ref together.
"""

import logging
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
from etils import epath

from copg_jax import distributed, sharding
from copg_jax.cli import config_differences
from copg_jax.config import ModelConfig, PolicyEvaluationConfig, ScoreConfig
from copg_jax.data import scored
from copg_jax.data.dataset import GroupDataset, data_key, format_stats, is_prepared, prepare
from copg_jax.data.groups import TokenGroup
from copg_jax.data.tldr import DataConfig, GroupReader
from copg_jax.data.tokenizer import load_tokenizer, tokenizer_hash
from copg_jax.errors import InputError
from copg_jax.evaluate import GenerationEvaluator
from copg_jax.files import is_remote, scratch_folder
from copg_jax.forward import load_frozen
from copg_jax.models import flash, functional, hf_weights
from copg_jax.models.llama import LlamaConfig
from copg_jax.rewards import WeightedRewards
from copg_jax.sampling import make_sampler

log = logging.getLogger(__name__)

_UNREADABLE = "unreadable: "  # before what a process says instead of the key of its data


@dataclass(frozen=True)
class Model:
    """An architecture with its tokenizer, the folder of its weights, and where each weight lies."""

    config: LlamaConfig
    tokenizer: Any
    folder: Path
    head: str
    shardings: Any

    @cached_property
    def hash(self) -> str:
        """Hash of the weights and config on disk."""
        return hf_weights.params_hash(self.folder)

    def load(self, *, score_key: jax.Array | None = None) -> Any:
        """Reads the float32 weights into their shards.

        Args:
            score_key: draws a score head that the folder lacks.
        """
        return hf_weights.load_params(
            self.folder,
            self.config,
            head=self.head,
            shardings=self.shardings,
            init_missing_score=score_key,
        )

    def load_frozen(self) -> Any:
        """Reads weights that are only read (π_ref), into the compute dtype."""
        return load_frozen(self.folder, self.config, head=self.head, shardings=self.shardings)


def open_model(
    section: ModelConfig, mesh: jax.sharding.Mesh, *, head: str = "lm", remat: str = "none"
) -> Model:
    """Reads everything about a model but its weights, and checks that the parts fit.

    Args:
        section: where it is and how it is computed.
        mesh: the device mesh.
        head: "lm" or "score".
        remat: what a backward pass recomputes; key of `llama.REMAT_POLICIES`.

    Raises:
        InputError: no such folder, not a Llama, a tokenizer with more ids than the model has, a
            mesh that does not divide it, or an attention that cannot run there.
    """
    folder = hf_weights.resolve(section.path, section.revision)
    config = replace(hf_weights.read_config(folder), dtype=section.dtype, remat=remat)
    config = flash.choose(section.attention, config, mesh)
    tokenizer = load_tokenizer(folder)
    if len(tokenizer) > config.vocab_size:
        raise InputError(
            f"{folder}: the tokenizer has {len(tokenizer)} ids, the model only {config.vocab_size} "
            "(vocab_size in config.json): they do not belong together. Fix: use the tokenizer "
            "files that came with these weights."
        )
    axes = functional.logical_axes(config, head=head)
    shapes = functional.abstract_params(config, head=head)
    return Model(config, tokenizer, folder, head, sharding.shardings(mesh, axes, shapes))


def open_data(section: DataConfig, model: Model, folder: epath.Path, name: str) -> GroupDataset:
    """Tokenises a data set into `folder`/tokens (once) and logs what was kept, cut and dropped."""
    path = scratch_folder(folder, jax.process_index()) / "tokens" / f"{name}.arrow"
    rows, vocab_size = GroupReader(section), model.config.vocab_size
    turn: AbstractContextManager[None] = nullcontext()
    if jax.process_count() > 1:
        try:
            key = data_key(rows, model.tokenizer, section.limits, vocab_size)
        except InputError as error:
            key = f"{_UNREADABLE}{error}"  # the others wait to hear of this process
        _require_same(key, section.path)
        # What processes share, one of them makes; where each has its own, nobody waits.
        if not is_remote(folder):
            turn = distributed.main_first(path, lambda: is_prepared(path, key))
    with turn:
        dataset = prepare(
            rows, model.tokenizer, path=path, limits=section.limits, vocab_size=vocab_size
        )
    log.info("%s: %s\n%s", name, section.path, format_stats(dataset.stats))
    prompt, _, completion = dataset.shape(multiple=1)
    if prompt + completion > model.config.max_position_embeddings:
        raise InputError(
            f"{section.path}: prompts of up to {prompt} and completions of up to {completion} "
            f"tokens, but {model.folder} was made for {model.config.max_position_embeddings} "
            "positions (max_position_embeddings). Fix: lower data.max_prompt_tokens or "
            "data.max_completion_tokens."
        )
    return dataset


def _require_same(key: str, path: str) -> None:
    """Raises InputError, in every process, unless all of them read the same data."""
    keys = distributed.from_all(key)
    failed = [index for index, other in enumerate(keys) if other.startswith(_UNREADABLE)]
    if failed:
        raise InputError(
            f"data.path {path}: process {', '.join(map(str, failed))} of {len(keys)} cannot read "
            f"it: {keys[failed[0]].removeprefix(_UNREADABLE)}"
        )
    others = [str(index) for index, other in enumerate(keys) if other != keys[0]]
    if others:
        raise InputError(
            f"data.path {path}: wanted the same files and tokenizer in all {len(keys)} processes, "
            f"got others in process {', '.join(others)} than in process 0. Fix: copy them to every "
            "host anew, or point data.path at a shared folder or bucket."
        )


def require_rewards(dataset: GroupDataset, *, at_least: int) -> None:
    """Raises InputError unless all groups have rewards and some have `at_least` completions."""
    _, num_completions, _ = dataset.shape()
    if not dataset.has_rewards or num_completions < at_least:
        raise InputError(
            f"data: wanted {at_least} or more completions with a reward or a human choice for "
            f"every prompt, got at most {num_completions} completion(s), rewards "
            f"{'present' if dataset.has_rewards else 'missing'}. Fix: point "
            "data.path at comparisons or at a folder that experiments.score wrote."
        )


def require_scored(section: DataConfig, model: Model, dataset: GroupDataset) -> None:
    """Raises InputError unless the data was scored, to its end, with this reference model and
    tokenizer.
    """
    require_rewards(dataset, at_least=2)
    if not dataset.has_ref_logps:
        raise InputError(
            f"data.path {section.path}: has rewards but no ref_logps, the log-probabilities "
            "under the reference. Fix: run experiments.score on it and point data.path at the "
            "folder that writes."
        )
    scored.verify(
        epath.Path(section.path),
        tokenizer_hash=tokenizer_hash(model.tokenizer),
        reference_hash=model.hash,
    )


def require_comparable(policy: Model, reference: Model) -> None:
    """Raises InputError unless ln π − ln π_ref of the same tokens means something.

    Architecture, tokenizer and compute dtype must be equal: a reference in another dtype differs
    from the policy by rounding, which reads as KL.
    """
    config = replace(reference.config, remat=policy.config.remat)
    if config != policy.config:
        raise InputError(
            f"reference {reference.folder}: wanted the architecture and dtype of the policy "
            f"{policy.folder}, got (reference -> policy) "
            + ", ".join(config_differences(config, policy.config))
        )
    if tokenizer_hash(reference.tokenizer) != tokenizer_hash(policy.tokenizer):
        raise InputError(
            f"reference {reference.folder}: its tokenizer is not that of the policy "
            f"{policy.folder}, so the same text has other tokens. Fix: use the model that the "
            "policy was trained from."
        )


def side_car(config: ScoreConfig, reference: Model, rewards: WeightedRewards) -> scored.SideCar:
    """What a scored folder is made of, before its first part is written."""
    return scored.SideCar(
        tokenizer_hash=tokenizer_hash(reference.tokenizer),
        reference_hash=reference.hash,
        rewards=rewards.provenance,
        limits=config.data.limits._asdict(),
        complete=False,
    )


def _first_prompts(dataset: GroupDataset, num_prompts: int, path: str) -> list[TokenGroup]:
    """The first different prompts of a data set (comparisons repeat theirs)."""
    prompts: dict[str, TokenGroup] = {}
    for group in dataset:
        prompts.setdefault(group.prompt, group)
        if len(prompts) == num_prompts:
            return list(prompts.values())
    raise InputError(
        f"evaluation.data: wanted {num_prompts} different prompts, got {len(prompts)} from {path}. "
        f"Fix: more data, or evaluation.generation.num_prompts={len(prompts)}."
    )


def open_evaluation(
    section: PolicyEvaluationConfig,
    model: Model,
    mesh: jax.sharding.Mesh,
    folder: epath.Path,
    *,
    beta: float,
    reference: Model | None,
    logits_chunk: int | None = None,
) -> GenerationEvaluator:
    """Builds the evaluation by generation: prompts, sampler, reward functions, π_ref.

    Args:
        section: data, rewards and sizes.
        model: the policy's architecture and tokenizer.
        mesh: the device mesh.
        folder: where the tokenised prompts are kept.
        beta: β of the reported objective.
        reference: π_ref, loaded here and held; None for no KL.
        logits_chunk: see `logprobs.token_logp`.

    Raises:
        InputError: fewer different prompts than asked for, unusable rewards, or a reference that
            cannot be compared with the policy.
    """
    if reference is not None:
        require_comparable(model, reference)
    generation = section.generation
    dataset = open_data(section.data, model, folder, "prompts")
    prompts = _first_prompts(dataset, generation.num_prompts, section.data.path)
    rewards = WeightedRewards(section.rewards)
    sampler = make_sampler(
        model.config,
        eos_id=model.tokenizer.eos_token_id,
        max_new_tokens=generation.max_new_tokens,
        num_samples=generation.num_samples,
        temperature=generation.sampling_temperature,
        mesh=mesh,
        param_shardings=model.shardings,
    )
    inputs = {"evaluation.data": dataset.fingerprint, "evaluation.rewards": rewards.fingerprint}
    if reference is not None:
        inputs["reference"] = reference.hash
    return GenerationEvaluator(
        model.config,
        sampler=sampler,
        prompts=prompts,
        tokenizer=model.tokenizer,
        rewards=rewards,
        generation=generation,
        beta=beta,
        mesh=mesh,
        ref_params=reference and reference.load_frozen(),
        logits_chunk=logits_chunk,
        inputs=inputs,
    )
