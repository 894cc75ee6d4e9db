"""What rounds cannot be made of, said before any of them."""

from collections.abc import Iterator

import numpy as np
import pytest
from etils import epath

from copg_jax import reuse
from copg_jax.data.group_list import read_folder
from copg_jax.data.groups import GroupBatch
from copg_jax.train.online import RoundHook
from tests.interrupted import compilations_by_round
from tests.runs import json_rows
from tests.test_online import REWARDS, arguments
from tests.toys import names_all
from tests.workplace import Workplace


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Iterator[Workplace]:
    """A base model, and comparisons of other prompts and of the same that it has scored."""
    place = Workplace(tmp_path_factory.mktemp("offline"))
    base = f"reference.path={place.folder / 'base'}"
    whole = ["data.part=all", "data.holdout_fraction=0", "data.max_rows=null", REWARDS]
    with reuse.shared_by_runs():
        place.run("sample", f"model.path={place.folder / 'base'}")
        for name in ("sample", "comparisons"):
            data = place.comparisons if name == "comparisons" else place.folder / name
            own = [f"data.path={data}", f"output_dir={place.folder / ('scored_' + name)}"]
            place.run("score", base, *own, *whole)
        yield place


def offline(place: Workplace, name: str, share: float | None) -> list[str]:
    """Settings of scored data beside the samples."""
    shares = [] if share is None else [f"offline.share={share}"]
    own = [f"offline.path={place.folder / name}", "offline.max_completion_tokens=96"]
    return [*own, "offline.max_prompt_tokens=192", *shares]


