"""Builds the optional C++ extension `vrpo_kernels._C` when torch and a compiler are there.

Without torch in the build environment, or without a C++ compiler, the package installs as pure Python and
runs on the PyTorch reference backend; `vrpo env` reports what was lost.
"""

import glob
import importlib.util
import sys

from setuptools import setup


def extension() -> dict:
    if importlib.util.find_spec("torch") is None:
        sys.stderr.write(
            "vrpo: torch is not importable in the build environment, so the C++ backend is not built. "
            "Install torch first, then `pip install --no-build-isolation -e .`.\n"
        )
        return {}
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    class OptionalBuild(BuildExtension):
        """torch looks for the compiler before setuptools' `optional` can catch that there is none."""

        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except Exception as error:
                sys.stderr.write(f"vrpo: the C++ backend is not built: {error}\n")

    return {
        "ext_modules": [
            CppExtension(
                "vrpo_kernels._C",
                sorted(glob.glob("csrc/*.cpp")),
                extra_compile_args=["-O3", "-std=c++20", "-fopenmp", "-fopenmp-simd", "-Wno-psabi"],
                extra_link_args=["-fopenmp"],
                optional=True,
            )
        ],
        "cmdclass": {"build_ext": OptionalBuild},
    }


setup(**extension())
