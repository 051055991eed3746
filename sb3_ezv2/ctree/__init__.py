"""The batched search tree, in Cython and C++: arrays in, arrays out. It knows neither torch nor networks."""

try:
    from sb3_ezv2.ctree._tree import Tree, considered_visits
except ImportError as error:  # a source tree that was not installed
    raise ImportError(
        "The compiled search tree of sb3_ezv2 is missing: install the package with `pip install .` "
        "or build it in place with `python setup.py build_ext --inplace`."
    ) from error

__all__ = ["Tree", "considered_visits"]
