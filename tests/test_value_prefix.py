"""
The value prefix: its targets and training against loops, its search against a brute force that predicts each window anew.

Shapes: B rows, U unroll steps.
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from common import TINY
from gymnasium import spaces
from stable_baselines3.common.torch_layers import FlattenExtractor
from test_search import NetworkSearch, RecordingGenerator, observations
from torch import nn

from sb3_ezv2 import EZV2
from sb3_ezv2.base_policy import PREFIX_WINDOW
from sb3_ezv2.distributions import SupportSpec
from sb3_ezv2.image_networks import ImageNetwork
from sb3_ezv2.networks import BaseNetwork, Ezv2Network, PrefixHead
from sb3_ezv2.search import GumbelSearch, SearchSettings

VECTOR = spaces.Box(-np.inf, np.inf, (3,), np.float32)
IMAGE = spaces.Box(0, 255, (2, 16, 16), np.uint8)
DISCRETE = spaces.Discrete(2)
BOX = spaces.Box(-1.0, 1.0, (2,))
SUPPORT = SupportSpec(299.0, 21, "h")


def make_network(observation_space: spaces.Space, action_space: spaces.Space, window: int = 5) -> BaseNetwork:
    """A small network whose rewards differ clearly between paths."""
    th.manual_seed(3)
    sizes: dict[str, Any] = dict(value_support=SUPPORT, reward_support=SUPPORT, prefix_window=window, lstm_dim=12)
    sizes.update(net_arch=[16], n_blocks=1, action_embedding_dim=4, projection_dim=8)
    network: BaseNetwork
    if observation_space == VECTOR:
        network = Ezv2Network(VECTOR, action_space, FlattenExtractor(VECTOR), state_dim=8, **sizes)
    else:
        network = ImageNetwork(IMAGE, action_space, channels=8, n_downsamples=2, head_channels=2, **sizes)
    for parameter in network.parameters():
        with th.no_grad():
            parameter.add_(0.3 * th.randn(parameter.shape))
    for head, scale in ((network.value_head, 0.2), (network.reward_head, 1.0), (network.policy_head, 0.2)):
        last = head.mlp[-1]
        assert isinstance(last, nn.Linear)
        nn.init.normal_(last.weight, std=scale)
    return network.eval()


def random_observations(space: spaces.Space, count: int) -> th.Tensor:
    if space == VECTOR:
        return observations(count)
    return th.randint(256, (count, *IMAGE.shape), dtype=th.uint8, generator=th.Generator().manual_seed(0))


class PrefixSearch(NetworkSearch):
    """
    The plain search in which nothing of the LSTM is kept: for every new node the states since the root are gone through
    again, each window by itself. A node's entry in ``self.states`` begins with the list of its states since the root.
    """

    def __init__(self, network: BaseNetwork, observation: th.Tensor, *arguments: Any):
        super().__init__(network, observation, *arguments)  # type: ignore[arg-type]
        assert isinstance(network.reward_head, PrefixHead)
        self.window = network.reward_head.window
        root = network.represent(observation.unsqueeze(0))
        self.states = [([root], *self.states[0][1:])]  # type: ignore[list-item]

    def prefix(self, window: list[th.Tensor]) -> float:
        """The predicted sum of a window's rewards, from the states after its steps."""
        if not window:
            return 0.0
        logits = self.network.reward_logits(th.stack(window))[-1]
        return self.network.reward_support.decode(logits).item()

    def step(self, state: int, action: Any) -> int:
        before: Any = self.states[state][0]
        path = [*before, self.network.dynamics_step(before[-1], th.as_tensor(action).unsqueeze(0))]
        steps = len(path) - 1
        start = (steps - 1) // self.window * self.window  # steps before this window
        reward = self.prefix(path[start + 1 :]) - self.prefix(path[start + 1 : -1])
        value = self.network.value_support.decode(self.network.value_head(path[-1])).item()
        self.states.append((path, reward, value, self.network.policy_head(path[-1])))  # type: ignore[arg-type]
        return len(self.states) - 1


@pytest.mark.parametrize("observation_space", [VECTOR, IMAGE], ids=["vector", "image"])
@pytest.mark.parametrize("action_space", [DISCRETE, BOX], ids=["discrete", "box"])
def test_search_against_brute_force(observation_space: spaces.Space, action_space: spaces.Space) -> None:
    """Rewards along a path are differences of prefixes; after a window's steps the LSTM and the sum begin anew."""
    network = make_network(observation_space, action_space, window=3)
    settings = SearchSettings(n_simulations=40, n_sampled_actions=2, n_inner_actions=1, gamma=0.9)
    roots = 12
    obs = random_observations(observation_space, roots)
    rng = RecordingGenerator(3)
    result = GumbelSearch(network, settings).run(obs, rng)
    gumbel = rng.noise(roots, 2) if network.discrete else np.zeros((roots, 2))
    inner = None if network.discrete else rng.inner_noise(settings, roots, 2)
    clear, deepest = 0, 0
    for root in range(roots):
        candidates = [0, 1] if result.candidates is None else list(result.candidates[root])
        noise = None if inner is None else inner[:, root]
        with th.no_grad():
            search = PrefixSearch(network, obs[root], settings, gumbel[root], candidates, noise)
            search.run()
        if search.margin < 1e-4:
            continue
        clear += 1
        deepest = max(deepest, *search.depths)
        visits = max(search.root.visits(action) for action in range(2))
        assert result.action[root] == search.choose_at_root(visits)
        assert result.value[root].item() == pytest.approx(search.root.value(), rel=1e-3, abs=1e-3)
        assert result.depth[root].item() == pytest.approx(np.mean(search.depths), rel=1e-5)
        np.testing.assert_allclose(result.policy[root], search.improved_policy(search.root), atol=1e-3)
    assert clear >= 6 and deepest > 3


