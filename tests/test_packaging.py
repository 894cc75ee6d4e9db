"""Packaging: the pins, the allowed ranges and the imports agree; no torch and no CUDA slip in."""

import ast
import re
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

import copg_jax

ROOT = Path(__file__).resolve().parents[1]
CONSTRAINTS = sorted((ROOT / "constraints").glob("py*.txt"))


@pytest.fixture(scope="module")
def metadata() -> dict:
    """The arguments that setup.py gives to setuptools."""
    recorded = {}
    with pytest.MonkeyPatch.context() as patch:
        # A stand-in: environments of Python 3.12 and later have no setuptools.
        fake = SimpleNamespace(setup=recorded.update, find_packages=lambda **arguments: [])
        patch.setitem(sys.modules, "setuptools", fake)
        runpy.run_path(str(ROOT / "setup.py"))
    return recorded


def pins(path: Path) -> dict[str, Version]:
    pairs = (line.split("==") for line in path.read_text().splitlines())
    return {canonicalize_name(name): Version(version) for name, version in pairs}


def pinned_requirements(metadata) -> list[Requirement]:
    extras = metadata["extras_require"]
    texts = [*metadata["install_requires"], *extras["all"]]
    return [Requirement(text) for text in texts]


def test_every_supported_python_has_its_constraints(metadata):
    supported = SpecifierSet(metadata["python_requires"])
    names = [f"py3{minor}" for minor in range(30) if Version(f"3.{minor}") in supported]
    assert [path.stem for path in CONSTRAINTS] == names


@pytest.mark.parametrize("path", CONSTRAINTS, ids=lambda path: path.stem)
def test_constraints_are_exact_names_and_versions(path):
    for line in path.read_text().splitlines():
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line)


def test_floors_are_the_lowest_pins_and_ceilings_allow_every_pin(metadata):
    for requirement in pinned_requirements(metadata):
        versions = [pins(path)[canonicalize_name(requirement.name)] for path in CONSTRAINTS]
        assert all(version in requirement.specifier for version in versions), requirement
        (floor,) = [spec.version for spec in requirement.specifier if spec.operator == ">="]
        lowest = min(versions)
        assert lowest.release[: len(Version(floor).release)] == Version(floor).release, requirement
        assert any(spec.operator == "<" for spec in requirement.specifier), requirement


@pytest.mark.parametrize("path", CONSTRAINTS, ids=lambda path: path.stem)
def test_the_pinned_environment_has_no_torch_and_no_cuda(path):
    assert not [name for name in pins(path) if re.search("torch|nvidia|cuda|triton", name)]


def test_every_third_party_import_is_a_declared_dependency(metadata):
    """Imports of the product, under the names of the packages that bring them."""
    extras = metadata["extras_require"]
    optional = ("gguf", "math", "nli", "tensorboard", "trackio", "wandb")
    texts = [*metadata["install_requires"], *(text for name in optional for text in extras[name])]
    declared = {canonicalize_name(Requirement(text).name).replace("-", "_") for text in texts}
    package_of = {"yaml": "pyyaml", "orbax": "orbax_checkpoint", "tensorboardX": "tensorboardx"}
    peers = ROOT / "experiments/benchmark/peers"  # each runs in an environment of its own
    engine = ROOT / "experiments/generate_vllm.py"  # so does this
    found = [*ROOT.glob("copg_jax/**/*.py"), *ROOT.glob("experiments/**/*.py")]
    for path in (path for path in found if path.parent != peers and path != engine):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module]
            for top in {name.split(".")[0] for name in names}:
                if top not in sys.stdlib_module_names and top not in ("copg_jax", "experiments"):
                    assert package_of.get(top, top) in declared, f"{path}: {top}"


def test_every_dependency_is_imported(metadata):
    """A dependency that nothing imports any more has to go."""
    sources = [*ROOT.glob("copg_jax/**/*.py"), *ROOT.glob("experiments/**/*.py")]
    text = "\n".join(path.read_text(encoding="utf-8") for path in sources)
    module_of = {"pyyaml": "yaml", "orbax-checkpoint": "orbax.checkpoint"}
    names = [Requirement(text).name for text in metadata["install_requires"]]
    modules = {name: module_of.get(name, name.replace("-", "_")) for name in names}
    unused = [
        name
        for name, module in modules.items()
        if not re.search(rf"^ *(import|from) {re.escape(module)}\b", text, re.MULTILINE)
    ]
    assert unused == []


def test_the_version_is_the_packages(metadata):
    assert metadata["version"] == copg_jax.__version__
