"""Samples of any number of prompts: sorted by length into batches, back in the order they came.

1. `PromptSampler` runs a sampler over prompts, batch by batch.
2. `Completer` makes groups of what it drew: ids, texts, how each ended, ln µ.
3. `sample_dataset` writes those of a data set, in resumable parts.
"""

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from jax import Array

from copg_jax import distributed, reuse, sharding
from copg_jax.config.sections import Limits, SamplingConfig
from copg_jax.data import sampled
from copg_jax.data.formats.choice import FORMATS, text_format_hash
from copg_jax.data.groups import GroupBatch, TokenGroup
from copg_jax.data.sources import SAMPLES
from copg_jax.data.tokenizer import Encoder
from copg_jax.hf.pretrained import PretrainedModel
from copg_jax.infer import not_finite, one_late
from copg_jax.models.layout import ReusedShapes, Shape, pack_by_length
from copg_jax.models.one_shape import OneShape
from copg_jax.part_loop import PartFiles, make_parts
from copg_jax.runtime import Progress, make_pause
from copg_jax.sampling import Sampler, Samples, make_sampler

log = logging.getLogger(__name__)


class Launched(NamedTuple):
    """A batch that was given to the device."""

    rows: np.ndarray  # int [B], index of the prompt in each place; -1 = none
    samples: Samples  # of each place
    batch: GroupBatch  # the prompts on the device, laid out with room for all completions


class PromptSampler:
    """Applies a sampler to any number of prompts.

    Args:
        sample: from `sampling.make_sampler`, built with these numbers.
        mesh: the device mesh.
        batch_size: prompts at a time.
        num_samples: K.
        max_new_tokens: C.
        shapes: where calls differ in their prompts, so that few shapes are compiled; or one, made
            for prompts without completions; None for the same prompts at every call.
    """

    def __init__(
        self,
        sample: Sampler,
        *,
        mesh: jax.sharding.Mesh,
        batch_size: int,
        num_samples: int,
        max_new_tokens: int,
        shapes: ReusedShapes | OneShape | None = None,
    ) -> None:
        self._sample, self._batch_size, self._shapes = sample, batch_size, shapes
        self.num_samples, self.max_new_tokens = num_samples, max_new_tokens
        self._num_bins = sharding.num_batch_shards(mesh)
        self._placement = sharding.batch_sharding(mesh)

    def launched(
        self, params: Any, prompts: Sequence[TokenGroup], keys: Array
    ) -> Iterator[Launched]:
        """Starts batch after batch, from the longest prompts to the shortest.

        Args:
            params: of the model.
            prompts: their completions do not matter.
            keys: one a prompt, [n]: its samples depend on this alone, whatever its batch.
        """
        lengths = [(len(prompt.prompt_tokens), 0) for prompt in prompts]
        num_tokens = np.array(lengths, int).reshape(-1, 2)
        if isinstance(self._shapes, OneShape):
            batches = [self._shapes.pack(num_tokens)]
        else:
            batches = pack_by_length(
                num_tokens,
                batch_size=self._batch_size,
                num_bins=self._num_bins,
                sizes=(self.num_samples, self.max_new_tokens),
            )
        for packed in batches:
            shape = packed.shape.with_all_completions()  # they may become as long as they can
            if isinstance(self._shapes, ReusedShapes):
                shape = self._shapes.fit_prompts(shape)
            for rows in packed.rows:
                groups = [None if row < 0 else prompts[row] for row in rows]
                yield self._launch(params, groups, keys[np.maximum(rows, 0)], rows, shape)

    def _launch(
        self,
        params: Any,
        prompts: Sequence[TokenGroup | None],
        keys: Array,
        rows: np.ndarray,
        shape: Shape,
    ) -> Launched:
        blank = (np.zeros(self.max_new_tokens, np.int32),) * self.num_samples
        nothing = {"rewards": None, "ref_logps": None, "origin": None, "completion_tokens": blank}
        host = shape.collate([prompt and replace(prompt, **nothing) for prompt in prompts])
        # The model wants at least one token, but the sampler shall leave empty rows empty.
        length = np.where(rows < 0, 0, host.prompt_length)
        alone = shape.prompt_layout(host.prompt_length)
        batch, length, alone = distributed.place_whole((host, length, alone), self._placement)
        samples = self._sample(params, batch.prompt_tokens, length, alone, keys)
        return Launched(rows, samples, batch)


