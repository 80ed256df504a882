"""What an installed package needs and holds; `.ci/run` installs the wheel alone and starts it."""

import ast
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from das_lm.run import recipe_file

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FILES = sorted((ROOT / "das_lm").rglob("*.py"))


def _names(requirements: list[str]) -> set[str]:
    return {canonicalize_name(Requirement(one).name) for one in requirements}


def _imported(path: Path) -> set[str]:
    """Top-level modules that a file imports, anywhere in it."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = [one.name for node in nodes if isinstance(node, ast.Import) for one in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level]
    return {name.partition(".")[0] for name in names} - set(sys.stdlib_module_names) - {"das_lm"}


def test_every_import_is_declared():
    needed = _names(PROJECT["project"]["dependencies"])
    optional = _names([one for extra in PROJECT["project"]["optional-dependencies"].values() for one in extra])
    distributions = packages_distributions()
    for path in FILES:
        for module in _imported(path):
            names = _names(distributions.get(module, [module]))
            assert names & (optional if module in ("optuna", "lm_eval") else needed), f"{path.name} imports {module}"


def test_every_package_is_in_the_wheel():
    setuptools = PROJECT["tool"]["setuptools"]
    packages = {".".join(path.parent.relative_to(ROOT).parts) for path in FILES if path.name == "__init__.py"}
    assert set(setuptools["packages"]) == packages | {"das_lm.recipes"}
    assert setuptools["package-dir"] == {"das_lm.recipes": "recipes"}


def test_recipes_of_a_wheel_and_of_a_checkout(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert recipe_file.recipes()["bio_then_cs"] == ROOT / "recipes" / "bio_then_cs.yaml"
    installed, others = tmp_path / "site" / "das_lm" / "recipes", tmp_path / "site" / "recipes"
    for folder in (installed, others):
        folder.mkdir(parents=True)
        (folder / f"of_{folder.parent.name}.yaml").touch()
    monkeypatch.setattr("das_lm.files.resources.files", lambda package: tmp_path / "site" / package)
    assert recipe_file.recipes() == {"of_das_lm": installed / "of_das_lm.yaml"}
