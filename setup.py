"""The compiled part of the package; everything else about it is in pyproject.toml."""

import os

from Cython.Build import cythonize
from setuptools import Extension, setup

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

setup(ext_modules=cythonize([tree]))
