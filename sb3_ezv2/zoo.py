"""
EZV2 in RL Zoo: the algorithm, its search space, its configurations, and one environment for all commands.

RL Zoo has no plug-ins. A file in the installation (``sb3_ezv2_zoo_hook.py``) calls the functions below when RL Zoo is
imported; where that is not wanted, ``python -m sb3_ezv2.zoo train --algo ezv2 ...`` does the same for one command and
:func:`register` for one's own program.

What differs from RL Zoo for ``--algo ezv2``, and for no other algorithm:

- Agents are evaluated with deterministic actions on Atari games, too (the search's noise is for exploring).
- ``env_kwargs`` of a configuration hold for every environment, not only for that of the training, and those of
  the command line are added to them instead of replacing them all.
- ``policy_kwargs`` of a configuration are kept when Optuna samples the size of the network.
- The search space of ``MultiDiscrete`` and ``MultiBinary`` actions has what it has for ``Box`` actions.
"""

from __future__ import annotations

import difflib
import functools
import gc
import importlib.util
import inspect
import itertools
import runpy
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gymnasium as gym

from sb3_ezv2.ezv2 import EZV2
from sb3_ezv2.multi_discrete import category_sizes
from sb3_ezv2.validation import UNSUPPORTED_OPTIONS

if TYPE_CHECKING:
    import optuna
    from rl_zoo3.exp_manager import ExperimentManager
    from stable_baselines3.common.vec_env import VecEnv

ALGO = "ezv2"

_INSTALLED_CONFIGS = Path(__file__).parent / "rl_zoo_configs"
# In the source tree they are beside the package
CONFIGS = _INSTALLED_CONFIGS if _INSTALLED_CONFIGS.is_dir() else Path(__file__).parents[1] / "rl_zoo_configs"
"""Where ``ezv2.yml`` and the other configurations are."""

EVALUATIONS = ("enjoy", "record_video")
"""Commands of RL Zoo that act stochastically on Atari games unless they are told not to."""

PLOTS = ("all_plots", "plot_from_file", "plot_train")


def register() -> None:
    """Make ``ezv2`` an algorithm of RL Zoo in this process. Calling it again changes nothing."""
    register_algorithm()
    register_search_space()
    register_manager()


def register_algorithm() -> None:
    """``ezv2`` for ``--algo``, and what the command that is running needs besides."""
    from rl_zoo3.utils import ALGOS

    ALGOS[ALGO] = EZV2
    _prepare_command(sys.argv)


def register_search_space() -> None:
    """The sampler and the converter for ``-optimize`` and ``--trial-id``."""
    from rl_zoo3.hyperparams_opt import HYPERPARAMS_CONVERTER, HYPERPARAMS_SAMPLER

    from sb3_ezv2.search_space import convert_ezv2_params, sample_ezv2_params

    HYPERPARAMS_SAMPLER[ALGO] = sample_ezv2_params
    HYPERPARAMS_CONVERTER[ALGO] = convert_ezv2_params


def register_manager() -> None:
    """The differences that the module's docstring lists, as changes of ``ExperimentManager`` for this algorithm."""
    from rl_zoo3.exp_manager import ExperimentManager

    changes: dict[str, Callable[..., Any]] = {
        "__init__": _init,
        "read_hyperparameters": _read_hyperparameters,
        "_preprocess_hyperparams": _preprocess_hyperparams,
        "_preprocess_action_noise": _preprocess_action_noise,
        "objective": _objective,
    }
    if not hasattr(ExperimentManager, "_knows_ezv2"):
        ExperimentManager._knows_ezv2 = True  # type: ignore[attr-defined]
        for name, changed in changes.items():
            setattr(ExperimentManager, name, _change(getattr(ExperimentManager, name), changed))


