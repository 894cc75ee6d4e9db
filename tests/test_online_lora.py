"""Adapters that train on rounds of their own samples."""

from safetensors.numpy import load_file

from copg_jax import reuse
from tests.interrupted import compilations_by_round, differing_bits, kept_moments
from tests.test_online import arguments
from tests.workplace import Workplace

SETTINGS = ("lora.rank=2", "lora.targets=[q_proj, v_proj]", "rounds=3", "training.save_every=2")


def test_adapters_train_on_rounds_of_their_own_samples_and_a_killed_run_ends_with_their_bits(
    tmp_path,
):
    place, folder = Workplace(tmp_path), tmp_path / "lora"
    own = arguments(place, "lora", *SETTINGS)
    with reuse.shared_by_runs(), compilations_by_round() as compiled:
        moments = kept_moments(lambda: place.run("online", *own), folder, tmp_path / "moments")
        for moment in ("judged a part 4", "fetched a batch 3"):
            place.run("online", *own, f"output_dir={moments[moment]}")
            assert differing_bits(moments[moment], folder) == {}
    assert compiled[0] >= 3 and compiled[1] == compiled[2] == 0
    adapter = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert {name.split(".")[-3] for name in adapter} == {"q_proj", "v_proj"}
    before, after = (
        load_file(model / "model.safetensors") for model in (tmp_path / "base", folder / "model")
    )
    changed = {name for name in before if (before[name] != after[name]).any()}
    assert changed == {name for name in before if "q_proj" in name or "v_proj" in name}
    rows = [row for row in place.metrics("lora") if "online/round" in row]
    assert rows[0]["online/kl"] == 0 != rows[1]["online/kl"]
