"""What the README says can be done, can be done."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_every_python_block_runs(block):
    exec(compile(block, "README.md", "exec"), {})


def test_there_is_one_command_to_train_and_one_to_test():
    for marker, ending in (("train", "examples/nord_lm/train.py"), ("test", "pytest --cov")):
        found = re.findall(rf"<!-- command: {marker} -->\n```bash\n(.*?)\n```", README)
        assert len(found) == 1
        assert found[0].endswith(ending)
        assert "\n" not in found[0]


def test_relative_links_lead_somewhere():
    for page in (README, (ROOT / "CONTRIBUTING.md").read_text(), (ROOT / "examples/nord_lm/README.md").read_text()):
        base = ROOT if page is README else None
        for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", page):
            assert any(
                (folder / target).exists() for folder in ([base] if base else [ROOT, ROOT / "examples/nord_lm"])
            ), target
