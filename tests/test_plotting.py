"""What an agent thinks: trees and episodes as arrays against computations by hand, and figures that show these numbers."""

from __future__ import annotations

import csv
import importlib
import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from common import BOX, SpacesEnv
from gymnasium import spaces
from gymnasium.wrappers import TimeLimit
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from test_export import ACTIONS, IMAGE, KINDS, agent

import sb3_ezv2.search
from benchmarks import learn, pictures, policy_head
from sb3_ezv2 import EZV2, introspection, plotting
from sb3_ezv2.introspection import discounted_returns, episode_errors, imagine, play, search_tree

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("Agg")

OBSERVATION = np.array([0.3, -0.2, 0.9], np.float32)
GAMMA = 0.9
LINE = spaces.Box(-2.0, 3.0, (1,), np.float32)
WIDE = spaces.Box(-1.0, 1.0, (3,), np.float32)
MANY = spaces.MultiBinary(7)


def thinker(action_space: spaces.Space = ACTIONS["discrete"], observation_space: spaces.Space = BOX, **settings: Any) -> EZV2:
    return agent(action_space, observation_space, **{"n_simulations": 20, "gamma": GAMMA, "noise": 0.1, **settings})


def axes(figure: Any) -> list[Any]:
    return figure.axes


def texts(axis: Any) -> list[str]:
    return [text.get_text() for text in axis.texts]


def lines(figure: Any) -> dict[str, np.ndarray]:
    """The curves of all axes by their labels."""
    curves = [line for axis in figure.axes for line in axis.lines]
    return {line.get_label(): np.asarray(line.get_ydata()) for line in curves}


# ---------------------------------------------------------------------- the tree


