"""Documentation: Python code runs, links and scripts exist, pages are complete, figures and the Sphinx build work."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import SPIKINGJELLY_2

ROOT = Path(__file__).parents[1]
PAGES = sorted(p for p in (ROOT / "docs").rglob("*.md") if "build" not in p.parts)
READMES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("examples/*/README.md")),
           *sorted(ROOT.glob("nord_snn/**/README.md"))]  # fmt: skip
NORSE = importlib.util.find_spec("norse") is not None
PARTS = sorted((ROOT / "docs" / "parts").glob("*.md"))


def blocks(page: Path) -> list[str]:
    """Return the Python code blocks that run with the installed SpikingJelly and, if they need it, an installed Norse."""
    pattern = re.compile(r"^(<!-- SpikingJelly 2 -->\n)?```python\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)
    matches = pattern.findall(page.read_text(encoding="utf-8"))
    return [
        block for only_2, block in matches if (SPIKINGJELLY_2 or not only_2) and (NORSE or "import norse" not in block)
    ]


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.quick
@pytest.mark.filterwarnings("error:.*did not fire:UserWarning")
@pytest.mark.parametrize("page", [p for p in PAGES + READMES if blocks(p)], ids=name)
def test_every_python_block_runs(page: Path) -> None:
    """Each block runs by itself."""
    for block in blocks(page):
        exec(compile(block, name(page), "exec"), {})


@pytest.mark.quick
def test_the_readme_has_one_command_to_train_and_one_to_test() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for marker, ending in (("train", "examples/nord_lm/train.py"), ("test", "pytest -n 2 --dist worksteal --cov")):
        commands = re.findall(rf"<!-- command: {marker} -->\n```bash\n(.*?)\n```", readme)
        assert len(commands) == 1
        assert commands[0].endswith(ending)
        assert "\n" not in commands[0]


@pytest.mark.quick
@pytest.mark.parametrize("page", PAGES + READMES, ids=name)
def test_relative_links_exist(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


@pytest.mark.quick
@pytest.mark.parametrize("page", PAGES + READMES, ids=name)
def test_scripts_named_on_a_page_exist(page: Path) -> None:
    for script in re.findall(r"(?:examples|studies|benchmarks)/[\w/-]+\.(?:py|yaml)", page.read_text(encoding="utf-8")):
        assert (ROOT / script).exists(), script


@pytest.mark.quick
@pytest.mark.parametrize("page", PARTS, ids=name)
def test_a_page_of_a_part_has_the_required_sections(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    titles = re.findall(r"^## (.*)$", text, flags=re.MULTILINE)
    assert titles == ["Equation", "Use", "When to use it", "Cost"]
    assert "$$" in text
    assert "../costs.md" in text or "../benchmarks.md" in text
    assert re.search(r"!\[.+\]\(\.\./figures/\w+\.png\)", text)


@pytest.mark.quick
def test_every_layer_and_rule_is_on_a_page() -> None:
    text = " ".join(page.read_text(encoding="utf-8") for page in PARTS)
    for package in ("nord_snn.layers", "nord_snn.learning_rules"):
        public = importlib.import_module(package)
        for name in public.__all__:
            if name.endswith(("Source", "Part", "Reward", "Baseline", "_plastic")):
                continue  # neither layers nor rules
            assert name in text, name


@pytest.mark.quick
def test_the_reference_has_every_layer_and_neuron() -> None:
    reference = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    names = [*importlib.import_module("nord_snn.layers").__all__, "AssociativeLIFNode", "DenseActivation"]
    assert [name for name in names if name not in reference] == []


def test_every_figure_can_be_redrawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    monkeypatch.delitem(sys.modules, "figures", raising=False)
    figures = importlib.import_module("figures")
    monkeypatch.setattr(figures, "OUT", tmp_path)
    figures.main([])
    drawn, in_docs = ({p.name for p in folder.glob("*.png")} for folder in (tmp_path, ROOT / "docs" / "figures"))
    assert drawn == in_docs
    with pytest.raises(SystemExit):
        figures.main(["nothing"])


def test_sphinx_builds_the_pages_without_warnings(tmp_path: Path) -> None:
    pytest.importorskip("sphinx")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", str(ROOT / "docs"), str(tmp_path)]
    build = subprocess.run(command, capture_output=True, text=True, check=False)
    assert build.returncode == 0, build.stderr
    for page in PAGES:
        assert (tmp_path / page.relative_to(ROOT / "docs").with_suffix(".html")).exists()
