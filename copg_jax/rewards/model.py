"""The Bradley–Terry reward model as one reward function among others.

It gives the same number in training evaluation, rescoring and generation evaluation, because all of
them call it.
"""

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax

from copg_jax.config.sections import DTYPES, TEXT_FORMATS, Limits, MeshConfig, ModelConfig
from copg_jax.data import groups
from copg_jax.data.formats.choice import FORMATS, own_format
from copg_jax.data.formats.texts import Text, TextGroup
from copg_jax.data.groups import TokenGroup
from copg_jax.data.rows import InvalidRow
from copg_jax.data.tokenizer import Encoder
from copg_jax.errors import InputError
from copg_jax.hf.pretrained import open_model
from copg_jax.hf.weights import read_architecture, resolve
from copg_jax.infer import GroupForward
from copg_jax.models.forward import make_score
from copg_jax.sharding import make_mesh


class RewardModel:
    """A Bradley–Terry reward model as a reward function.

    Texts are tokenised with the model's own tokenizer and end in its EOS, whether or not the policy
    wrote one; messages in the turn end of its chat template.

    Args:
        path: folder or hub id that `AutoModelForSequenceClassification` (num_labels=1) could load.
        batch_size: groups per forward pass.
        dtype: compute dtype.
        max_prompt_tokens: longer TL;DR prompts are cut as in training, so this is the limit it was
            trained with.
        text_format: `data.format` of its training. "auto": each prompt says it, those in the frame
            of TL;DR are read in the format `tldr`, messages in `chat` and others in `text`.
    """

    on_accelerator = True

    def __init__(
        self,
        path: str,
        batch_size: int = 16,
        dtype: str = "float32",
        max_prompt_tokens: int = 512,
        text_format: str = "auto",
    ):
        for name, count in (("batch_size", batch_size), ("max_prompt_tokens", max_prompt_tokens)):
            if not isinstance(count, int) or isinstance(count, bool) or count < 1:
                raise InputError(f"{name}: wanted a whole number of at least 1, got {count!r:.80}")
        if dtype not in DTYPES:
            raise InputError(f"dtype: wanted one of {', '.join(DTYPES)}, got {dtype!r:.80}")
        if text_format not in TEXT_FORMATS:
            wanted = ", ".join(TEXT_FORMATS)
            raise InputError(f"text_format: wanted one of {wanted}, got {text_format!r:.80}")
        self._format = FORMATS.get(text_format)
        # All devices, whatever the run's mesh; the weights in as many pieces as are equal.
        width = read_architecture(resolve(path)).hidden_size
        shards = math.gcd(len(jax.devices()), width)
        mesh = make_mesh(MeshConfig(data=-1, fsdp=shards))
        model = open_model(ModelConfig(path, dtype=dtype), mesh, head="score")
        self.fingerprint = model.hash
        self._model = model
        self._encoder = Encoder(model.tokenizer)
        # Every completion gets a reward, however long it is.
        self._limits = Limits(max_prompt_tokens, max_completion_tokens=1 << 30)
        self._forward = GroupForward(
            make_score(model.arch, model.partitioner),
            model.load_frozen(),
            mesh=mesh,
            batch_size=batch_size,
            name=f"reward model {model.folder}",
        )

    def __call__(
        self, /, prompts: Sequence[Text], completions: Sequence[Text], **columns: Any
    ) -> list[float | None]:
        """Scores, reward units, one a completion; None for text without tokens, or with EOS."""
        runs = self._group(prompts, completions)
        scores = self._forward([group for group, _ in runs])
        rewards: list[float | None] = [None] * len(completions)
        for (_, indices), values in zip(runs, scores, strict=True):
            for index, value in zip(indices, values.tolist(), strict=True):
                rewards[index] = value
        return rewards

    def _group(
        self, prompts: Sequence[Text], completions: Sequence[Text]
    ) -> list[tuple[TokenGroup, list[int]]]:
        """Groups runs of equal prompts; each with the indices of its completions."""
        runs = itertools.groupby(range(len(prompts)), key=prompts.__getitem__)
        return [
            found for _, run in runs for found in self._tokenize(list(run), prompts, completions)
        ]

    def _render(self, text: TextGroup) -> TextGroup:
        """Texts in the format of the model's training.

        Raises:
            InvalidRow: they cannot be in this format, or it leaves them out.
        """
        format = self._format or own_format(text)
        if not format.recognises(text):
            reason = f"not in the format '{format.name}'"
        elif isinstance(rendered := format.render(text), TextGroup):
            return rendered
        else:
            reason = rendered
        raise InvalidRow(text.where, reason, f"the prompt cannot be read: {reason}.")

    def _tokenize(
        self, run: list[int], prompts: Sequence[Text], completions: Sequence[Text]
    ) -> list[tuple[TokenGroup, list[int]]]:
        """One group of a run; completions that spell EOS or have no tokens are left out."""
        text = TextGroup(
            id=str(run[0]),
            where=f"prompt {prompts[run[0]]!r:.60}",
            prompt=prompts[run[0]],
            completions=tuple(completions[i] for i in run),
        )
        try:
            rendered = self._render(text)
            tokens = groups.tokenize_group(rendered, self._encoder, self._limits, Counter())
        except InvalidRow as error:
            if error.reason not in (groups.EOS_INSIDE, groups.NO_TOKENS):
                raise InputError(
                    f"reward model: {error}\nIts own limit is the reward function's argument "
                    f"max_prompt_tokens={self._limits.max_prompt_tokens}; with text_format=text it "
                    "reads every prompt as it is."
                ) from error
            alone = [[i] for i in run] if len(run) > 1 else []
            return [found for one in alone for found in self._tokenize(one, prompts, completions)]
        assert isinstance(tokens, TokenGroup)  # nothing is dropped under these limits
        self._model.require_context(
            f"reward model: {text.where}",
            len(tokens.prompt_tokens),
            max(map(len, tokens.completion_tokens)),
            fix="shorter completions, or the reward function's argument max_prompt_tokens",
        )
        return [(tokens, run)]