def _change(original: Callable[..., Any], changed: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def method(self: ExperimentManager, *args: Any, **kwargs: Any) -> Any:
        return changed(original, self, *args, **kwargs)

    return method


# ---------------------------------------------------------------------- the command


def _prepare_command(argv: list[str]) -> None:
    """
    :param argv: the command line, which may be added to
    :raises SystemExit: an extra is missing that the environment needs
    """
    if _option(argv, "--algo") != ALGO:
        return
    try:
        import_env(_option(argv, "--env") or "")
    except ImportError as error:
        raise SystemExit(str(error)) from error
    # What was called, as `python -m rl_zoo3.enjoy` or `rl_zoo3 enjoy`; --stochastic has precedence over the addition
    called = itertools.takewhile(lambda word: not word.startswith("--"), sys.orig_argv[1:])
    if any(word.rpartition(".")[2] in EVALUATIONS for word in called) and "--deterministic" not in argv:
        argv.append("--deterministic")


def _option(argv: list[str], name: str) -> str | None:
    for word, following in zip(argv, [*argv[1:], None]):
        if word == name:
            return following
        if word.startswith(f"{name}="):
            return word.partition("=")[2]
    return None


def import_env(env_id: str) -> None:
    """
    Register the environments of the control suite, which RL Zoo does not, if ``env_id`` is one of them.

    :param env_id: of any environment
    :raises ImportError: the extra ``atari`` or ``dmc`` is missing that this one needs
    """
    if env_id.startswith("dm_control/") and env_id not in gym.registry:
        _check_installed(env_id, "dmc", "shimmy", "dm_control")
        # Slow (it imports MuJoCo), therefore not before it is needed
        import shimmy  # noqa: F401
    elif env_id.startswith("ALE/") or "NoFrameskip-v" in env_id:
        _check_installed(env_id, "atari", "ale_py", "cv2")


def _check_installed(env_id: str, extra: str, *modules: str) -> None:
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise ImportError(f"{env_id} needs {module}, which is not installed: pip install 'sb3-ezv2[{extra}]'")


# ---------------------------------------------------------------------- the experiment


def _init(original: Callable[..., None], self: ExperimentManager, *args: Any, **kwargs: Any) -> None:
    arguments = inspect.signature(original).bind(self, *args, **kwargs).arguments
    is_ezv2 = arguments["algo"] == ALGO
    if is_ezv2:
        import_env(arguments["env_id"])
    original(self, *args, **kwargs)
    if is_ezv2:
        self.config = find_config(arguments.get("config"))
        self.deterministic_eval = True


def find_config(config: str | None) -> str:
    """
    :param config: a file or a Python package of the user; the name of a file in ``CONFIGS``; None for the default
    :return: the configuration's file or package
    """
    config = config or f"{ALGO}.yml"
    shipped = CONFIGS / config
    return str(shipped) if shipped.is_file() and not Path(config).is_file() else config


def _read_hyperparameters(
    original: Callable[..., tuple[dict[str, Any], dict[str, Any]]], self: ExperimentManager
) -> tuple[dict[str, Any], dict[str, Any]]:
    if self.algo != ALGO:
        return original(self)
    from rl_zoo3 import exp_manager

    from sb3_ezv2.search_space import merge_policy_kwargs

    of_command, trial_id = self.env_kwargs, self.trial_id
    self.env_kwargs, self.trial_id = {}, None
    hyperparams, _ = original(self)
    self.trial_id = trial_id
    if trial_id is not None and self.storage and self.study_name:
        sampled = self.load_trial(self.storage, self.study_name, trial_id)
        print(f"Hyperparameters of trial {trial_id} of the study {self.study_name}: {sampled}")
        if isinstance(hyperparams.get("policy_kwargs"), str):
            # Python code, which may use what RL Zoo has imported
            hyperparams["policy_kwargs"] = eval(hyperparams["policy_kwargs"], vars(exp_manager))
        hyperparams = {**hyperparams, **merge_policy_kwargs(hyperparams, sampled), **(self.custom_hyperparams or {})}

    env_kwargs = {**(hyperparams.pop("env_kwargs", None) or {}), **of_command}
    if env_kwargs:
        hyperparams["env_kwargs"] = env_kwargs
    self.env_kwargs = env_kwargs
    self.eval_env_kwargs = {**env_kwargs, **(self._eval_env_kwargs_args or {})}
    # Saved in args.yml, from where enjoy and record_video take them
    self.args.env_kwargs = env_kwargs or None
    return hyperparams, OrderedDict(sorted(hyperparams.items()))


def _preprocess_hyperparams(original: Callable[..., Any], self: ExperimentManager, hyperparams: dict[str, Any]) -> Any:
    result = original(self, hyperparams)
    if self.algo == ALGO:
        _check_hyperparams(result[0], self.config)
    return result


def _preprocess_action_noise(
    original: Callable[..., Any], self: ExperimentManager, hyperparams: dict[str, Any], saved: dict[str, Any], env: VecEnv
) -> Any:
    result = original(self, hyperparams, saved, env)
    if self.algo == ALGO and (sizes := category_sizes(env.action_space)):
        # What the samplers are told; RL Zoo counts the dimensions of Box actions alone
        self.n_actions = len(sizes)
    return result


def _check_hyperparams(hyperparams: dict[str, Any], config: str) -> None:
    """:raises TypeError: EZV2 has no such argument; ``-i`` would take it in silence"""
    parameters = inspect.signature(EZV2.__init__).parameters.values()
    known = [p.name for p in parameters if p.kind is not p.VAR_KEYWORD and p.name != "self"]
    for name in hyperparams:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            message = UNSUPPORTED_OPTIONS.get(name, f"EZV2 has no argument {name!r}.")
            hint = f" Did you mean {close[0]!r}?" if close and name not in UNSUPPORTED_OPTIONS else ""
            raise TypeError(f"{message}{hint} It comes from {config} or from the command line's -params.")


def _objective(original: Callable[..., float], self: ExperimentManager, trial: optuna.Trial) -> float:
    if self.algo != ALGO:
        return original(self, trial)
    from sb3_ezv2.search_space import study_hyperparams

    token = study_hyperparams.set(self._hyperparams)
    try:
        return original(self, trial)
    finally:
        study_hyperparams.reset(token)
        # Agent, environments and callbacks hold each other; older versions of RL Zoo leave them to the next collection
        gc.collect()


# ---------------------------------------------------------------------- python -m sb3_ezv2.zoo


def main(argv: list[str]) -> None:
    """
    Run a command of RL Zoo with EZV2 registered.

    :param argv: the command's name and its arguments
    :raises SystemExit: there is no such command
    """
    command = argv[0] if argv else ""
    module = f"rl_zoo3.plots.{command}" if command in PLOTS else f"rl_zoo3.{command}"
    if not command.isidentifier() or importlib.util.find_spec(module) is None:
        raise SystemExit("usage: python -m sb3_ezv2.zoo {train,enjoy,record_video,plot_train,...} and RL Zoo's arguments")
    sys.argv = [module, *argv[1:]]
    register()
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(sys.argv[1:])
