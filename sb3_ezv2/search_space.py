"""What Optuna may vary of EZV2: a sampler of hyperparameters, and the conversion of what it sampled."""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import optuna

NETWORKS: dict[str, dict[str, Any]] = {
    "small": dict(net_arch=[128], state_dim=128, n_blocks=1, projection_dim=128),
    "medium": dict(net_arch=[256], state_dim=128, n_blocks=1, projection_dim=256),
    "large": dict(net_arch=[256], state_dim=128, n_blocks=3, projection_dim=512),
}
"""Sizes of ``MlpPolicy``; the large one is the paper's (App. G)."""

study_hyperparams: ContextVar[dict[str, Any] | None] = ContextVar("study_hyperparams", default=None)
"""What the running study does not vary, set for the time of a trial: RL Zoo tells its samplers nothing of it."""


def sample_ezv2_params(trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict) -> dict[str, Any]:
    """
    Sampler for EZV2's hyperparameters. Every sample is valid, whatever the others are.

    :param trial: of Optuna
    :param n_actions: dimensions of a Box, MultiDiscrete or MultiBinary action space. RL Zoo passes 0 for Discrete ones, so
        that the number of actions is not known, and only whether actions are sampled is read off
    :param n_envs: number of environments
    :param additional_args: of other algorithms' replay buffers
    :return: arguments of the constructor
    """
    fixed = study_hyperparams.get() or {}
    params: dict[str, Any] = {
        "one_minus_gamma": trial.suggest_float("one_minus_gamma", 0.003, 0.05, log=True),
        "learning_rate": trial.suggest_float("learning_rate", 1e-4, 2e-3, log=True),
        "batch_size_pow": trial.suggest_int("batch_size_pow", 5, 8),
        "n_simulations_pow": trial.suggest_int("n_simulations_pow", 3, 5),
        # A ratio, so that no sampled action is without a simulation
        "simulations_per_action": trial.suggest_categorical("simulations_per_action", [1, 2, 4]),
        "unroll_steps": trial.suggest_int("unroll_steps", 3, 7),
        "td_steps": trial.suggest_int("td_steps", 5, 25),
        "td_steps_min": trial.suggest_int("td_steps_min", 1, 5),
        "tau": trial.suggest_float("tau", 0.002, 0.1, log=True),
        "target_update_interval": trial.suggest_int("target_update_interval", 50, 800, log=True),
        # Updates per environment step: gradient_steps / (train_freq * n_envs), from 1/2 to 2
        "train_freq": trial.suggest_categorical("train_freq", [1, 2]),
        "gradient_steps": trial.suggest_categorical("gradient_steps", [n_envs, 2 * n_envs]),
        "vf_coef": trial.suggest_float("vf_coef", 0.1, 1.0, log=True),
        "consistency_coef": trial.suggest_float("consistency_coef", 0.5, 5.0, log=True),
        "ent_coef": trial.suggest_float("ent_coef", 1e-4, 5e-2, log=True),
    }
    if n_actions > 0:
        params["policy_action_fraction"] = trial.suggest_categorical("policy_action_fraction", [0.25, 0.5, 1.0])
        params["flat_std_scale"] = trial.suggest_float("flat_std_scale", 1.0, 4.0)
    if fixed.get("policy", "MlpPolicy") == "MlpPolicy":
        params["network"] = trial.suggest_categorical("network", list(NETWORKS))
    hyperparams = convert_ezv2_params(params)
    # Display true values
    for name in ("gamma", "batch_size", "n_simulations", "n_sampled_actions"):
        trial.set_user_attr(name, hyperparams[name])
    return merge_policy_kwargs(fixed, hyperparams)


def convert_ezv2_params(sampled_params: dict[str, Any]) -> dict[str, Any]:
    """
    :param sampled_params: what a trial has sampled, by the names of its ``suggest_...`` calls
    :return: arguments of the constructor
    """
    hyperparams = dict(sampled_params)
    hyperparams["gamma"] = 1 - hyperparams.pop("one_minus_gamma")
    hyperparams["batch_size"] = 2 ** hyperparams.pop("batch_size_pow")
    hyperparams["n_simulations"] = 2 ** hyperparams.pop("n_simulations_pow")
    hyperparams["n_sampled_actions"] = max(2, hyperparams["n_simulations"] // hyperparams.pop("simulations_per_action"))
    if "network" in hyperparams:
        hyperparams["policy_kwargs"] = dict(NETWORKS[hyperparams.pop("network")])
    return hyperparams


def merge_policy_kwargs(fixed: dict[str, Any], sampled: dict[str, Any]) -> dict[str, Any]:
    """
    A sampled size of the network leaves the rest of ``policy_kwargs`` as it is, the supports for instance.

    :param fixed: of the configuration, ``policy_kwargs`` evaluated
    :param sampled: what has precedence
    :return: ``sampled``, with what else ``policy_kwargs`` holds in ``fixed``
    """
    if "policy_kwargs" not in sampled:
        return sampled
    return {**sampled, "policy_kwargs": {**(fixed.get("policy_kwargs") or {}), **sampled["policy_kwargs"]}}
