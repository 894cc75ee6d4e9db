"""What the README and docs/ tell a reader to type, and the files and names that they mention, exist
and are accepted; the README is short, and its program does what it says."""

import importlib.util
import json
import os
import re
import subprocess
import sys

import pytest
import yaml

from copg_jax.bandit.train import BanditConfig
from copg_jax.config.load import load_config
from copg_jax.config.schema import iter_fields
from copg_jax.config.stages import STAGES
from copg_jax.data import scored_rows
from copg_jax.data.formats import columns
from experiments.benchmark.commands import make_parser
from experiments.plan import stage_of
from experiments.quickstart import QuickstartConfig
from experiments.studies.study_config import StudyConfig
from tests.pages import (
    PAGES,
    README,
    ROOT,
    Command,
    blocks,
    commands,
    headings,
    inline_code,
    prose,
    read,
    write_files,
)

SCRIPTS = {
    "experiments.train_sft": STAGES["sft"],
    "experiments.train_reward": STAGES["reward"],
    "experiments.sample": STAGES["sample"],
    "experiments.score": STAGES["score"],
    "experiments.train_policy": STAGES["policy"],
    "experiments.online": STAGES["online"],
    "experiments.evaluate": STAGES["evaluate"],
    "experiments.bandit": BanditConfig,
    "experiments.quickstart": QuickstartConfig,
    "experiments.study": StudyConfig,
    "experiments.figures": StudyConfig,
}
COMMANDS = commands()


def of(module: str) -> list[Command]:
    return [command for command in COMMANDS if command.after(module) is not None]


STAGE_COMMANDS = [(command, module) for module in SCRIPTS for command in of(module)]
FIELDS = {field.name for cls in SCRIPTS.values() for field in iter_fields(cls)}
FIELDS |= {re.sub(r"\[i\]", "", name) for name in FIELDS}
for file in [ROOT / "configs" / "tldr.yaml", *(ROOT / "configs").glob("*s/*.yaml")]:
    FIELDS |= {f"shared.{name}" for name in yaml.safe_load(read(file)).get("shared", {})}


@pytest.fixture
def in_root(monkeypatch, tmp_path):
    """The root of the project, whose configs are named relative to it, and its docs' own files."""
    for page in PAGES:
        write_files(page, tmp_path)
    monkeypatch.chdir(ROOT)
    return tmp_path


# The README as a whole


def test_the_readme_has_at_most_1000_words():
    assert len(prose(README).split()) <= 1000


