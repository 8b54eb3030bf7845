"""Build the native operator with csrc/build.py. Everything else is in pyproject.toml.

Without a C++ compiler the packages are installed without the operator's library and run in pure torch.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # setuptools < 70.1
    from wheel.bdist_wheel import bdist_wheel

builder = SimpleNamespace(**runpy.run_path(str(Path(__file__).parent / "csrc" / "build.py")))


class BuildOperator(build_ext):
    """Compiles csrc/ and writes the library to the place of the extension module."""

    def get_ext_filename(self, fullname: str) -> str:
        """Return `detrs/ops/_C.so`, without a version of Python, on which the library does not depend."""
        return str(Path(*fullname.split("."))) + ".so"

    def build_extension(self, ext: Extension) -> None:
        """Compile what changed, in parallel, and link."""
        builder.build(Path(self.get_ext_fullpath(ext.name)))

    def copy_extensions_to_source(self) -> None:
        """Copy the library into the source tree, for an editable install."""
        super().copy_extensions_to_source()
        builder.record_sources(builder.LIBRARY)


class AnyPythonWheel(bdist_wheel):
    """A wheel for this platform and any Python 3."""

    def get_tag(self) -> tuple[str, str, str]:
        """Return `py3-none-<platform>`."""
        python, abi, tag = super().get_tag()
        return ("py3", "none", tag) if self.distribution.has_ext_modules() else (python, abi, tag)


operator = Extension("detrs.ops._C", sources=builder.SOURCES, depends=[*builder.HEADERS, builder.CUDA_SOURCE])
if builder.find_compiler() is None:
    print("setup.py: no C++ compiler: installing without the native operator (slower)", file=sys.stderr)
    setup()
else:
    setup(ext_modules=[operator], cmdclass={"build_ext": BuildOperator, "bdist_wheel": AnyPythonWheel})
