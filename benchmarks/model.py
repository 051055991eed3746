"""
Is the model right? Looks at an agent that ``benchmarks.learn`` saved (``--save-every``, ``--time-limit``), and at its replay::

    python -m benchmarks.model walker-walk/checkpoints --env dm_control/walker-walk-v0 --action-repeat 2

First, on stored sequences, after each unrolled step: how far predicted rewards are off, and how far with the last action
of another sequence; whether the value of an imagined state is that of the observed one, and how much of the observation is in
the imagined state (R², mean over its numbers; a linear regression on one half of the sequences, read on the other), beside a
linear regression on the first observation and the actions alone. The same again on episodes that the agent plays now, with
its noise: what is worse there was learned by heart.

Then, at states of the agent's own episodes, what a search needs: candidate actions ranked by the model (reward and value of
the next state) and by the simulator, which makes each of them and goes on with the policy head. The simulator returns to a
state by repeating the episode's actions (:class:`sb3_ezv2.wrappers.Resumable`).

The model is the one that predicts: the averaged weights. Observations are vectors, actions ``Discrete`` or ``Box``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.vec_env import DummyVecEnv

from benchmarks.envs import make_vec_env
from benchmarks.provenance import commit, machine
from sb3_ezv2 import EZV2, MlpPolicy
from sb3_ezv2.replay_buffer import SequenceReplayBuffer

BETWEEN = 15
"""Steps of an episode from one state that is looked at to the next."""


def explained(inputs: th.Tensor, outputs: th.Tensor) -> float:
    """
    :param inputs: [N, F]
    :param outputs: [N, O]
    :return: R² on the second half of a linear regression on the first, mean over the outputs that vary
    """
    inputs = th.cat([inputs, th.ones(len(inputs), 1)], dim=1).double()
    outputs, half = outputs.double(), len(inputs) // 2
    ridge = 1e-3 * half * th.eye(inputs.shape[1], dtype=th.float64)
    weights = th.linalg.solve(inputs[:half].T @ inputs[:half] + ridge, inputs[:half].T @ outputs[:half])
    error = (inputs[half:] @ weights - outputs[half:]).square().mean(0)
    variance = outputs[half:].var(0)
    return float((1 - error / variance)[variance > 1e-8].mean())


def rank_correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's, NaN where one is constant. :param x: [K] :param y: [K]"""
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return np.nan
    return float(np.corrcoef(x.argsort().argsort(), y.argsort().argsort())[0, 1])


