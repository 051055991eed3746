"""
The example pictures of the documentation, from agents that ``benchmarks.learn --save-agent`` has trained::

    python -m benchmarks.pictures --agents runs/agents --out docs/images

The commands of the training are in docs/guide/plotting.rst. What is drawn for a task is in :data:`PICTURES`; tasks without an
agent are left out.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch as th

from benchmarks.envs import make_vec_env
from benchmarks.plots import read_rows
from sb3_ezv2 import EZV2
from sb3_ezv2.introspection import play
from sb3_ezv2.observations import apply
from sb3_ezv2.plotting import plot_episode, plot_rollout, plot_search

#: By task: name of the files, step of the episode to look at, names of the actions, and what is drawn
PICTURES: dict[str, tuple[str, int, list[str] | None, tuple[str, ...]]] = {
    "CartPole-v1": ("cartpole", 20, ["left", "right"], ("search", "rollout", "episode")),
    "Pendulum-v1": ("pendulum", 20, None, ("search", "rollout", "episode")),
    "PointMass2D-v0": ("pointmass", 4, None, ("search",)),
    "benchmarks.catch:CatchPixels-v0": ("catch", 7, ["left", "stay", "right"], ("search", "rollout")),
}


def draw(agent: Path, out: Path, seed: int) -> None:
    """
    :param agent: file of an agent
    :param out: folder of the pictures
    :param seed: of the episode that is looked at
    """
    task = read_rows([agent.with_suffix(".csv")])[-1]["task"]
    if task not in PICTURES:
        return
    name, step, action_names, kinds = PICTURES[task]
    model = EZV2.load(agent, device="cpu")
    episode = play(model, make_vec_env(task, 1), seed=seed)
    step = min(step, len(episode.rewards) - 1)
    observation = apply(lambda x: x[step].numpy(), episode.observations)
    for kind in kinds:
        if kind == "search":
            figure = plot_search(model, observation, action_names=action_names)
        elif kind == "rollout":
            figure = plot_rollout(model, episode, start=step)
        else:
            figure = plot_episode(model, episode)
        path = out / f"{name}_{kind}.png"
        figure.savefig(path)
        print(f"{path}  ({task}, seed {seed}, return {episode.rewards.sum():.1f} in {len(episode.rewards)} steps)")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pictures", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--agents", type=Path, required=True, help="folder of benchmarks.learn --save-agent")
    parser.add_argument("--out", type=Path, required=True, help="folder of the pictures")
    parser.add_argument("--seed", type=int, default=10_000, help="of the episodes that are looked at (default: %(default)s)")
    options = parser.parse_args(arguments)
    agents = [path for path in sorted(options.agents.glob("*.zip")) if path.with_suffix(".csv").exists()]
    if not agents:
        parser.error(f"there are no agents in {options.agents}: make some with benchmarks.learn --save-agent.")
    th.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    for agent in agents:
        draw(agent, options.out, options.seed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
