"""The compiled part of the package and its .pth file; everything else about it is in pyproject.toml."""

import os

from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_py import build_py

PTH = "sb3_ezv2_zoo.pth"


class BuildPy(build_py):
    """Adds the .pth file that registers EZV2 with RL Zoo: Python reads it only at the top of site-packages."""

    def run(self) -> None:
        super().run()
        # An editable wheel holds nothing of the build, but what lies in the installation's folder
        folder = self.get_finalized_command("install").install_lib if self.editable_mode else self.build_lib
        self.mkpath(folder)
        self.copy_file(PTH, os.path.join(folder, PTH))

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        pth = [] if self.editable_mode else [os.path.join(self.build_lib, PTH)]
        return [*super().get_outputs(include_bytecode), *pth]


# No -march=native: a wheel runs on every machine of its architecture. No -ffast-math, no contraction to fused
# multiply-adds: the tree gives the same result on every architecture and agrees with its references.
if os.name == "nt":
    compile_args, link_args = ["/O2", "/std:c++17", "/EHsc"], []
else:
    compile_args, link_args = ["-O3", "-std=c++17", "-pthread", "-ffp-contract=off", "-g0"], ["-pthread"]

tree = Extension(
    "sb3_ezv2.ctree._tree",
    sources=["sb3_ezv2/ctree/_tree.pyx"],
    # Not compiled by itself, but a change of it compiles the extension anew.
    depends=["sb3_ezv2/ctree/tree.hpp"],
    language="c++",
    extra_compile_args=compile_args,
    extra_link_args=link_args,
)

setup(ext_modules=cythonize([tree]), cmdclass={"build_py": BuildPy})
