"""README and docs say what the package does: options table, links, and the commands marked as quick."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hf_dualadam.trainer import OPTIM_ARGS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
QUICK = re.compile(r"<!-- quick -->\n```(bash|python)\n(.*?)```", re.DOTALL)
BLOCKS = [(page, *match.groups()) for page in PAGES for match in QUICK.finditer(page.read_text())]


def test_readme_lists_every_optim_arg():
    table = "".join(f"| `{name}` | {arg.allowed} | {arg.meaning} |\n" for name, arg in OPTIM_ARGS.items())
    assert table in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text())
    missing = [t for t in targets if not t.startswith("http") and not (page.parent / t).exists()]
    assert not missing


def test_readme_leads_to_every_page():
    linked = re.findall(r"\]\((docs/[^)#]+)\)", (ROOT / "README.md").read_text())
    assert set(linked) >= {f"docs/{page.name}" for page in PAGES[1:]}


@pytest.mark.parametrize(("page", "language", "code"), BLOCKS, ids=[f"{b[0].name}-{i}" for i, b in enumerate(BLOCKS)])
def test_quick_commands_run_as_printed(page, language, code, tmp_path):
    script = tmp_path / ("quick." + ("py" if language == "python" else "sh"))
    # The scripts and configs are where a reader would stand; what the commands write goes to the temporary folder.
    for name in ("scripts", "configs", "tests"):
        (tmp_path / name).symlink_to(ROOT / name)
    script.write_text(code)
    command = [sys.executable, script] if language == "python" else ["bash", "-e", script]
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}  # as in this environment
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