def test_the_program_of_the_readme_runs_in_an_empty_folder_and_ends_below_its_first_loss(tmp_path):
    (program,) = [text for text in blocks(README, "python") if "import" in text]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for name in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES"):  # one device, as a reader has
        environment.pop(name, None)

    def run(text: str) -> tuple[float, float]:
        answer = subprocess.run(
            [sys.executable, "-c", text],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        loss, residual = answer.stdout.split()
        return float(loss), float(residual)

    assert "range(200)" in program
    first, _ = run(program.replace("range(200)", "range(1)"))
    last, residual = run(program)
    assert last < first - 0.5
    assert residual < 1e-3
    assert list(tmp_path.iterdir()) == []


def test_the_readme_links_to_every_page_of_the_docs():
    links = re.findall(r"\]\((docs/\w+\.md)\)", read(README))
    assert sorted(set(links)) == sorted(f"docs/{page.name}" for page in PAGES[1:])


def test_the_readme_shows_the_five_stages_of_the_paper():
    shown = {module for command, module in STAGE_COMMANDS if command.page == "README.md"}
    stages = {"train_sft", "train_reward", "score", "train_policy", "evaluate"}
    assert shown == {f"experiments.{stage}" for stage in stages}


# Commands


@pytest.mark.parametrize(("command", "module"), STAGE_COMMANDS, ids=str)
def test_a_command_of_a_script_is_a_valid_config(command, module, in_root):
    arguments = command.after(module)
    local = [str(in_root / word) if (in_root / word).is_file() else word for word in arguments]
    config = load_config(SCRIPTS[module], local)
    assert config.output_dir.startswith(("runs/", "gs://"))


@pytest.mark.parametrize(
    ("command", "module"),
    [(c, module) for c, module in STAGE_COMMANDS if c.words[0] == "./launch_tpu.sh"],
    ids=str,
)
def test_a_command_for_a_slice_names_no_folder_of_this_machine(command, module, in_root):
    config = load_config(SCRIPTS[module], command.after(module))
    assert re.findall(r"'(?:runs|data|/)[^']*'", repr(config)) == []


@pytest.mark.parametrize("command", of("experiments.plan"), ids=str)
def test_a_command_of_the_planner_is_a_valid_config_and_its_topologies_have_a_known_form(
    command, in_root
):
    words = command.after("experiments.plan")
    named = [i + 1 for i, word in enumerate(words) if word == "--topology"]
    rest = [w for i, w in enumerate(words) if w != "--topology" and i not in named]
    config = load_config(STAGES[stage_of(rest)], rest)
    assert (ROOT / config.model.path / "config.json").is_file()
    assert named
    for i in named:
        assert re.fullmatch(r"v5[ep]:\d(x\d)+|v6e:\d(x\d)+|gpu:\dxh[12]00|cpu:\d", words[i])


def test_the_docs_show_each_benchmark_that_needs_no_other_library():
    assert {c.after("experiments.benchmark")[0] for c in of("experiments.benchmark")} >= {
        "workload",
        "train",
        "generate",
    }


@pytest.mark.parametrize("command", of("experiments.benchmark"), ids=str)
def test_a_command_of_the_benchmark_is_accepted(command):
    parser = make_parser("experiments.benchmark", None)
    assert callable(parser.parse_args(command.after("experiments.benchmark")).run)


def test_every_other_command_names_a_target_a_script_or_an_extra_that_exists():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    setup = (ROOT / "setup.py").read_text()
    checked = {*SCRIPTS, "experiments.plan", "experiments.benchmark"}
    for command in COMMANDS:
        words = command.words
        launched = [word for word in words if word.startswith("experiments.")]
        assert set(launched) <= checked, f"{command}: a test must load its arguments"
        scripts = [word for word in words if word.endswith(".sh")]
        for script in scripts:
            assert os.access(ROOT / script, os.X_OK), command
        if words[0] == "make":
            assert words[1] in targets, command
        elif words[0] == "pip":
            extra = re.fullmatch(r"\.\[([\w-]+)\]", words[words.index("-e") + 1])
            assert extra and f'"{extra[1]}"' in setup, command
            assert (ROOT / words[words.index("-c") + 1]).is_file(), command
        else:
            module = words[2] if words[:2] == ("python", "-m") else None
            found = module and importlib.util.find_spec(module)
            file = words[0] == "python" and (ROOT / words[1]).is_file()
            assert scripts or launched or found or file, f"{command}: unknown"


# Links and names in the text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings_that_exist(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", read(page)):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not anchor or anchor in headings(target), link


def resolves(name: str) -> bool:
    """Whether a dotted name is a module or something in one."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            known = hasattr(found, part) or part in getattr(found, "__annotations__", {})
            if not known:
                return False
            found = getattr(found, part, None)
        return True
    return False


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names_of_the_package_in_the_text_exist(page):
    text = " ".join(inline_code(page))
    names = re.findall(r"(?<![\w./-])((?:copg_jax|experiments)(?:\.\w+)+)(?![\w/]|\.\w)", text)
    assert [name for name in names if not resolves(name)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_in_the_text_exist(page):
    rooms = "copg_jax|experiments|configs|tests|docs|constraints"
    names = re.findall(rf"(?<![\w/.~])((?:{rooms})/[\w./*]*)", " ".join(inline_code(page)))
    assert [name for name in names if not list(ROOT.glob(name.rstrip("/")))] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_config_fields_in_the_text_exist(page):
    """`section.field` and `section.field=value`, of any stage."""
    sections = {name.split(".")[0] for name in FIELDS if "." in name} - {"inputs"}  # inputs.json
    names = [code.split("=")[0] for code in inline_code(page)]
    dotted = [n for n in names if re.fullmatch(r"\w+(\.\w+)+", n) and n.split(".")[0] in sections]
    assert [name for name in dotted if name not in FIELDS] == []
    given = {code.split("=")[0] for code in inline_code(page) if re.match(r"[a-z_]+=\S", code)}
    others = {"key", "jax_optimization_level"}  # a placeholder and an option of JAX
    assert given - others <= FIELDS


def test_the_table_of_row_formats_lists_those_that_are_read():
    rows = re.findall(r"^\| [^|`]+ \| ([^|]*`prompt`[^|]*|[^|]*`\w+`[^|]*) \|", read_table(), re.M)
    shown = {frozenset(re.findall(r"`(\w+)`", row)) - {"rewards"} for row in rows}
    assert shown == {frozenset(schema.fields) for schema in columns.SCHEMAS}


def read_table() -> str:
    """The table of row formats in docs/data.md."""
    return read(ROOT / "docs/data.md").split("## What becomes of a row")[0]


def test_the_table_of_scored_columns_lists_those_that_are_written():
    table = read(ROOT / "docs/data.md").split("## The scored folder")[1]
    shown = re.findall(r"^\| (`[^|]+) \|", table, re.M)
    assert [
        name for row in shown for name in re.findall(r"`(\w+)`", row)
    ] == scored_rows.SCHEMA.names


def test_json_and_yaml_of_the_docs_parse():
    texts = [text for page in PAGES for text in blocks(page, "json")]
    assert texts
    for text in texts:
        json.loads(text)