@dataclass(frozen=True)
class Completer:
    """Completes prompts with samples of one model; holds no weights.

    Compiled once for prompts of similar length, so that it can be called in a loop.
    """

    sampler: PromptSampler
    encoder: Encoder
    name: str  # of the model, for messages
    pause: Callable[[], None]  # called between two batches, see `runtime.make_pause`

    def __call__(
        self, params: Any, prompts: Sequence[TokenGroup], keys: Array, *, origin: int = 0
    ) -> list[TokenGroup]:
        """The prompts, each with K completions of its own; in the same order.

        Args:
            params: of the model.
            prompts: groups, whose completions are left out.
            keys: one a prompt, see `sampling.row_keys`.
            origin: of the completions.

        Raises:
            InputError: ln µ that is not finite.
        """
        found: list[TokenGroup | None] = [None] * len(prompts)
        done = 0
        with Progress(self.name, len(prompts), "prompts") as progress:
            for launched in one_late(self.sampler.launched(params, prompts, keys)):
                samples = jax.device_get(launched.samples)
                for place, row in enumerate(launched.rows):
                    if row >= 0:
                        own = Samples(*(values[place] for values in samples))
                        found[row] = self._group(prompts[row], own, origin)
                        done += 1
                progress.update(done)
                self.pause()
        return [group for group in found if group is not None]

    def _group(self, prompt: TokenGroup, samples: Samples, origin: int) -> TokenGroup:
        """A prompt with its samples; arrays of them are [K] and [K, C]."""
        ids = [
            tokens[:length] for tokens, length in zip(samples.tokens, samples.length, strict=True)
        ]
        texts = [
            self.encoder.completion_text(own[: len(own) - ended])
            for own, ended in zip(ids, samples.has_eos, strict=True)
        ]
        logps = np.asarray(samples.mu_token_logp, np.float64).sum(-1)
        for text, logp in zip(texts, logps, strict=True):
            if not np.isfinite(logp):
                raise not_finite(self.name, logp, prompt.where, text)
        return replace(
            prompt,
            completions=tuple(map(FORMATS[prompt.format].answer, texts)),
            completion_tokens=tuple(ids),
            rewards=None,
            ref_logps=None,
            has_eos=np.asarray(samples.has_eos),
            origin=np.full(len(ids), origin, np.int8),
            mu_logps=np.asarray(logps, np.float32),
            kept=None,
        )


