"""What the project claims, checked: exports, README, the tree, commands, versions."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import fewbits

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_all_lists_exactly_the_public_names():
    modules = {p.stem for p in (ROOT / "src/fewbits").glob("*")}
    public = {n for n in vars(fewbits) if not n.startswith("_")} - modules
    assert public | {"compare", "convert", "evaluate", "load", "measure", "verify"} == set(
        fewbits.__all__
    )
    assert len(fewbits.__all__) == len(set(fewbits.__all__))
    assert callable(fewbits.load)


@pytest.mark.parametrize("name", fewbits.__all__)
def test_every_public_name_is_documented(name):
    assert getattr(fewbits, name).__doc__


def test_importing_fewbits_does_not_import_transformers():
    code = "import sys, fewbits; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_tree_in_the_readme_is_the_tree_on_disk():
    """Every file and folder drawn exists; every module of the package is drawn."""
    tree = re.search(r"```\n(src/fewbits/.*?)```", README, re.S)[1]
    drawn = set(re.findall(r"(?:├──|└──) (\S+)", tree))
    there = {p.name + "/" * p.is_dir() for p in (ROOT / "src/fewbits").iterdir()}
    there -= {"__pycache__/", "__main__.py", "py.typed"}
    assert drawn == there


def test_every_command_in_the_readme_exists():
    from typer.main import get_command

    from fewbits.cli import app

    commands = get_command(app).commands
    used = set(re.findall(r"^fewbits (\w+)", README, re.M))
    assert used
    assert used <= set(commands)
    for line in re.findall(r"^fewbits .*?[^\\]$", README, re.M | re.S):
        words = re.sub(r" # .*", "", line).replace("\\\n", " ").split()
        options = {o for p in commands[words[1]].params for o in p.opts}
        assert {w for w in words if w.startswith("--")} <= options, line


@pytest.mark.parametrize(
    ("heading", "said"),
    [
        ("In Python", "'quantized': 42"),
        pytest.param("Say the size", "4.50 bits per weight, predicted KL 0.", marks=pytest.mark.slow),
    ],
)
def test_the_python_examples_in_the_readme_run(tmp_path, heading, said):
    (tmp_path / "reference").symlink_to(ROOT / "reference")
    (tmp_path / "README.md").write_text(README[:3000])
    code = re.search(rf"^## {heading}$.*?```python\n(.*?)```", README, re.M | re.S)[1]
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert said in result.stdout


def test_every_make_target_in_the_readme_exists():
    targets = set(re.findall(r"^(\S+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"`make ([\w-]+)`", README)) <= targets


def test_links_between_documents_lead_somewhere():
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), ROOT / "CONTRIBUTING.md"]:
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_the_constraints_satisfy_the_declared_ranges():
    import tomllib

    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = dict(
        line.lower().replace("_", "-").split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    )
    extras = project["optional-dependencies"].values()
    needs = project["dependencies"] + [need for extra in extras for need in extra]
    for requirement in map(Requirement, needs):
        if requirement.name == project["name"]:  # an extra that holds others
            continue
        assert pins[requirement.name.lower().replace("_", "-")] in requirement.specifier


def test_the_reference_model_fits_and_was_really_trained():
    import json

    folder = ROOT / "reference/model"
    assert sum(p.stat().st_size for p in folder.iterdir()) <= 16e6
    facts = json.loads((folder / "training.json").read_text())
    assert facts["heldout_loss"] < 0.6 * facts["unigram_heldout_loss"]
