"""
The compiled parts, in Cython and C++: the batched search tree, the simulations around a model in Python, their noise, and the
state model for small batches. Arrays in, arrays out; they know no torch.
"""

try:
    from sb3_ezv2.ctree._driver import Driver, sample_actions
    from sb3_ezv2.ctree._mlp import Mlp
    from sb3_ezv2.ctree._noise import fill_normal
    from sb3_ezv2.ctree._tree import Tree, considered_visits
except ImportError as error:  # a source tree that was not installed
    raise ImportError(
        "The compiled part of sb3_ezv2 is missing: install the package with `pip install .` "
        "or build it in place with `python setup.py build_ext --inplace`."
    ) from error

__all__ = ["Driver", "Mlp", "Tree", "considered_visits", "fill_normal", "sample_actions"]