def play(model: EZV2, env_id: str, repeat: int, steps: int, seed: int) -> SequenceReplayBuffer:
    """:param steps: about so many, of four episodes at once :return: what the agent meets when it acts with noise"""
    env = make_vec_env(env_id, 4, repeat)
    env.seed(seed)
    unroll, spaces_of_env = model.unroll_steps, (model.observation_space, model.action_space)
    buffer = SequenceReplayBuffer(4 * steps, *spaces_of_env, device="cpu", n_envs=4, unroll_steps=unroll, td_steps=unroll)
    obs = env.reset()
    th.manual_seed(seed)
    for _ in range(steps // 4):
        assert isinstance(obs, np.ndarray)
        actions, _ = model.predict(obs)
        following, rewards, over, infos = env.step(actions)
        assert isinstance(following, np.ndarray)
        last = [info.get("terminal_observation", seen) for info, seen in zip(infos, following)]
        buffer.add(obs, np.stack(last), model.policy.from_env_actions(actions), rewards, over, infos)
        obs = following
    return buffer


def on_sequences(model: EZV2, buffer: SequenceReplayBuffer, what: str, size: int, rng: np.random.Generator) -> None:
    """Print how the unrolled model compares with what was met. :param what: their name :param size: sequences"""
    network = model.policy.averaged_network
    starts = np.union1d(np.flatnonzero(buffer.weights > 0), buffer.take_fresh())
    batch = buffer.sequences(rng.choice(starts, min(size, len(starts)), replace=False), env=model._vec_normalize_env)
    whole = batch.observed.all(1)
    observations, actions = batch.observations[whole].float(), batch.actions[whole]
    scale = observations[:, 0].std(0) + 1e-6
    one_hot = actions if actions.is_floating_point() else network.one_hot[actions]
    print(f"{int(whole.sum())} {what}; standard deviation of the rewards {batch.rewards[whole].std():.3f}")
    print(
        "step: mean |reward error|, with another's action; correlation of V(imagined) and V(observed); "
        "R2 of the observation: of the model, linear"
    )
    with th.no_grad():
        state = network.represent(observations[:, 0])
        for step in range(actions.shape[1]):
            others = network.dynamics_step(state, actions[:, step].roll(1, 0))
            state = network.dynamics_step(state, actions[:, step])
            reward, of_others = (
                network.reward_support.decode(network.reward_logits(x.unsqueeze(0)))[0] for x in (state, others)
            )
            imagined = network.value_support.decode(network.value_head(state))
            observed = network.values(observations[:, step + 1])
            following = observations[:, step + 1] / scale
            known = th.cat([observations[:, 0] / scale, one_hot[:, : step + 1].flatten(1)], dim=1)
            error, with_others = ((x - batch.rewards[whole, step]).abs().mean() for x in (reward, of_others))
            agreement = np.corrcoef(imagined, observed)[0, 1]
            held, linear = explained(state, following), explained(known, following)
            print(f"  {step + 1}: {error:.4f} {with_others:.4f}; {agreement:.3f}; {held:.3f} {linear:.3f}")


def candidates(model: EZV2, policy: th.Tensor, count: int, rng: np.random.Generator) -> th.Tensor:
    """
    :param policy: [1, outputs] of the policy head
    :return: all actions, int64 [K], or for ``Box`` [count, A] drawn as a search does, the first of them the policy's mode
    """
    network = model.policy.averaged_network
    if isinstance(model.action_space, spaces.Discrete):
        return th.arange(int(model.action_space.n))
    drawn, _ = model.policy.search.sample_candidates(policy, rng)
    drawn = drawn[0, :count].clone()
    drawn[0] = network.mode(policy)[0]
    return drawn


def simulate(model: EZV2, copies: DummyVecEnv, actions: th.Tensor, horizon: int) -> tuple[np.ndarray, np.ndarray]:
    """
    :param copies: K environments in the same state
    :param actions: the first action of each, [K] or [K, A]; the policy head chooses the others
    :return: rewards [horizon, K], 0 after an episode's end; the network's values of the first next states [K], 0 if terminal
    """
    network, rewards, running = model.policy.averaged_network, np.zeros((horizon, len(actions))), np.ones(len(actions), bool)
    for step in range(horizon):
        obs, reward, over, infos = copies.step(_to_env(model, actions))
        rewards[step] = np.where(running, reward, 0.0)
        running &= ~over
        with th.no_grad():
            state = network.represent(th.as_tensor(obs))
            if step == 0:
                terminal = np.array([end and not info.get("TimeLimit.truncated", False) for end, info in zip(over, infos)])
                values = np.where(terminal, 0.0, network.value_support.decode(network.value_head(state)).numpy())
            actions = network.mode(network.policy_head(state))
    return rewards, values


def at_own_states(model: EZV2, env_id: str, repeat: int, states: int, horizon: int, rng: np.random.Generator) -> None:
    """Print how the model ranks candidate actions, and how the simulator does. :param horizon: steps that it makes"""
    network, gamma = model.policy.averaged_network, model.gamma
    env = make_vec_env(env_id, 1, repeat)
    env.seed(int(rng.integers(2**31)))
    obs, step, copies = env.reset(), 0, None
    rows: list[dict[str, float]] = []
    while len(rows) < states:
        assert isinstance(obs, np.ndarray)
        step += 1
        if step % BETWEEN == 0:
            with th.no_grad():
                state, value, policy = network.initial_inference(th.as_tensor(obs))
                actions = candidates(model, policy, model.n_sampled_actions, rng)
                _, reward, next_value, _ = network.recurrent_inference(state.repeat(len(actions), 1), actions)
            copies = copies or make_vec_env(env_id, len(actions), repeat)
            snapshot = env.envs[0].snapshot()  # type: ignore[attr-defined]
            if not all(copy.restore(snapshot) for copy in copies.envs):  # type: ignore[attr-defined]
                raise ValueError(f"{env_id} does not repeat itself.")
            rewards, true_value = simulate(model, copies, actions, horizon)
            returns = (gamma ** np.arange(horizon)[:, None] * rewards).sum(0)
            predicted, imagined = reward.numpy(), next_value.numpy()
            by_model, by_values = predicted + gamma * imagined, rewards[0] + gamma * true_value
            rows.append(
                {
                    "value of the state": float(value[0]),
                    "deviation of rewards, simulator": rewards[0].std(),
                    "deviation of rewards, model": predicted.std(),
                    "deviation of V(next), observed": true_value.std(),
                    "deviation of V(next), imagined": imagined.std(),
                    "deviation of returns": returns.std(),
                    "rank correlation of rewards": rank_correlation(predicted, rewards[0]),
                    "rank correlation of V(next), imagined and observed": rank_correlation(imagined, true_value),
                    "rank correlation of r + V(next), imagined, and returns": rank_correlation(by_model, returns),
                    "rank correlation of r + V(next), observed, and returns": rank_correlation(by_values, returns),
                    "return of the best candidate, above the mean": returns.max() - returns.mean(),
                    "return of the model's choice, above the mean": returns[by_model.argmax()] - returns.mean(),
                }
            )
        action, _ = model.predict(obs, deterministic=True)
        obs, _, _, _ = env.step(action)
    print(f"{len(rows)} states of its episodes, {horizon} steps of the simulator for each candidate (means):")
    for name in rows[0]:
        values = np.array([row[name] for row in rows])
        print(f"  {name}: {np.nanmean(values):.3f}" if np.isfinite(values).any() else f"  {name}: -")


def _to_env(model: EZV2, actions: th.Tensor) -> np.ndarray:
    """:param actions: as the model takes them :return: as the environment does"""
    if isinstance(model.action_space, spaces.Box):
        unscaled = model.policy.unscale_action(actions.numpy().reshape(-1, *model.action_space.shape))
        return unscaled.astype(model.action_space.dtype)
    return model.policy.to_env_actions(actions).numpy()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", type=Path, help="folder with a run's checkpoints, or one of these")
    parser.add_argument("--env", required=True)
    parser.add_argument("--action-repeat", type=int, default=1)
    parser.add_argument("--sequences", type=int, default=2048)
    parser.add_argument("--states", type=int, default=16)
    parser.add_argument("--horizon", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    th.set_num_threads(1)
    found = sorted(options.checkpoints.glob("**/agent.zip"), key=lambda path: path.stat().st_mtime)
    if not found:
        parser.error(f"there is no agent.zip in {options.checkpoints} or its folders.")
    folder = found[-1].parent
    model = EZV2.load(folder / "agent.zip", device="cpu")
    vectors = isinstance(model.observation_space, spaces.Box) and isinstance(model.policy, MlpPolicy)
    if not (vectors and isinstance(model.action_space, (spaces.Discrete, spaces.Box))):
        parser.error("only agents with vectors as observations and Discrete or Box actions can be looked at.")
    model.load_replay_buffer(folder / "replay_buffer.pkl")
    rng = np.random.default_rng(options.seed)
    print(f"{options.env}, {model.num_timesteps} steps, {model._n_updates} updates; {machine()}; {commit()}")
    assert model.replay_buffer is not None
    on_sequences(model, model.replay_buffer, "stored sequences", options.sequences, rng)
    played = play(model, options.env, options.action_repeat, options.sequences, int(rng.integers(2**31)))
    on_sequences(model, played, "sequences of new episodes", options.sequences, rng)
    at_own_states(model, options.env, options.action_repeat, options.states, options.horizon, rng)


if __name__ == "__main__":
    main()
