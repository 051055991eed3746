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


# No -march=native: a wheel runs on every machine of its architecture; what can use more asks the processor. No -ffast-math.
if os.name == "nt":
    compile_args, link_args, exact, fused, in_vectors = ["/O2", "/std:c++17", "/EHsc"], [], [], [], []
else:
    compile_args, link_args = ["-O3", "-std=c++17", "-pthread", "-g0"], ["-pthread"]
    # The tree, the actions and the noise: no contraction to fused multiply-adds, so that they are the same on every
    # architecture, and the tree agrees with its references. The model: as fast as can be.
    exact, fused = ["-ffp-contract=off"], ["-ffp-contract=fast"]
    # The noise: square roots need not set errno, and comparisons may be made without a branch. No result changes.
    in_vectors = ["-fno-math-errno", "-fno-trapping-math"]


def extension(name: str, headers: list[str], more: list[str]) -> Extension:
    return Extension(
        f"sb3_ezv2.ctree.{name}",
        sources=[f"sb3_ezv2/ctree/{name}.pyx"],
        # Not compiled by themselves, but a change of one compiles the extension anew.
        depends=[f"sb3_ezv2/ctree/{header}" for header in headers],
        language="c++",
        extra_compile_args=compile_args + more,
        extra_link_args=link_args,
    )


setup(
    ext_modules=cythonize(
        [
            extension("_tree", ["simd.hpp", "tree.hpp"], exact),
            extension("_driver", ["simd.hpp", "tree.hpp", "sampling.hpp", "driver.hpp", "_tree.pxd"], exact),
            extension("_noise", ["simd.hpp", "noise.hpp"], exact + in_vectors),
            extension("_mlp", ["simd.hpp", "tree.hpp", "mlp.hpp", "_tree.pxd", "_driver.pxd"], fused),
        ]
    ),
    cmdclass={"build_py": BuildPy},
)
