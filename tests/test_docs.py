"""README, docs and the notebook match the package: options, links and commands; the site builds."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hf_dualadam.trainer import OPTIM_ARGS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NOTEBOOK = ROOT / "notebooks" / "quickstart.ipynb"
QUICK = re.compile(r"<!-- quick -->\n```(bash|python)\n(.*?)```", re.DOTALL)
EXTERNAL = re.compile(r"<(?:script|link|img)[^>]*(?:src|href)=\"?(?:https?:)?//[^>]*>")
BLOCKS = [(page, *match.groups()) for page in PAGES for match in QUICK.finditer(page.read_text())]


def run(command, folder, **environment):
    """Run a command in ``folder``, with the commands of this environment on the path."""
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"} | environment
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)


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
    # The commands find scripts and configs as in a checkout, and write to the temporary folder.
    for name in ("scripts", "configs", "tests"):
        (tmp_path / name).symlink_to(ROOT / name)
    script.write_text(code)
    done = run([sys.executable, script] if language == "python" else ["bash", "-e", script], tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


def test_notebook_runs_without_a_network(tmp_path):
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] for cell in cells)
    tags = [set(cell["metadata"].get("tags", ())) for cell in cells]
    cells = [(tag, "".join(cell["source"])) for tag, cell in zip(tags, cells) if "network" not in tag]
    assert not any(re.search(r"^[!%]", code, re.M) for _, code in cells)  # IPython's commands need IPython
    code = ["EPOCHS = 0.1\n" if "parameters" in tag else code for tag, code in cells]
    assert len([tag for tag, _ in cells if "parameters" in tag]) == 1
    (tmp_path / "cells.py").write_text("\n\n".join(code))
    done = run([sys.executable, "cells.py"], tmp_path, HF_HUB_OFFLINE="1", MPLBACKEND="agg")
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(re.findall(r"held-out accuracy 0\.\d+", done.stdout)) == 3


def test_notebook_makes_the_call_of_the_readme():
    (call,) = re.findall(r'optim="dualadam", optim_args="[^"]*"', (ROOT / "README.md").read_text())
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    assert call in "".join("".join(cell["source"]) for cell in cells)


def test_site_builds_strictly_and_loads_nothing_from_elsewhere(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path]
    unreachable = {name: "http://127.0.0.1:9" for name in ("http_proxy", "https_proxy", "all_proxy")}
    done = run(command, ROOT, **unreachable)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = {path.relative_to(tmp_path).as_posix(): path.read_text() for path in tmp_path.rglob("*.html")}
    foreign = {name: EXTERNAL.findall(page) for name, page in pages.items() if EXTERNAL.search(page)}
    assert not foreign
    assert {f"{path.stem}/index.html" for path in PAGES[1:]} <= set(pages)
    assert 'href="choosing-settings/' in pages["index.html"]  # the front page is the README, with links to pages
    for name in ("DualAdam", "InvAdam"):
        assert f'id="hf_dualadam.{name}"' in pages["api/optimizers/index.html"]
    assert 'id="hf_dualadam.diagnostics.inverse_statistics"' in pages["api/diagnostics/index.html"]