def test_rewards_of_a_path_are_differences_of_its_windows_sums() -> None:
    network = make_network(VECTOR, DISCRETE, window=3)
    obs, actions = observations(4), [0, 1, 1, 0, 1, 0, 0, 1]
    with th.no_grad():
        state = network.represent(obs)
        states = []
        for action in actions:
            state = network.dynamics_step(state, th.full((4,), action))
            states.append(state)
        sums = network.reward_support.decode(network.reward_logits(th.stack(states)))  # [U, B]
        packed, _, _ = network.initial_inference(obs)
        for step, action in enumerate(actions):
            packed, reward, value, policy = network.recurrent_inference(packed, th.full((4,), action))
            before = 0 if step % 3 == 0 else sums[step - 1]
            th.testing.assert_close(reward, sums[step] - before, rtol=1e-4, atol=1e-4)
            th.testing.assert_close(value, network.value_support.decode(network.value_head(states[step])))
            th.testing.assert_close(policy, network.policy_head(states[step]))
    assert sums.std() > 0.05


def test_targets_are_running_sums_within_windows() -> None:
    head = PrefixHead(nn.Identity(), 4, lstm_dim=3, window=3, net_arch=[4], out=5)
    rewards = th.tensor([[1.0, 2, 4, 8, 16, 32, 64], [0, 0, 1, 0, -1, 0, 1]])
    expected = th.tensor([[1.0, 3, 7, 8, 24, 56, 64], [0, 0, 1, 0, -1, -1, 1]])
    assert th.equal(head.targets(rewards), expected)


@pytest.mark.parametrize("window", [2, 5])
def test_unrolled_lstm_is_torchs(window: int) -> None:
    """Against ``nn.LSTM`` with the same weights, one window at a time."""
    th.manual_seed(0)
    head = PrefixHead(nn.Linear(3, 4), 4, lstm_dim=6, window=window, net_arch=[5], out=7).eval()
    nn.init.normal_(head.mlp[-1].weight)  # type: ignore[arg-type]
    lstm = nn.LSTM(4, 6)
    lstm.load_state_dict({f"{name}_l0": value for name, value in head.lstm.state_dict().items()})
    states = th.randn(5, 8, 3)
    expected = th.cat([lstm(part)[0] for part in head.trunk(states).split(window)])
    th.testing.assert_close(head(states), head.mlp(head.norm(expected.flatten(0, 1))).unflatten(0, (5, 8)))


def test_before_training_every_reward_is_exactly_zero() -> None:
    network = Ezv2Network(
        VECTOR, DISCRETE, FlattenExtractor(VECTOR), net_arch=[16], state_dim=8, n_blocks=1, action_embedding_dim=4,
        projection_dim=8, value_support=SUPPORT, reward_support=SUPPORT, prefix_window=5, lstm_dim=12,
    ).eval()  # fmt: skip
    packed, value, _ = network.initial_inference(observations(6))
    assert (value == 0).all()
    for _ in range(7):
        packed, reward, value, _ = network.recurrent_inference(packed, th.ones(6, dtype=th.long))
        assert (reward == 0).all() and (value == 0).all()


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])
def test_training_with_a_value_prefix(env_id: str) -> None:
    kwargs = {**TINY["policy_kwargs"], "value_prefix": True, "lstm_dim": 8}
    model = EZV2("MlpPolicy", env_id, seed=0, **{**TINY, "policy_kwargs": kwargs, "unroll_steps": 6})
    before = [x.clone() for x in model.policy.network.reward_head.parameters()]
    model.learn(60)
    assert model._n_updates == 20
    after = model.policy.network.reward_head.parameters()
    # The last layer starts at zero, so that the first update leaves what is below alone
    assert all(not th.equal(x, y) for x, y in zip(before, after))


def test_a_constant_reward_is_learned_as_a_ramp() -> None:
    """A reward of 1 per step, for ever: the prefixes are 1 to 5, every edge of the search is 1 again, in both windows."""
    env = gym.wrappers.TransformReward(gym.make("Pendulum-v1"), lambda _: 1.0)
    kwargs = {**TINY["policy_kwargs"], "value_prefix": True, "lstm_dim": 16}
    settings = {**TINY, "policy_kwargs": kwargs, "learning_rate": 3e-3, "batch_size": 32, "unroll_steps": 2 * PREFIX_WINDOW}
    model = EZV2("MlpPolicy", env, seed=0, gamma=0.9, vf_coef=0.1, **settings).learn(400)
    network = model.policy.network.eval()
    assert model.replay_buffer is not None
    batch = model.replay_buffer.sample(64)
    packed, _, _ = network.initial_inference(batch.observations[:, 0])
    rewards = []
    with th.no_grad():
        for step in range(2 * PREFIX_WINDOW):
            packed, reward, _, _ = network.recurrent_inference(packed, batch.actions[:, step])
            rewards.append(reward.median().item())
    np.testing.assert_allclose(rewards, 1.0, atol=0.15)


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(unroll_steps=4), "at least unroll_steps=5"),
        (dict(policy_kwargs=dict(value_prefix=5)), "value_prefix must be True or False"),
        (dict(policy_kwargs=dict(value_prefix=True, lstm_dim=0)), "lstm_dim must be a positive integer"),
    ],
    ids=str,
)
def test_bad_input(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EZV2("MlpPolicy", "CartPole-v1", **{"policy_kwargs": dict(value_prefix=True), **settings})
