"""
The example pictures of the documentation, each task's from a trained agent::

    python -m benchmarks.pictures CartPole-v1=runs/agents/CartPole-v1_ezv2_seed0.zip --out docs/images

Agents are trained with ``python -m benchmarks.learn --save-agent``, see docs/guide/plotting.rst. What is drawn for a task is
in :data:`PICTURES`.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch as th

from benchmarks.envs import make_vec_env
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


def draw(task: str, agent: Path, out: Path, seed: int) -> None:
    """
    :param task: a key of :data:`PICTURES`
    :param agent: file of an agent
    :param out: folder of the pictures
    :param seed: of the episode that is looked at
    """
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
        result = f"return {episode.rewards.sum():.1f} in {len(episode.rewards)} steps"
        print(f"{path}  ({task} after {model.num_timesteps} steps, episode {seed}: {result})")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pictures", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("agents", nargs="+", metavar="TASK=FILE", help=f"trained agents of {', '.join(PICTURES)}")
    parser.add_argument("--out", type=Path, required=True, help="folder of the pictures")
    parser.add_argument("--seed", type=int, default=10_000, help="of the episodes that are looked at (default: %(default)s)")
    options = parser.parse_args(arguments)
    pairs = [agent.partition("=")[::2] for agent in options.agents]
    for task, file in pairs:
        if task not in PICTURES or not Path(file).is_file():
            parser.error(f"'{task}={file}' is not TASK=FILE with one of the tasks {', '.join(PICTURES)} and an agent's file.")
    th.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    for task, file in pairs:
        draw(task, Path(file), options.out, options.seed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