ZERO = "loss.arguments={baseline: 40}"
REFUSED = {
    "one completion": (["sampling.num_samples=1"], ["sampling.num_samples", "2 or more"]),
    "more prompts than there are": (["prompts_per_round=25"], ["at most the 24 different", "25"]),
    "fewer prompts than a batch": (["prompts_per_round=7"], ["prompts_per_round", "at least 8"]),
    "no replay": (["replay_rounds=0"], ["replay_rounds must be >= 1"]),
    "one origin": (["loss.pairs=cross"], ["completions of two origins", "offline.path"]),
    "no rewards": (["rewards=[]"], ["rewards", "got none"]),
    "own rewards": (["rewards=[{function: copg_jax.rewards.given}]"], ["brings along"]),
    "no scores": (["offline.path=DATA/sft.jsonl", "offline.share=0.5"], ["experiments.score"]),
    "no share": (["offline.path=SCORED"], ["offline.share", "wanted one"]),
    "a share across": (
        ["offline.path=SCORED", "offline.share=0.5", "loss.pairs=cross"],
        ["offline.share", "wanted none", "pairs=cross"],
    ),
    "a reset beside": (
        ["offline.path=SCORED", "offline.share=0.5", "reference_every=1"],
        ["reference_every", "first reference"],
    ),
    "another dtype": (
        ["offline.path=SCORED", "offline.share=0.5", "model.dtype=bfloat16"],
        ["reference_dtype", "has bfloat16"],
    ),
    "data of no known policy": (
        ["offline.path=SCORED", "offline.share=0.5", "loss.name=topr", ZERO],
        ["offline.path", "scored_comparisons", "logp_mu", "experiments.sample", "copg"],
    ),
    "an engine's file says no policy": (
        ["loss.name=topr", ZERO, "generator.command=[true]"],
        ["generator", "wanted none", "topr", "copg"],
    ),
    "too long": (["sampling.max_new_tokens=4000"], ["max_position_embeddings", "4000"]),
    "an empty command": (["generator.command=[]"], ["command must be a program"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_round_can_be_made_of_is_refused_before_one_begins(place, case):
    settings, words = REFUSED[case]
    named = {"DATA": place.folder / "data", "SCORED": place.folder / "scored_comparisons"}
    for name, path in named.items():
        settings = [setting.replace(name, str(path)) for setting in settings]
    names_all(place.refusal("online", *arguments(place, "refused", *settings)), words)
    assert not (place.folder / "refused" / "rounds").exists()


def test_a_policy_of_a_loss_that_needs_ln_mu_is_not_trained_without(place):
    own = [f"model.path={place.folder / 'base'}", "validation=null", "loss.name=topr", ZERO]
    data = f"data.path={place.folder / 'scored_comparisons'}"
    names_all(place.refusal("policy", *own, data), ["data.path", "scored_comparisons", "logp_mu"])


def test_scored_data_of_another_reference_is_refused(place, tmp_path):
    other = tmp_path / "other"
    place.run("sft", f"model.path={place.folder / 'base'}", "validation=null",
              "training.max_steps=1", f"output_dir={other}")  # fmt: skip
    own = [f"model.path={other / 'model'}", *offline(place, "scored_comparisons", 0.5)]
    text = place.refusal("online", *arguments(place, "refused", *own))
    names_all(text, ["scored_comparisons", "reference_hash"])


@pytest.fixture
def batches(monkeypatch) -> list[tuple[list[str], GroupBatch]]:
    """The batches of a run that follows, each with the ids of its groups."""
    found: list[tuple[list[str], GroupBatch]] = []
    fetch = RoundHook.__next__
    monkeypatch.setattr(RoundHook, "__next__", lambda self: found.append(fetch(self)) or found[-1])
    return found


def test_scored_data_has_its_share_of_every_batch_beside_the_rounds_of_the_window(place, batches):
    """Two steps a round, on its samples and those of the round before; none is compiled later."""
    own = [*offline(place, "scored_comparisons", 0.75), "prompts_per_round=4", "rounds=4"]
    own += ["replay_rounds=2", "steps_per_round=2"]
    with compilations_by_round() as compiled:
        place.run("online", *arguments(place, "mixed", *own))
    assert compiled[0] >= 2 and compiled[2] == compiled[4] == compiled[6] == 0
    rounds = place.folder / "mixed" / "rounds"
    drawn = {  # by the prompt, which no other round has: the step at which it was drawn
        group.id: 2 * number
        for number in range(4)
        for group in read_folder(epath.Path(rounds / f"{number:05d}" / "scored"))
    }
    staleness = []
    for step, (ids, batch) in enumerate(batches):
        fresh = [name for name, own in zip(ids, batch.origin[:, 0], strict=True) if own == 0]
        assert len(ids) == 8 and len(fresh) == 2
        staleness.append([step - drawn[name] for name in fresh])
        assert set(staleness[-1]) <= {step % 2, *({step % 2 + 2} if step > 1 else ())}
    assert any(age > 1 for ages in staleness for age in ages)
    rows = json_rows(place.folder / "mixed" / "metrics.jsonl")
    wanted = [np.mean(staleness[at : at + 2]) for at in range(0, 8, 2)]
    assert [row["online/staleness"] for row in rows if "online/round" in row] == wanted


def test_a_loss_that_needs_ln_mu_has_that_of_each_sample(place, batches):
    own = ["loss.name=topr", ZERO, "rounds=3", "replay_rounds=2"]
    place.run("online", *arguments(place, "topr", *own))
    rounds = place.folder / "topr" / "rounds"
    drawn = {
        group.id: group
        for number in range(3)
        for group in read_folder(epath.Path(rounds / f"{number:05d}" / "scored"))
    }
    assert len(batches) == 3 and len(drawn) == 24
    for ids, batch in batches:
        for row, name in enumerate(ids):
            np.testing.assert_array_equal(batch.mu_logp[row], drawn[name].mu_logps)
    is_reference = [np.array_equal(batch.mu_logp, batch.ref_logp) for _, batch in batches]
    assert is_reference[0] and not is_reference[2]  # a later policy drew those


def test_pairs_across_origins_are_those_of_a_sample_and_an_offline_completion(place, batches):
    """Of prompts that both have: those that were sampled before."""
    own = [*offline(place, "scored_sample", None), "loss.pairs=cross", "rounds=2"]
    place.run("online", *arguments(place, "across", *own, "data.max_rows=null"))
    reports = [row for row in json_rows(place.folder / "across" / "metrics.jsonl")
               if "online/round" in row]  # fmt: skip
    assert [row["online/staleness"] for row in reports] == [0, 0]
    assert len(batches) == 2
    for _, batch in batches:
        for origins, lengths in zip(batch.origin, batch.completion_length, strict=True):
            assert set(origins[lengths > 0]) == {0, 1}
    text = place.refusal("online", *arguments(place, "few", *own, "prompts_per_round=25"))
    names_all(text, ["prompts_per_round", "24 different", "that offline.path answers", "25"])
