"""Rounds whose samples another program draws, and what is said of one that fails."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from etils import epath

from copg_jax import reuse, scoring
from copg_jax.data.group_list import read_folder
from copg_jax.hf import weights as hf_weights
from tests.runs import json_rows
from tests.test_online import REWARDS
from tests.toys import names_all
from tests.workplace import Workplace

ENGINE = """
import json, sys, time
seed, model, asked, out = sys.argv[1:]
rows = [json.loads(line) for line in open(asked)]
for row in rows:
    row["completions"] = ["a b", "c"]
    row["completion_token_ids"] = [[60, 61], [62, int(seed) % 50 + 3]]
    row["finish_reason"] = ["length", "length"]
print("read", len(rows), "prompts of", model, flush=True)
{body}
open(out, "w").write("".join(json.dumps(row) + chr(10) for row in rows))
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Iterator[Workplace]:
    """A base model; runs share what they compile."""
    place = Workplace(tmp_path_factory.mktemp("engine"))
    with reuse.shared_by_runs():
        yield place


def arguments(place: Workplace, name: str, body: str = "", *more: str) -> list[str]:
    """Of two rounds whose samples a program draws that does this as well."""
    program = place.folder / f"{name}.py"
    program.write_text(ENGINE.format(body=body))
    generator = f"generator={{command: [python, {program}, '{{seed}}'], timeout_sec: 60}}"
    own = [f"model.path={place.folder / 'base'}", REWARDS, "evaluation=null", "rounds=2"]
    return [*own, f"output_dir={place.folder / name}", generator, *more]


def test_an_engine_draws_from_the_policy_of_each_round_what_is_scored_and_trained_on(place):
    keep = "import shutil; shutil.copytree(model, out + seed)"
    place.run("online", *arguments(place, "whole", keep))
    folder = place.folder / "whole" / "rounds"
    rounds = [list(read_folder(epath.Path(folder / f"{at:05d}" / "scored"))) for at in (0, 1)]
    lasts = [{int(group.completion_tokens[1][1]) for group in groups} for groups in rounds]
    assert len(lasts[0]) == len(lasts[1]) == 1 and lasts[0] != lasts[1]  # another seed each round
    for groups in rounds:
        for group in groups:
            assert group.completion_tokens[0].tolist() == [60, 61] and group.mu_logps is None
            assert group.has_eos is not None and not group.has_eos.any()
    asked = json_rows(folder / "00000" / "prompts.jsonl")
    assert [row["id"] for row in asked] == [group.id for group in rounds[0]]
    models = sorted(folder.glob("*/written.jsonl*"))
    hashes = [hf_weights.params_hash(model) for model in models]
    assert hashes[0] == hf_weights.params_hash(place.folder / "base") != hashes[1]
    assert not (folder / "00000" / "model").exists()
    rows = [row for row in place.metrics("whole") if "online/round" in row]
    assert all("online/kl" not in row and row["online/eos_rate"] == 0 for row in rows)


FAULTS = {
    "fails": ("print('no memory'); sys.exit(3)", ["status 3", "no memory", "read 8 prompts"]),
    "hangs": ("time.sleep(60)", ["not done after generator.timeout_sec=1", "read 8 prompts"]),
    "writes nothing": (
        "sys.exit(0)",
        ["wanted it to write", "written.jsonl", "read 8 prompts"],
    ),
    "leaves a prompt out": ("rows = rows[1:]", ["wanted the 8 prompts", "1 are missing"]),
    "answers a prompt twice": ("rows += rows[:1]", ["each prompt of an engine's file once"]),
    "gives no tokens": (
        "rows[0]['completion_token_ids'][0] = []",
        ["completion_token_ids[0]", "wanted token ids, got []"],
    ),
    "knows other tokens": (
        "rows[0]['completion_token_ids'][0] = [100000]",
        ["token id 100000 is outside the model's vocabulary"],
    ),
    "gives other numbers": (
        "rows[0]['completion_token_ids'][0] = [60] * 13",
        ["sampling.max_new_tokens=12", "13"],
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_engine_that_is_refused_says_why_and_is_called_again(place, fault):
    body, words = FAULTS[fault]
    # The second time, with another file of its own beside it, all is well.
    program = f"import os\nif not os.path.exists(__file__ + '.well'):\n    {body}"
    limit = "generator.timeout_sec=1" if fault == "hangs" else "generator.timeout_sec=60"
    name = fault.replace(" ", "_")
    own = arguments(place, name, program, "rounds=1", limit)
    names_all(place.refusal("online", *own), words)
    (place.folder / f"{name}.py.well").touch()
    place.run("online", *own[:-1])
    assert Path(place.folder / name / "model" / "model.safetensors").exists()


def test_a_program_that_is_not_there_is_refused(place):
    own = arguments(place, "absent", "", "generator.command=[/no/such/program]")
    names_all(place.refusal("online", *own), ["generator.command", "/no/such/program", "started"])


def stopped_while_scoring(
    place: Workplace, name: str, monkeypatch: pytest.MonkeyPatch
) -> list[str]:
    """Arguments of a run of one round that has ended after its engine, before any score."""
    count = "open(__file__ + '.calls', 'a').write('x')"
    own = arguments(place, name, count, "rounds=1")

    def full(*given, **named):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(scoring, "score_dataset", full)
        place.refusal("online", *own)
    return own


def calls(place: Workplace, name: str) -> int:
    """How often the engine of a run was called."""
    return len((place.folder / f"{name}.py.calls").read_text())


def test_samples_that_were_read_are_not_drawn_again(place, monkeypatch):
    own = stopped_while_scoring(place, "scoring", monkeypatch)
    before = (place.folder / "scoring" / "rounds" / "00000" / "completions.jsonl").read_text()
    place.run("online", *own)
    after = (place.folder / "scoring" / "rounds" / "00000" / "completions.jsonl").read_text()
    assert calls(place, "scoring") == 1 and after == before


def test_a_policy_that_is_left_says_that_its_samples_were_never_read(place, monkeypatch):
    own = stopped_while_scoring(place, "left", monkeypatch)
    folder = place.folder / "left" / "rounds" / "00000"
    (folder / "model").mkdir()  # as if it had been killed between the engine and the check
    (folder / "completions.jsonl").write_text("not what was asked")
    place.run("online", *own)
    assert calls(place, "left") == 2 and not (folder / "model").exists()
