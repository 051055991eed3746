"""Losses of the unrolled model: EfficientZero V2 Eq. 3, 4, 5, 8 and 9."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch as th
from torch.nn import functional as F

from sb3_ezv2.distributions import SquashedGaussian
from sb3_ezv2.multi_discrete import MultiCategorical
from sb3_ezv2.networks import BaseNetwork
from sb3_ezv2.replay_buffer import Batch
from sb3_ezv2.unroll import ModelOutputs, later_observations, model_outputs

ENTROPY_SAMPLES = 4


class Targets(NamedTuple):
    """
    What a batch of B sequences with U unroll steps is trained towards.

    :param values: [B, U + 1], in the units of the rewards
    :param value_mask: bool [B, U + 1]
    :param policies: [B, U + 1, K], weights of the candidates, or of all actions if discrete
    :param candidates: [B, U + 1, K, A] in [-1, 1], or int64 [B, U + 1, K, D] of MultiDiscrete actions; None for discrete ones
    """

    values: th.Tensor
    value_mask: th.Tensor
    policies: th.Tensor
    candidates: th.Tensor | None


class Losses(NamedTuple):
    """
    Scalar tensors, means over the batch with importance weights, summed over the unroll and divided by U.

    :param total: the weighted sum that is minimised
    :param reward: cross-entropy of the rewards
    :param policy: cross-entropy of the policy (Eq. 8 or 9)
    :param value: cross-entropy of the values
    :param consistency: negative cosine similarity (Eq. 4)
    :param observation: mean squared error of the observations, normalised, predicted from imagined states; 0 if they are not
    :param entropy: mean entropy of the policy, per step
    :param value_error: [B] absolute value errors at the sequences' starts, in the units of the rewards
    """

    total: th.Tensor
    reward: th.Tensor
    policy: th.Tensor
    value: th.Tensor
    consistency: th.Tensor
    observation: th.Tensor
    entropy: th.Tensor
    value_error: th.Tensor

    def read(self, grad_norm: th.Tensor) -> tuple[np.ndarray, str | None]:
        """
        The one read of the device in an update: the value errors are the next priorities, and no weight may change where
        a loss is NaN.

        :param grad_norm: norm of the total's gradient
        :return: float32 [B], the value errors; name of the first term that is NaN or infinite, or None
        """
        terms = {
            "reward loss": self.reward,
            "policy loss": self.policy,
            "value loss": self.value,
            "consistency loss": self.consistency,
            "observation loss": self.observation,
            "policy's entropy": self.entropy,
            "value error": self.value_error.sum(),
            "gradient": grad_norm,
        }
        scalars = th.stack([term.detach() for term in terms.values()])
        values = th.cat([self.value_error, scalars]).cpu().numpy()
        errors, finite = values[: -len(terms)], np.isfinite(values[-len(terms) :])
        return errors, next((name for name, is_finite in zip(terms, finite) if not is_finite), None)


def compute_losses(
    network: BaseNetwork,
    batch: Batch,
    targets: Targets,
    rng: np.random.Generator,
    reward_coef: float = 1.0,
    policy_coef: float = 1.0,
    vf_coef: float = 0.25,
    consistency_coef: float = 2.0,
    observation_coef: float = 0.0,
    ent_coef: float = 5e-3,
    bfloat16: bool = False,
    outputs: ModelOutputs = model_outputs,
) -> Losses:
    """
    Eq. 3 summed over the unroll, with the whole scaled by 1 / U.

    The heads see the states of all steps as one batch, so that the statistics of their batch norm are those of
    the mixture that they meet in a search.

    :param network: the online model, in training mode
    :param batch: B sequences of U steps
    :param targets: of the batch
    :param rng: of the samples that estimate the entropy of a squashed Gaussian
    :param reward_coef: lambda_1
    :param policy_coef: lambda_2
    :param vf_coef: lambda_3
    :param consistency_coef: lambda_4
    :param observation_coef: weight of the observation loss, of a network with an ``observation_head``; 0: there is none
    :param ent_coef: weight of the entropy bonus
    :param bfloat16: matrix products and convolutions in bfloat16 (autocast); the weights and the losses are float32
    :param outputs: of the network; :func:`~sb3_ezv2.unroll.model_outputs`, or that compiled
    :return: see :class:`Losses`
    """
    size, steps = batch.rewards.shape
    out = outputs(network, batch.observations, batch.actions, bfloat16)

    value_logits = out.value.float().unflatten(0, (steps + 1, size)).transpose(0, 1)  # [B, U + 1, bins]
    value = _sum(network.value_support.cross_entropy(value_logits, targets.values), targets.value_mask)
    reward_logits = out.reward.float().transpose(0, 1)  # [B, U, bins]
    reward_targets = network.reward_targets(batch.rewards)
    reward = _sum(network.reward_support.cross_entropy(reward_logits, reward_targets), batch.reward_mask)

    policy_out = out.policy.float().unflatten(0, (steps + 1, size)).transpose(0, 1)  # [B, U + 1, outputs]
    if targets.candidates is None:
        log_prob = F.log_softmax(policy_out, dim=-1)
        step_entropy = -(log_prob.exp() * log_prob).sum(-1)
    elif network.category_sizes:
        log_prob = MultiCategorical(policy_out.unsqueeze(-2), network.category_sizes).log_prob(targets.candidates)
        step_entropy = MultiCategorical(policy_out, network.category_sizes).entropy()
    else:
        log_prob = SquashedGaussian(policy_out.unsqueeze(-2)).log_prob(targets.candidates)  # [B, U + 1, K]
        noise = rng.standard_normal((ENTROPY_SAMPLES, size, steps + 1, network.action_dim), dtype=np.float32)
        step_entropy = SquashedGaussian(policy_out).entropy(th.from_numpy(noise).to(policy_out.device))
    policy = _sum(-(targets.policies * log_prob).sum(-1), batch.policy_mask)
    entropy = _sum(step_entropy, batch.policy_mask)

    similarity = (
        F.cosine_similarity(out.predicted.float(), out.observed.float(), dim=-1).unflatten(0, (steps, size)).transpose(0, 1)
    )
    consistency = _sum(-similarity, batch.observed[:, 1:])

    per_sequence = (
        reward_coef * reward + policy_coef * policy + vf_coef * value + consistency_coef * consistency - ent_coef * entropy
    )
    observation = th.zeros_like(reward)
    if out.observations is not None:
        with th.no_grad():
            features = network.observation_targets(later_observations(batch.observations))
        errors = (out.observations.float() - features).square().mean(-1).unflatten(0, (steps, size)).transpose(0, 1)
        observation = _sum(errors, batch.observed[:, 1:])
        per_sequence = per_sequence + observation_coef * observation
    weights = batch.weights

    def mean(loss: th.Tensor) -> th.Tensor:
        return (weights * loss).mean() / steps

    with th.no_grad():
        value_error = (network.value_support.decode(value_logits[:, 0]) - targets.values[:, 0]).abs()
        mean_entropy = entropy.sum() / batch.policy_mask.sum().clamp(min=1)
    return Losses(
        total=mean(per_sequence),
        reward=mean(reward).detach(),
        policy=mean(policy).detach(),
        value=mean(value).detach(),
        consistency=mean(consistency).detach(),
        observation=mean(observation).detach(),
        entropy=mean_entropy,
        value_error=value_error,
    )


def _sum(loss: th.Tensor, mask: th.Tensor) -> th.Tensor:
    """Sum over the steps where the mask is set. :param loss: [B, steps] :param mask: bool [B, steps] :return: [B]"""
    return (loss * mask).sum(1)
