"""
Registers EZV2 with RL Zoo as soon as something imports ``rl_zoo3``.

RL Zoo has no plug-ins: the choices of ``--algo`` are fixed when ``rl_zoo3`` is imported, before any package named on the
command line. The file ``sb3_ezv2_zoo.pth`` beside this one calls :func:`install` whenever Python starts. This module is
not part of the package because importing anything of that imports PyTorch; here only ``sys`` is needed. Nothing
happens in processes that never import ``rl_zoo3``, and ``SB3_EZV2_NO_ZOO=1`` switches the file off.
"""

import sys

# What to call of sb3_ezv2.zoo once a module of RL Zoo has been imported
CALLS = {
    "rl_zoo3.utils": "register_algorithm",
    "rl_zoo3.hyperparams_opt": "register_search_space",
    "rl_zoo3.exp_manager": "register_manager",
}


class ZooFinder:
    """A finder of ``sys.meta_path`` that leaves the finding to the others and adds a call after the import."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        """:return: the module's own spec, with a loader that registers EZV2 afterwards; None for all other modules"""
        if name not in CALLS:
            return None
        for finder in sys.meta_path:
            if finder is ZooFinder or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                if hasattr(spec.loader, "exec_module"):
                    _register_after_import(spec.loader, CALLS[name])
                return spec
        return None


def _register_after_import(loader, call):
    exec_module = loader.exec_module

    def exec_and_register(module):
        exec_module(module)
        try:
            from sb3_ezv2 import zoo

            getattr(zoo, call)()
        except Exception as error:
            import warnings

            warnings.warn(f"sb3-ezv2 could not register with RL Zoo, --algo ezv2 will be missing: {error!r}")

    # On this loader alone: import makes a new one for every module
    loader.exec_module = exec_and_register


def install():
    """Begin to watch for ``rl_zoo3``; a second call does nothing."""
    if ZooFinder not in sys.meta_path:
        sys.meta_path.insert(0, ZooFinder)
