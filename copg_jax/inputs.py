"""What a stage reads: its data and its evaluation, opened and checked against its model.

1. `open_data` tokenises a data set once and reports what was kept, cut and dropped.
2. The `require_*` functions refuse inputs that do not belong together.
3. `open_evaluation` puts prompts, sampler, reward functions and π_ref together.
"""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace
from functools import partial

import jax
from etils import epath

from copg_jax import distributed, reuse
from copg_jax.config.load import config_differences
from copg_jax.config.sections import DataConfig
from copg_jax.config.stages import PolicyEvaluationConfig
from copg_jax.data import sampled, scored
from copg_jax.data.dataset import GroupDataset, data_key, format_stats, is_prepared, prepare
from copg_jax.data.formats.texts import stored_text
from copg_jax.data.groups import REPEATED, GroupBatch, TokenGroup
from copg_jax.data.reader import GroupReader
from copg_jax.data.rows import InvalidRow, read_rows
from copg_jax.data.sources import describe_files, find_files, is_hub_id
from copg_jax.data.stream import Groups
from copg_jax.data.tokenizer import Encoder, tokenizer_hash
from copg_jax.errors import InputError
from copg_jax.evaluate import GenerationEvaluator, Generator
from copg_jax.files import is_remote, scratch_folder
from copg_jax.generation import open_sampler
from copg_jax.hf.pretrained import PretrainedModel
from copg_jax.models.forward import make_token_logp
from copg_jax.rewards.functions import WeightedRewards
from copg_jax.sharding import batch_sharding, replicated

log = logging.getLogger(__name__)

_UNREADABLE = "unreadable: "  # before what a process says instead of the key of its data


def open_data(
    section: DataConfig,
    model: PretrainedModel,
    folder: epath.Path,
    name: str,
    *,
    chosen_only: bool = False,
    by_choice: bool = False,
    prompts_only: bool = False,
    changes: bool = False,
) -> GroupDataset:
    """Tokenises a data set into `folder`/tokens (once) and logs what was kept, cut and dropped.

    Args:
        section: the data.
        model: whose tokenizer and sizes count.
        folder: output folder of the run.
        name: of the file and in the log.
        chosen_only: see `GroupReader`.
        by_choice: see `GroupReader`.
        prompts_only: see `GroupReader`.
        changes: whether the path will hold other data, so that runs of a process cannot share it.
    """
    path = scratch_folder(folder, jax.process_index()) / "tokens" / f"{name}.arrow"
    rows = GroupReader(
        section, chosen_only=chosen_only, by_choice=by_choice, prompts_only=prompts_only
    )
    vocab_size = model.arch.vocab_size
    turn: AbstractContextManager[None] = nullcontext()
    encoder = Encoder(model.tokenizer, model.end_ids)
    if jax.process_count() > 1:
        try:
            of_data = data_key(rows, encoder, section.limits, vocab_size)
        except InputError as error:
            of_data = f"{_UNREADABLE}{error}"  # the others wait to hear of this process
        _require_same(of_data, section.path)
        # What processes share, one of them makes; where each has its own, nobody waits.
        if not is_remote(folder):
            turn = distributed.main_first(path, lambda: is_prepared(path, of_data))
    with turn:
        own = repr(section), chosen_only, by_choice, prompts_only
        make = partial(
            prepare,
            rows,
            model.tokenizer,
            path=path,
            limits=section.limits,
            vocab_size=vocab_size,
            end_ids=model.end_ids,
        )
        key = *own, *encoder.reads_by, vocab_size
        dataset = make() if changes else reuse.once("data", key, make)
    _report(dataset, section, name)
    prompt, _, completion = dataset.shape(multiple=1)
    fix = "lower data.max_prompt_tokens or data.max_completion_tokens"
    model.require_context(section.path, prompt, completion, fix=fix)
    return dataset


def prepared_bytes(*sections: DataConfig | None) -> int:
    """About what `open_data` writes of data: an id has 4 bytes, and its text, kept too, as many.

    Data that is not on this disk yet counts as 0. So does what cannot be found: `open_data` tells.
    """
    num_bytes = 0
    for section in sections:
        if section is not None and not (is_remote(section.path) or is_hub_id(section.path)):
            with suppress(InputError, OSError):
                files = find_files(section.path, section.split)
                num_bytes += 2 * sum(file.stat().st_size for file in files)
    return num_bytes