@KINDS
@pytest.mark.parametrize("native", [True, False])
def test_the_nodes_are_those_of_the_search(kind: str, native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not native:
        monkeypatch.setattr(sb3_ezv2.search, "NATIVE_MAX_ROOTS", 0)
    model = thinker(ACTIONS[kind])
    network, search = model.policy.averaged_network, model.policy.search
    with pytest.raises(RuntimeError, match="run"):
        search.last_tree()
    obs = th.as_tensor(np.stack([OBSERVATION, -OBSERVATION, 0 * OBSERVATION]))
    result = search.run(obs, np.random.default_rng(0))
    nodes, actions = search.last_tree()
    assert nodes["parent"].shape == (3, 21)
    for root in range(3):
        tree = {name: array[root] for name, array in nodes.items()}
        parent, visits, q = tree["parent"], tree["visits"], tree["q"]
        assert (parent[0], tree["action"][0], visits[0]) == (-1, -1, 20)
        assert (parent[1:] >= 0).all() and (parent[1:] < np.arange(1, 21)).all()
        states, values, _ = network.initial_inference(obs[root : root + 1])
        known = {0: states}
        assert tree["network_value"][0] == pytest.approx(float(values), rel=1e-4, abs=1e-4)
        for node in range(21):
            children = np.flatnonzero(parent == node)
            # a node's visits are its own expansion and its children's
            assert visits[node] == visits[children].sum() + (node > 0)
            # Eq. 10: the mean of its network value and of what came through the children
            mean = (tree["network_value"][node] + (visits[children] * q[children]).sum()) / (1 + visits[children].sum())
            assert tree["value"][node] == pytest.approx(mean, rel=1e-4, abs=1e-4)
            if node == 0:
                continue
            assert q[node] == pytest.approx(tree["reward"][node] + GAMMA * tree["value"][node], rel=1e-4, abs=1e-4)
            # the model's own step with the node's action gives the node
            action = th.tensor(tree["action"][node : node + 1]).long()
            if actions is not None:
                action = th.as_tensor(actions[root, node : node + 1])
            known[node], reward, value, _ = network.recurrent_inference(known[int(parent[node])], action)
            assert tree["reward"][node] == pytest.approx(float(reward), rel=1e-4, abs=1e-4)
            assert tree["network_value"][node] == pytest.approx(float(value), rel=1e-4, abs=1e-4)
        expected = tree["value"][0]
        if search.settings.improved_value:  # all actions were tried
            first = np.flatnonzero(parent == 0)
            expected = (result.policy[root].numpy()[tree["action"][first]] * q[first]).sum()
        assert float(result.value[root]) == pytest.approx(expected, rel=1e-4, abs=1e-5)
        assert (actions is None) == (result.candidates is None) == (kind == "discrete")
        if actions is not None and result.candidates is not None:
            assert (actions[root, 0] == 0).all()
            first = np.flatnonzero(parent == 0)
            np.testing.assert_array_equal(actions[root, first], result.candidates[root].numpy()[tree["action"][first]])


@KINDS
def test_a_search_tree_is_the_one_that_predict_acts_by(kind: str) -> None:
    model = thinker(ACTIONS[kind])
    for n_simulations in (None, 3):
        tree = search_tree(model, OBSERVATION, n_simulations)
        action, _ = model.predict(OBSERVATION, deterministic=True, n_simulations=n_simulations)
        if tree.candidates is None:
            assert tree.action - 1 == action
            assert tree.prior.sum() == pytest.approx(1, rel=1e-4, abs=1e-5) and tree.prior.std() > 0.01
        else:
            np.testing.assert_allclose(tree.candidates[tree.action], action, rtol=1e-6)
            assert tree.candidates.dtype == action.dtype
            if kind == "binary":  # all actions, with their probabilities
                assert tree.prior.sum() == pytest.approx(1, rel=1e-4) and tree.prior.std() > 0.01
                likeliest = tree.candidates[tree.prior.argmax()]
                np.testing.assert_array_equal(likeliest, model.predict(OBSERVATION, deterministic=True, n_simulations=0)[0])
            else:
                np.testing.assert_allclose(tree.prior, 1 / len(tree.prior))
            assert tree.node_actions is not None
            first = int(np.flatnonzero(tree.nodes["parent"] == 0)[0])
            np.testing.assert_allclose(tree.node_actions[first], tree.candidates[tree.nodes["action"][first]])
        assert tree.visits.sum() == (n_simulations or 20)
        np.testing.assert_array_equal(np.isnan(tree.q), tree.visits == 0)
        assert tree.policy.sum() == pytest.approx(1, rel=1e-4, abs=1e-5)
    other = search_tree(model.policy, OBSERVATION, rng=np.random.default_rng(1))
    assert not np.array_equal(other.nodes["q"], search_tree(model, OBSERVATION).nodes["q"])


def test_the_bars_and_nodes_of_a_discrete_search() -> None:
    model = thinker()
    tree = search_tree(model, OBSERVATION)
    names = ["north", "south", "east", "west"]
    figure = plotting.plot_search(model, OBSERVATION, max_depth=50, action_names=names)
    policy_axis, visit_axis, q_axis, tree_axis, _ = axes(figure)
    heights = np.array([bar.get_height() for bar in policy_axis.patches])
    np.testing.assert_allclose(heights, np.concatenate([tree.prior, tree.policy]), rtol=1e-6)
    visits = [bar.get_height() for bar in visit_axis.patches]
    np.testing.assert_array_equal(visits, tree.visits)
    assert sum(visits) == 20
    assert [label.get_text() for label in visit_axis.get_xticklabels()] == names
    np.testing.assert_allclose(np.asarray(q_axis.collections[0].get_offsets())[:, 1], tree.q[tree.visits > 0], rtol=1e-6)
    numbers = [int(text) for text in texts(tree_axis) if text.isdigit()]
    assert sorted(numbers) == sorted(tree.nodes["visits"]) and len(numbers) == 21
    assert sum(text in names for text in texts(tree_axis)) == 20
    figure.canvas.draw()

    # one level: the visits of the root's actions, and below them what is not drawn
    level = plotting.plot_search(model, OBSERVATION, max_depth=1, action_names=names).axes[3]
    numbers = [int(text) for text in texts(level) if text.isdigit()]
    assert numbers[0] == 20 and sum(numbers[1:]) == 20
    hidden = [int(text[1:]) for text in texts(level) if text.startswith("+")]
    assert sum(hidden) == 20 - np.count_nonzero(tree.visits)
    assert f"{sum(hidden)} nodes below depth 1" in level.figure.get_suptitle()


@pytest.mark.parametrize("space", [ACTIONS["multi"], ACTIONS["binary"], spaces.MultiDiscrete([5]), MANY], ids=str)
def test_actions_of_several_dimensions_are_written_out(space: spaces.Space) -> None:
    model = thinker(space)
    tree = search_tree(model, OBSERVATION)
    assert tree.candidates is not None and tree.node_actions is not None
    assert all(space.contains(action) for action in [*tree.candidates, *tree.node_actions])
    figure = plotting.plot_search(model, OBSERVATION, max_depth=50)
    _, visit_axis, _, tree_axis, _ = axes(figure)
    names = [",".join(str(int(x)) for x in action) for action in tree.candidates]
    edges = [",".join(str(int(x)) for x in action) for action in tree.node_actions[1:]]
    if space is MANY:
        names, edges = [f"#{i}" for i in range(len(names))], [f"#{i}" for i in tree.nodes["action"][1:]]
    assert [label.get_text() for label in visit_axis.get_xticklabels()] == names and len(set(names)) == len(names)
    np.testing.assert_array_equal([bar.get_height() for bar in visit_axis.patches], tree.visits)
    visits = [str(n) for n in tree.nodes["visits"]]
    assert sorted(texts(tree_axis)) == sorted([*visits, *edges])
    with pytest.raises(ValueError, match="action_names are for Discrete actions"):
        plotting.plot_search(model, OBSERVATION, action_names=names)
    figure.canvas.draw()


@pytest.mark.parametrize("space", [LINE, ACTIONS["box"], WIDE], ids=["1", "2", "3"])
def test_the_candidates_of_a_box_search(space: spaces.Box) -> None:
    model = thinker(space, n_sampled_actions=8)
    tree = search_tree(model, OBSERVATION, 6)
    assert tree.candidates is not None and np.count_nonzero(tree.visits) < 8
    assert (tree.candidates >= space.low).all() and (tree.candidates <= space.high).all()
    figure = plotting.plot_search(model, OBSERVATION, n_simulations=6)
    visited = tree.visits > 0
    if space is WIDE:
        np.testing.assert_array_equal([bar.get_height() for bar in axes(figure)[1].patches], tree.visits)
    else:
        points = axes(figure)[0].collections[0]
        expected = tree.candidates[visited]
        if space is LINE:
            expected = np.column_stack([expected, tree.q[visited]])
        np.testing.assert_allclose(np.asarray(points.get_offsets()), expected, rtol=1e-6)
        areas = points.get_sizes()
        np.testing.assert_allclose((areas - areas.min()) / 30, tree.visits[visited] - tree.visits[visited].min())
    if space is LINE:
        # the network's policy is a density over the environment's actions; what tanh squeezes into the very ends is cut off
        (density,) = [c for axis in axes(figure) for c in axis.collections if c.get_label().startswith("network")]
        corners = density.get_paths()[0].vertices
        x, y = corners[:-1].T
        area = abs((x * np.roll(y, -1) - np.roll(x, -1) * y).sum()) / 2
        assert area == pytest.approx(1, abs=0.1)
    figure.canvas.draw()


def test_the_layout_of_a_tree() -> None:
    #   0 -> 1, 2; 1 -> 3, 4; 3 -> 5
    nodes = {"parent": np.array([-1, 0, 0, 1, 1, 3])}
    x, depth = plotting.tree_layout(nodes, np.array([0, 9, 1, 5, 4, 0]), max_depth=9)
    np.testing.assert_array_equal(depth, [0, 1, 1, 2, 2, 3])
    np.testing.assert_array_equal(x, [0.75, 1.5, 0, 2, 1, 2])
    x, _ = plotting.tree_layout(nodes, np.array([0, 9, 1, 5, 4, 0]), max_depth=1)
    np.testing.assert_array_equal(x, [0.5, 1, 0, np.nan, np.nan, np.nan])


# ---------------------------------------------------------------------- episodes


def test_discounted_returns_by_hand() -> None:
    np.testing.assert_array_equal(discounted_returns(np.array([1.0, 2.0, 3.0]), 0.5, 4.0), [3.25, 4.5, 5.0])


@KINDS
@pytest.mark.parametrize("truncates", [True, False])
def test_a_played_episode_is_what_happened(kind: str, truncates: bool) -> None:
    model, space = thinker(ACTIONS[kind]), ACTIONS[kind]
    env = SpacesEnv(BOX, space, truncates=truncates)
    episode = play(model, env, seed=3)
    assert episode.observations.shape == (12, 3) and len(episode.rewards) == len(episode.actions) == 11
    assert episode.terminated is not truncates
    actions, _ = model.predict(episode.observations[:-1].numpy(), deterministic=True)
    if isinstance(space, spaces.Box):
        scaled = episode.actions.numpy()
        assert (np.abs(scaled) <= 1).all()
        taken = space.low + (scaled + 1) / 2 * (space.high - space.low)
        np.testing.assert_allclose(taken, actions, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(episode.rewards, -np.square(taken).mean(1), rtol=1e-4, atol=1e-5)
    elif isinstance(space, spaces.Discrete):
        np.testing.assert_array_equal(episode.actions.numpy() - 1, actions)
        np.testing.assert_array_equal(episode.rewards, actions == -1)
    else:
        assert episode.actions.dtype == th.int64 and episode.actions.min() >= 0
        start = np.array([5, 0, -2]) if kind == "multi" else 0
        np.testing.assert_array_equal(episode.actions.numpy() + start, actions)
        np.testing.assert_allclose(episode.rewards, np.square(actions).mean(1) * -1.0)

    errors = episode_errors(model, episode)
    with th.no_grad():
        values = model.policy.averaged_network.values(episode.observations).numpy()
    ending = values[-1] if truncates else 0.0
    # by hand, from each step to the end
    for step in range(11):
        rest = episode.rewards[step:]
        expected = (GAMMA ** np.arange(len(rest)) * rest).sum() + GAMMA ** len(rest) * ending
        assert errors.returns[step] == pytest.approx(expected, rel=1e-4, abs=1e-5)
    np.testing.assert_allclose(errors.network_values, values[:-1], rtol=1e-4, atol=1e-5)
    tree = search_tree(model, episode.observations[4].numpy())
    assert errors.search_values[4] == pytest.approx(tree.value, rel=1e-4, abs=1e-4)
    rollout = imagine(model, episode, start=4, steps=1)
    assert errors.predicted_rewards[4] == pytest.approx(rollout.imagined_rewards[0], rel=1e-4, abs=1e-5)

    drawn = lines(plotting.plot_episode(model, episode))
    np.testing.assert_array_equal(drawn["network's value"], errors.network_values)
    np.testing.assert_array_equal(drawn["search's value"], errors.search_values)
    np.testing.assert_array_equal(drawn["real"], episode.rewards)
    measured = next(values for label, values in drawn.items() if label.startswith("measured"))
    np.testing.assert_array_equal(measured, errors.returns)
    error = errors.network_values - errors.returns
    label = f"network: mean {error.mean():+.3g}, mean size {np.abs(error).mean():.3g}"
    np.testing.assert_array_equal(drawn[label], error)


@pytest.mark.parametrize("value_prefix", [False, True])
@pytest.mark.parametrize("observation_space", [BOX, IMAGE], ids=["state", "image"])
def test_an_imagined_rollout_is_the_model_unrolled(observation_space: spaces.Box, value_prefix: bool) -> None:
    model = thinker(observation_space=observation_space)
    if value_prefix:
        settings = {**model.policy_kwargs, "value_prefix": True, "lstm_dim": 8}
        model = thinker(observation_space=observation_space, policy_kwargs=settings)
    episode = play(model, SpacesEnv(observation_space, ACTIONS["discrete"]), seed=0)
    network = model.policy.averaged_network
    rollout = imagine(model, episode, start=2, steps=4)
    with th.no_grad():
        real = network.represent(episode.observations[2:7]).flatten(1)
        state, value, _ = network.initial_inference(episode.observations[2:3])
        values, rewards, latents = [float(value)], [], [state.flatten(1)[0, : real.shape[1]]]
        for step in range(2, 6):
            state, reward, value, _ = network.recurrent_inference(state, episode.actions[step : step + 1])
            values.append(float(value))
            rewards.append(float(reward))
            latents.append(state.flatten(1)[0, : real.shape[1]])
    np.testing.assert_allclose(rollout.imagined_rewards, rewards, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(rollout.imagined_values, values, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(rollout.rewards, episode.rewards[2:6])
    similarity = [float(a @ b / a.norm() / b.norm()) for a, b in zip(latents, real)]
    np.testing.assert_allclose(rollout.similarity, similarity, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        rollout.unchanged_similarity, [float(real[0] @ b / real[0].norm() / b.norm()) for b in real], rtol=1e-4, atol=1e-5
    )
    assert rollout.similarity[0] == pytest.approx(1, rel=1e-4, abs=1e-5)
    assert rollout.values[0] == pytest.approx(rollout.imagined_values[0], rel=1e-4, abs=1e-5)
    assert rollout.projected_similarity.shape == (5,) and (np.abs(rollout.projected_similarity) <= 1.0001).all()
    # not beyond the end
    assert len(imagine(model, episode, start=8).rewards) == 3

    figure = plotting.plot_rollout(model, episode, start=2, steps=4)
    drawn = lines(figure)
    np.testing.assert_array_equal(drawn["imagined"], rollout.imagined_rewards)
    np.testing.assert_array_equal(drawn["of the imagined state"], rollout.imagined_values)
    np.testing.assert_array_equal(drawn["imagined and real state"], rollout.similarity)
    images = [axis.images[0].get_array() for axis in figure.axes if axis.images]
    assert len(images) == (5 if observation_space is IMAGE else 0)
    if images:
        np.testing.assert_array_equal(images[4], episode.observations[6, 0].numpy())
    figure.canvas.draw()


def test_playing_leaves_the_statistics_of_a_normaliser_alone() -> None:
    model = thinker()
    venv = VecNormalize(DummyVecEnv([lambda: TimeLimit(SpacesEnv(BOX, ACTIONS["discrete"], length=50), 7)]))
    assert not isinstance(venv.obs_rms, dict)
    venv.obs_rms.mean += 1.0
    before = venv.obs_rms.mean.copy()
    episode = play(model, venv, max_steps=5)
    assert len(episode.rewards) == 5 and not episode.terminated
    assert venv.training
    np.testing.assert_array_equal(venv.obs_rms.mean, before)
    assert not play(model, venv).terminated and len(play(model, venv).rewards) == 7


# ---------------------------------------------------------------------- what is refused


def test_what_cannot_be_drawn_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = thinker()
    with pytest.raises(TypeError, match="an EZV2 agent or its policy is needed, not str"):
        search_tree("agent", OBSERVATION)
    with pytest.raises(ValueError, match="one observation"):
        search_tree(model, np.stack([OBSERVATION] * 2))
    with pytest.raises(ValueError, match="n_simulations must be an integer of at least 1"):
        search_tree(model, OBSERVATION, n_simulations=0)
    with pytest.raises(ValueError, match="max_depth"):
        plotting.plot_search(model, OBSERVATION, max_depth=0)
    with pytest.raises(ValueError, match="there are 4 actions, but 1 names"):
        plotting.plot_search(model, OBSERVATION, action_names=["left"])
    with pytest.raises(ValueError, match="one environment is played"):
        play(model, DummyVecEnv([lambda: SpacesEnv(BOX, ACTIONS["discrete"])] * 2))
    episode = play(model, SpacesEnv(BOX, ACTIONS["discrete"]))
    for start, steps in ((11, 1), (-1, 1), (0, 0)):
        with pytest.raises(ValueError, match=r"start must be a step of the episode \(0 to 10\)"):
            imagine(model, episode, start, steps)
    # matplotlib is imported when something is drawn, not before
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    importlib.reload(introspection)
    importlib.reload(plotting)
    with pytest.raises(ImportError, match=r"drawing needs matplotlib: pip install 'sb3-ezv2\[plots\]'"):
        plotting.plot_search(model, OBSERVATION)


# ---------------------------------------------------------------------- the benchmarks


def test_the_commands_of_the_documentation(tmp_path: Path) -> None:
    agents = tmp_path / "agents"
    tiny = ["learning_starts:30", "batch_size:4", "n_simulations:3", "n_sampled_actions:2"]
    more = ["policy_kwargs:dict(net_arch=[16], state_dim=8, n_blocks=1)"]
    line = ["--env", "CartPole-v1", "--steps", "40", "--eval-every", "40", "--episodes", "2", "--threads", "1"]
    assert learn.main([*line, "--save-agent", "--out", str(agents), "--params", *tiny, *more]) == 0
    name = "CartPole-v1_ezv2_seed0"
    out = tmp_path / "head.csv"
    assert (
        policy_head.main([str(agents / f"{name}.zip"), "--out", str(out), "--simulations", "0", "3", "--episodes", "2"]) == 0
    )
    with open(out, newline="") as file:
        rows = list(csv.DictReader(file))
    with open(agents / f"{name}.csv", newline="") as file:
        trained = list(csv.DictReader(file))[-1]
    assert [row["n_simulations"] for row in rows] == ["0", "3"] and rows[0]["steps"] == "40"
    # the agent's own number of simulations, from the same starts, gives what its training measured
    assert float(rows[1]["mean"]) == float(trained["mean"]) and rows[1]["std"] == trained["std"]
    # the head alone: played here once more
    model = EZV2.load(agents / f"{name}.zip", device="cpu")
    returns = []
    for seed in (10_000, 10_001):
        env = gym.make("CartPole-v1")
        obs, _ = env.reset(seed=seed)
        total, over = 0.0, False
        while not over:
            action, _ = model.predict(obs, deterministic=True, n_simulations=0)
            obs, reward, terminated, truncated, _ = env.step(int(action))
            total, over = total + float(reward), terminated or truncated
        returns.append(total)
    assert float(rows[0]["mean"]) == np.mean(returns)

    assert pictures.main([f"CartPole-v1={agents / name}.zip", "--out", str(tmp_path / "images")]) == 0
    assert sorted(path.name for path in (tmp_path / "images").iterdir()) == [
        "cartpole_episode.png",
        "cartpole_rollout.png",
        "cartpole_search.png",
    ]
    with pytest.raises(SystemExit):
        pictures.main([f"CartPole-v1={tmp_path}", "--out", str(tmp_path)])
    with pytest.raises(SystemExit):
        policy_head.main([str(tmp_path / "none.zip"), "--out", str(out)])