def open_sampler(
    model: PretrainedModel,
    *,
    max_new_tokens: int,
    num_samples: int,
    temperature: float,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Sampler:
    """The sampler of a model, see `make_sampler` for the options; runs of one study share it."""
    arch = replace(model.arch, remat="none")  # nothing is differentiated
    options = {
        "end_ids": tuple(model.end_ids),
        "max_new_tokens": max_new_tokens,
        "num_samples": num_samples,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "mesh": model.mesh,
    }
    key = arch, *options.values()
    return reuse.once("sampler", key, lambda: make_sampler(arch, **options))


def make_completer(
    config: SamplingConfig,
    model: PretrainedModel,
    *,
    batch_size: int,
    shapes: ReusedShapes | OneShape | None = None,
) -> Completer:
    """The samples of a model, as a config wants them.

    Args:
        config: what is drawn.
        model: its architecture and tokenizer.
        batch_size: prompts at a time.
        shapes: of batches; None: few, of those that come.
    """
    sample = open_sampler(
        model,
        max_new_tokens=config.max_new_tokens,
        num_samples=config.num_samples,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
    )
    sampler = PromptSampler(
        sample,
        mesh=model.mesh,
        batch_size=batch_size,
        num_samples=config.num_samples,
        max_new_tokens=config.max_new_tokens,
        shapes=shapes or ReusedShapes(),
    )
    name = f"samples of {model.folder}"
    return Completer(sampler, Encoder(model.tokenizer), name, make_pause(model.mesh))


def warn_of_cuts(config: SamplingConfig) -> None:
    """Says what top-k and top-p do to the theory, where they are set."""
    if config.top_k or config.top_p:
        log.warning(
            "sampling.top_k and top_p cut completions off µ that π_ref can write. Theorem 1 wants "
            "equal supports: what is never drawn keeps its log-ratio, and CoPG no longer ends at π*"
        )


def describe_samples(
    config: SamplingConfig,
    model: PretrainedModel,
    *,
    text_format: str,
    limits: Limits,
    model_hash: str | None = None,
    counts: Mapping[str, Any] | None = None,
) -> sampled.Sampled:
    """What a folder of samples is made of, before its first part is written.

    Args:
        config: what is drawn.
        model: that draws it.
        text_format: of the prompts.
        limits: that the prompts were read with.
        model_hash: of its weights; None: as they are in its folder.
        counts: of the prompts.
    """
    encoder = Encoder(model.tokenizer)
    return sampled.Sampled(
        tokenizer_hash=encoder.hash,
        text_format=text_format,
        text_format_hash=text_format_hash(text_format, encoder),
        model_hash=model_hash or model.hash,
        model_dtype=model.arch.dtype,
        sampling=asdict(config),
        limits=limits._asdict(),
        complete=False,
        counts=dict(counts or {}),
    )


def sample_dataset(
    prompts: Sequence[TokenGroup],
    *,
    folder: epath.Path,
    part_size: int,
    completer: Completer,
    params: Any,
    keys: Array,
    origin: int,
    side_car: sampled.Sampled,
    quiet: bool = False,
) -> None:
    """Samples completions of every prompt and writes the folder of samples.

    Args:
        prompts: in their order.
        folder: where part-*.parquet and sampled.json go.
        part_size: prompts a part.
        completer: draws them.
        params: of the model.
        keys: one a prompt, of all its draws; see `sampling.row_keys`.
        origin: of the completions.
        side_car: what decides them; written as incomplete first and as complete at the end.
        quiet: nothing on the console.
    """
    of_prompts = [(prompt.id, prompt.prompt_tokens.tolist()) for prompt in prompts]
    decides = json.dumps([asdict(side_car), of_prompts, part_size])
    key = hashlib.sha256(decides.encode()).hexdigest()

    def make(indices: range) -> tuple[list[TokenGroup], dict[str, float]]:
        begin, own = time.perf_counter(), slice(indices.start, indices.stop)
        groups = completer(params, prompts[own], keys[own], origin=origin)
        return groups, summarize_samples(groups, time.perf_counter() - begin)

    side_car = make_parts(
        make,
        len(prompts),
        folder=folder,
        part_size=part_size,
        files=PartFiles(
            folder / SAMPLES,
            whole=lambda: sampled.whole_samples(folder, key),
            write=lambda index, groups, _: sampled.write_samples(folder, index, groups, key),
            save=lambda side_car: sampled.save_sampled(folder, side_car),
        ),
        side_car=side_car,
        quiet=quiet,
    )
    with distributed.main_first(folder):
        if distributed.is_main_process():
            sampled.save_sampled(folder, replace(side_car, complete=True))


def summarize_samples(groups: Sequence[TokenGroup], seconds: float) -> dict[str, float]:
    """Averages of samples, and their pace."""
    lengths = [len(ids) for group in groups for ids in group.completion_tokens]
    ended = np.concatenate([group.has_eos for group in groups if group.has_eos is not None])
    logps = np.concatenate([group.mu_logps for group in groups if group.mu_logps is not None])
    return {
        "samples/length": float(np.mean(lengths)),
        "samples/eos_rate": float(ended.mean()),
        "samples/mu_logp": float(logps.mean()),
        "perf/tokens_per_sec": sum(lengths) / seconds,
        "perf/groups_per_sec": len(groups) / seconds,
    }