def _report(dataset: GroupDataset, section: DataConfig, name: str) -> None:
    """Logs which files were read, as what, and what became of their rows."""
    path, stats = section.path, dataset.stats
    log.info("%s: %s, %s", name, path, describe_files(path, section.split))
    by = "its first row" if section.format == "auto" else "data.format"
    by = "how it was scored" if scored.is_scored(path) else by
    by = "how it was sampled" if sampled.is_sampled(path) else by
    log.info("%s: text format '%s', by %s\n%s", name, stats["text_format"], by, format_stats(stats))
    if repeated := stats["changed"].get(REPEATED):
        log.warning(
            "%s: in %d of %d rows every completion begins with the prompt, so that models see it "
            "twice. Where rows hold whole dialogues, take the prompt off their completions.",
            name,
            repeated,
            stats["kept"],
        )


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


def warn_of_overlap(dataset: Groups, held_out: GroupDataset) -> None:
    """Says how many groups of a held-out set have posts, or other prompts, that are trained on."""
    trained = set(dataset.posts())
    shared = sum(post in trained for post in held_out.posts())
    if shared:
        log.warning(
            "validation: the posts of %d of its %d groups are trained on as well, so that its loss "
            "says little. Fix: hold posts out with data.holdout_fraction=0.05 data.part=train, "
            "validation.holdout_fraction=0.05 validation.part=validation.",
            shared,
            len(held_out),
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


def require_preferences(section: DataConfig) -> None:
    """Raises InputError, before the data is read, where its first row prefers no completion."""
    first = next(iter(GroupReader(section)), None)
    if first is not None and first.rewards is None:
        raise InputError(
            f"{first.where}: wanted two or more completions with a human choice or rewards, got "
            f"{len(first.completions)} without. Fix: let data.path name rows with `prompt`, "
            "`chosen` and `rejected`, or with `completions` and `rewards`."
        )


def require_answers(prompts: str | None, section: DataConfig, dataset: GroupDataset) -> None:
    """Raises InputError unless data answer every prompt of a file, and no other.

    Args:
        prompts: the prompts.jsonl that an engine was given; None for data of something else.
        section: the data.
        dataset: the data, tokenised.
    """
    if prompts is None:
        return
    asked = {}
    for where, row in read_rows(prompts):
        ids = None if isinstance(row, InvalidRow) else row.get("prompt_token_ids")
        if ids is None:
            raise InputError(f"{where}: prompts: wanted `prompt_token_ids`, as sample writes them.")
        asked[tuple(ids)] = where
    answered = {tuple(group.prompt_tokens.tolist()): group.where for group in dataset}
    missing = [where for ids, where in asked.items() if ids not in answered]
    others = [where for ids, where in answered.items() if ids not in asked]
    if missing or others:
        raise InputError(
            f"data.path {section.path}: wanted the {len(asked)} prompts of {prompts}, got "
            f"{len(answered)}; {len(missing)} are missing{' (' * bool(missing)}"
            f"{', '.join(missing[:4])}{')' * bool(missing)} and {len(others)} are others"
            f"{' (' * bool(others)}{', '.join(others[:4])}{')' * bool(others)}. Fix: let the "
            "engine answer all of them, once; or leave `prompts` out."
        )


def require_scored_folder(section: DataConfig) -> None:
    """Raises InputError, before the data is read, unless it was scored."""
    if not scored.is_scored(section.path):
        raise InputError(
            f"data.path {section.path}: wanted a folder that experiments.score wrote; other data "
            "has no ref_logp, the log-probabilities under the reference. Fix: run "
            "experiments.score on it and point data.path at the folder that writes."
        )


def require_same_reference(
    section: DataConfig, model: PretrainedModel, dataset: GroupDataset
) -> None:
    """Raises InputError unless the data was scored with this reference model, in this dtype."""
    scored.verify(section.path, reference_hash=model.hash, reference_dtype=model.arch.dtype)
    require_rewards(dataset, at_least=2)


def require_comparable(policy: PretrainedModel, reference: PretrainedModel) -> None:
    """Raises InputError unless ln π − ln π_ref of the same tokens means something.

    Architecture, tokenizer and compute dtype must be equal: a reference in another dtype differs
    from the policy by rounding, which reads as KL.
    """
    arch = replace(reference.arch, remat=policy.arch.remat)
    if arch != policy.arch:
        raise InputError(
            f"reference {reference.folder}: wanted the architecture and dtype of the policy "
            f"{policy.folder}, got (reference -> policy) "
            + ", ".join(config_differences(arch, policy.arch))
        )
    if tokenizer_hash(reference.tokenizer) != tokenizer_hash(policy.tokenizer):
        raise InputError(
            f"reference {reference.folder}: its tokenizer is not that of the policy "
            f"{policy.folder}, so the same text has other tokens. Fix: use the model that the "
            "policy was trained from."
        )


def _first_prompts(dataset: GroupDataset, num_prompts: int, path: str) -> list[TokenGroup]:
    """The first different prompts of a data set (comparisons repeat theirs)."""
    prompts: dict[str, TokenGroup] = {}
    for group in dataset:
        prompts.setdefault(stored_text(group.prompt), group)
        if len(prompts) == num_prompts:
            return list(prompts.values())
    raise InputError(
        f"evaluation.data: wanted {num_prompts} different prompts, got {len(prompts)} from {path}. "
        f"Fix: more data, or evaluation.generation.num_prompts={len(prompts)}."
    )


def _load_token_logp(
    reference: PretrainedModel, mesh: jax.sharding.Mesh, logits_chunk: int | None
) -> Callable[[GroupBatch], jax.Array]:
    """ln π_ref of the tokens of a batch, nats, [B, K, C]; holds the weights."""
    arch = replace(reference.arch, remat="none")  # nothing is differentiated

    def make() -> Callable[[GroupBatch], jax.Array]:
        token_logp = jax.jit(
            make_token_logp(arch, reference.partitioner, chunk=logits_chunk),
            in_shardings=(None, batch_sharding(mesh)),
            out_shardings=replicated(mesh),
        )
        # An argument of the compiled function, not a constant inside it.
        return partial(token_logp, reference.load_frozen())

    key = reference.hash, arch, mesh, logits_chunk
    return reuse.once("reference", key, make, only_newest=True)


def open_evaluation(
    section: PolicyEvaluationConfig,
    model: PretrainedModel,
    folder: epath.Path,
    *,
    beta: float,
    reference: PretrainedModel | None,
    logits_chunk: int | None = None,
) -> tuple[GenerationEvaluator, dict[str, str]]:
    """Builds the evaluation by generation: prompts, sampler, reward functions, π_ref.

    Args:
        section: data, rewards and sizes.
        model: the policy's architecture and tokenizer.
        folder: where the tokenised prompts are kept.
        beta: β of the reported objective.
        reference: π_ref, loaded here and held; None for no KL.
        logits_chunk: see `logprobs.hidden_to_logp`.

    Returns:
        The evaluation, and hashes of what it reads by name.

    Raises:
        InputError: fewer different prompts than asked for, too long a completion to generate,
            unusable rewards, or a reference that cannot be compared with the policy.
    """
    if reference is not None:
        require_comparable(model, reference)
    generation = section.generation
    dataset = open_data(section.data, model, folder, "prompts", prompts_only=True)
    prompts = _first_prompts(dataset, generation.num_prompts, section.data.path)
    model.require_context(
        "evaluation.generation",
        max(len(group.prompt_tokens) for group in prompts),
        generation.max_new_tokens,
        fix="lower evaluation.data.max_prompt_tokens or evaluation.generation.max_new_tokens",
    )
    rewards = reuse.once(
        "rewards",
        repr(section.rewards),
        lambda: WeightedRewards(section.rewards),
        only_newest=True,
    )
    hashes = {"evaluation.data": dataset.fingerprint, "evaluation.rewards": rewards.fingerprint}
    ref_token_logp = None
    if reference is not None:
        hashes["reference"] = reference.hash
        ref_token_logp = _load_token_logp(reference, model.mesh, logits_chunk)
    sampler = open_sampler(
        model,
        max_new_tokens=generation.max_new_tokens,
        num_samples=generation.num_samples,
        temperature=generation.sampling_temperature,
    )
    tokens = model.tokenizer.convert_ids_to_tokens(model.end_ids)
    log.info("generations end in one of: %s", ", ".join(map(repr, tokens)))
    text_of = Encoder(model.tokenizer).completion_text
    names = f"policy {model.folder}", f"reference {reference and reference.folder}"
    generator = Generator(sampler, text_of, model.mesh, ref_token_logp, *names)
    return GenerationEvaluator(generation, prompts, generator, rewards, beta=beta), hashes
