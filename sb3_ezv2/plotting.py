"""
Pictures of what an agent thinks, as matplotlib figures: :func:`plot_search`, :func:`plot_rollout`, :func:`plot_episode`.

The numbers behind them are in :mod:`sb3_ezv2.introspection`. A figure is not shown: save it with ``figure.savefig(path)``, or
let a notebook display it. matplotlib is needed (the extra ``plots``) and is imported only when something is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.preprocessing import is_image_space

from sb3_ezv2.base_policy import Ezv2Policy
from sb3_ezv2.distributions import SquashedGaussian
from sb3_ezv2.introspection import Episode, SearchTree, episode_errors, imagine, policy_of, search_tree

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

REAL, MODEL, SEARCH, CHOSEN = "black", "tab:blue", "tab:green", "tab:orange"
MOST_BARS = 24
"""Of more discrete actions only the most visited are drawn."""
LONGEST_NAME = 4
"""MultiDiscrete actions of more dimensions are numbered instead of written out."""


def plot_search(
    agent: Any,
    observation: np.ndarray | dict[str, np.ndarray],
    n_simulations: int | None = None,
    max_depth: int = 4,
    action_names: Sequence[str] | None = None,
    rng: np.random.Generator | None = None,
) -> Figure:
    """
    The search of one observation. Above, the actions at the root: bars of policy and visits, points of Q; for Box actions with
    one or two dimensions the candidates where they lie. Below, the tree: a node's number is its visits, its colour the Q of
    the action that leads to it; the recommended action and its most visited continuation are orange. MultiDiscrete and
    MultiBinary actions are written out (``2,0,1``) where they have at most :data:`LONGEST_NAME` dimensions.

    :param agent: an EZV2 agent or its policy
    :param observation: one, as :meth:`~sb3_ezv2.base_policy.Ezv2Policy.predict` takes it
    :param n_simulations: of the search; None: as many as in training
    :param max_depth: of the tree that is drawn, at least 1; what lies deeper is counted below the nodes
    :param action_names: of ``Discrete`` actions, instead of their numbers
    :param rng: of the search's noise; None: the search of deterministic prediction
    :return: the figure
    :raises ValueError: ``max_depth`` is not positive, there are not as many names as actions, or several observations
    :raises ImportError: matplotlib is missing
    """
    if max_depth < 1:
        raise ValueError(f"max_depth must be at least 1, not {max_depth}.")
    policy = policy_of(agent)
    tree = search_tree(policy, observation, n_simulations, rng)
    names = _action_names(policy, tree, action_names)
    figure = _figure(8.0, 7.2)
    top, bottom = figure.subfigures(2, 1, height_ratios=[1.0, 1.5])
    dimensions = tree.candidates.shape[1] if tree.candidates is not None and isinstance(policy.action_space, spaces.Box) else 0
    if dimensions == 1:
        _draw_line(top, policy, observation, tree)
    elif dimensions == 2:
        _draw_plane(top, policy, tree)
    else:
        _draw_bars(top, tree, names)
    top.suptitle(
        f"{tree.visits.sum()} simulations: value {tree.network_value:.4g} (network), {tree.value:.4g} (search)", fontsize=10
    )
    _draw_tree(bottom, tree, max_depth, names)
    return figure


def plot_rollout(agent: Any, episode: Episode, start: int = 0, steps: int = 20) -> Figure:
    """
    The model unrolled from one observation along the actions that were taken, beside what happened: rewards, the network's
    values, and the similarity of imagined and real latent states; above these the real frames, where observations are images.
    The model has no decoder, so that imagined frames cannot be shown.

    :param agent: an EZV2 agent or its policy; of an agent the length of the unrolls in training is marked
    :param episode: of :func:`sb3_ezv2.introspection.play`
    :param start: step of the episode where the imagination begins
    :param steps: how far it goes, at most to the end of the episode
    :return: the figure
    :raises ValueError: ``start`` is no step of the episode, or ``steps`` is not positive
    :raises ImportError: matplotlib is missing
    """
    rollout = imagine(agent, episode, start, steps)
    horizon = len(rollout.rewards)
    frames = _frames(policy_of(agent), episode, start, horizon)
    figure = _figure(8.0, 6.4 + (1.3 if frames is not None else 0.0))
    plots = figure
    if frames is not None:
        strip, plots = figure.subfigures(2, 1, height_ratios=[1.3, 6.4])
        _draw_frames(strip, frames)
    reward_axis, value_axis, similarity_axis = plots.subplots(3, 1, sharex=True)
    after, at = np.arange(1, horizon + 1), np.arange(horizon + 1)
    reward_axis.plot(after, rollout.rewards, "o-", color=REAL, markersize=4, label="real")
    reward_axis.plot(after, rollout.imagined_rewards, "s--", color=MODEL, markersize=4, label="imagined")
    reward_axis.set_ylabel("reward of the step")
    value_axis.plot(at, rollout.values, "o-", color=REAL, markersize=4, label="of the real observation")
    value_axis.plot(at, rollout.imagined_values, "s--", color=MODEL, markersize=4, label="of the imagined state")
    value_axis.set_ylabel("network's value")
    similarity_axis.plot(at, rollout.similarity, "s-", color=MODEL, markersize=4, label="imagined and real state")
    similarity_axis.plot(
        at, rollout.projected_similarity, "^:", color=SEARCH, markersize=4, label="the same, projected (consistency loss)"
    )
    similarity_axis.plot(
        at, rollout.unchanged_similarity, "--", color="grey", label="first and real state (imagining no change)"
    )
    similarity_axis.set_ylabel("cosine similarity")
    similarity_axis.set_xlabel(f"steps after step {start} of the episode, along the actions that were taken")
    similarity_axis.xaxis.get_major_locator().set_params(integer=True)
    unroll = getattr(agent, "unroll_steps", None)
    for axis in (reward_axis, value_axis, similarity_axis):
        axis.grid(alpha=0.25)
        if unroll is not None and unroll < horizon:
            label = f"length of an unroll in training ({unroll})" if axis is reward_axis else None
            axis.axvline(unroll, color="tab:red", linewidth=1, linestyle=":", label=label)
        axis.legend(fontsize=8, framealpha=0.6)
    _widen(reward_axis, rollout.rewards, rollout.imagined_rewards)
    _widen(value_axis, rollout.values, rollout.imagined_values)
    return figure


def plot_episode(agent: Any, episode: Episode, n_simulations: int | None = None) -> Figure:
    """
    What the agent expected over an episode and what came: values of the network and of the search beside the measured
    discounted return, predicted beside real rewards, and the errors of both (expected minus measured).

    :param agent: an EZV2 agent or its policy
    :param episode: of :func:`sb3_ezv2.introspection.play`
    :param n_simulations: of the searches; None: as many as in training
    :return: the figure
    :raises ImportError: matplotlib is missing
    """
    errors = episode_errors(agent, episode, n_simulations)
    steps = np.arange(len(errors.rewards))
    figure = _figure(8.0, 7.6)
    value_axis, value_error_axis, reward_axis, reward_error_axis = figure.subplots(
        4, 1, sharex=True, height_ratios=[1.4, 1, 1.4, 1]
    )
    gamma = policy_of(agent).search_settings.gamma
    ending = "to the terminal state" if episode.terminated else "the network's value after the last step"
    value_axis.plot(steps, errors.returns, color=REAL, label=f"measured return, γ = {gamma:g}, {ending}")
    value_axis.plot(steps, errors.network_values, color=MODEL, linewidth=1, label="network's value")
    value_axis.plot(steps, errors.search_values, color=SEARCH, linewidth=1, label="search's value")
    value_axis.set_ylabel("value")
    for values, color, name in ((errors.network_values, MODEL, "network"), (errors.search_values, SEARCH, "search")):
        error = values - errors.returns
        label = f"{name}: mean {error.mean():+.3g}, mean size {np.abs(error).mean():.3g}"
        value_error_axis.plot(steps, error, color=color, linewidth=1, label=label)
    value_error_axis.set_ylabel("value − return")
    reward_axis.plot(steps, errors.rewards, color=REAL, label="real")
    reward_axis.plot(steps, errors.predicted_rewards, color=MODEL, linewidth=1, label="predicted one step ahead")
    reward_axis.set_ylabel("reward")
    error = errors.predicted_rewards - errors.rewards
    label = f"mean {error.mean():+.3g}, mean size {np.abs(error).mean():.3g}"
    reward_error_axis.plot(steps, error, color=MODEL, linewidth=1, label=label)
    reward_error_axis.set_ylabel("predicted − real")
    reward_error_axis.set_xlabel("step of the episode")
    for axis in (value_axis, value_error_axis, reward_axis, reward_error_axis):
        axis.grid(alpha=0.25)
        axis.legend(fontsize=8, framealpha=0.6)
    for axis in (value_error_axis, reward_error_axis):
        axis.axhline(0, color="grey", linewidth=0.8)
    _widen(reward_axis, errors.rewards, errors.predicted_rewards)
    return figure


def _figure(width: float, height: float) -> Any:
    """Without pyplot: nothing is registered globally, and no display is needed. :param width: in inches"""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("drawing needs matplotlib: pip install 'sb3-ezv2[plots]', or matplotlib itself.") from error
    return Figure(figsize=(width, height), dpi=100, layout="constrained")


def _widen(axis: Axes, *series: np.ndarray) -> None:
    """Rewards that are all alike shall not be drawn with their rounding errors as the scale."""
    low, high = min(x.min() for x in series), max(x.max() for x in series)
    least = 0.1 * max(abs(low), abs(high), 1e-3)
    if high - low < least:
        middle = (low + high) / 2
        axis.set_ylim(middle - least, middle + least)


def _action_names(policy: Ezv2Policy, tree: SearchTree, given: Sequence[str] | None) -> list[str]:
    """Of the root's actions; of Box actions the candidates are numbered."""
    count = len(tree.visits)
    if isinstance(policy.action_space, spaces.Discrete):
        names = [str(int(policy.action_space.start) + i) for i in range(count)] if given is None else list(given)
        if len(names) != count:
            raise ValueError(f"there are {count} actions, but {len(names)} names were given.")
        return names
    if given is not None:
        raise ValueError("action_names are for Discrete actions: leave them out.")
    if tree.candidates is not None and _written_out(tree.candidates):
        return [_categories(action) for action in tree.candidates]
    return [f"#{i}" for i in range(count)]


def _written_out(actions: np.ndarray) -> bool:
    """:param actions: [n, D] of MultiDiscrete or [n, A] of Box actions :return: whether their categories are their names"""
    return np.issubdtype(actions.dtype, np.integer) and actions.shape[1] <= LONGEST_NAME


def _categories(action: np.ndarray) -> str:
    return ",".join(map(str, action))


def _draw_bars(figure: Any, tree: SearchTree, names: list[str]) -> None:
    shown = np.sort(np.lexsort((-tree.policy, -tree.visits))[:MOST_BARS])
    x = np.arange(len(shown))
    policy_axis, visit_axis, q_axis = figure.subplots(1, 3)
    policy_axis.bar(x - 0.2, tree.prior[shown], 0.4, color="lightgrey", edgecolor="grey", label="network")
    policy_axis.bar(x + 0.2, tree.policy[shown], 0.4, color=MODEL, label="improved by the search")
    policy_axis.set_title("policy", fontsize=9)
    policy_axis.legend(fontsize=7)
    policy_axis.set_ylim(0, 1.28 * max(tree.prior.max(), tree.policy.max()))
    colors = [CHOSEN if action == tree.action else MODEL for action in shown]
    visit_axis.bar(x, tree.visits[shown], color=colors)
    visit_axis.set_title("visits", fontsize=9)
    visited = tree.visits[shown] > 0
    q_axis.scatter(x[visited], tree.q[shown][visited], color=[c for c, v in zip(colors, visited) if v], zorder=3)
    q_axis.axhline(tree.network_value, color="grey", linewidth=1, linestyle="--", label="network's value")
    q_axis.axhline(tree.value, color=SEARCH, linewidth=1, label="search's value")
    q_axis.set_title("Q of the visited actions", fontsize=9)
    q_axis.legend(fontsize=7)
    q_axis.margins(x=0.15, y=0.25)
    upright = len(shown) > 3 and max(map(len, names)) > 3  # names that would run into each other
    for axis in (policy_axis, visit_axis, q_axis):
        axis.set_xticks(x, [names[action] for action in shown], fontsize=8 if len(shown) < 10 else 6)
        axis.tick_params(axis="x", labelrotation=90 if upright else 0)
        axis.set_xlabel("action (recommended: orange)" if axis is not policy_axis else "action", fontsize=8)
        axis.tick_params(axis="y", labelsize=8)
        axis.grid(alpha=0.25, axis="y")


def _draw_line(figure: Any, policy: Ezv2Policy, observation: Any, tree: SearchTree) -> None:
    """Candidates of one dimension."""
    assert tree.candidates is not None and isinstance(policy.action_space, spaces.Box)
    actions = tree.candidates[:, 0]
    q_axis, policy_axis = figure.subplots(1, 2)
    visited = tree.visits > 0
    points = q_axis.scatter(
        actions[visited], tree.q[visited], s=_sizes(tree.visits[visited]), c=tree.policy[visited], cmap="viridis", zorder=3
    )
    bar = figure.colorbar(points, ax=q_axis)
    bar.set_label("improved policy", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    if visited[tree.action]:
        size = _sizes(tree.visits)[tree.action]
        chosen = actions[tree.action], tree.q[tree.action]
        q_axis.scatter(*chosen, s=size + 60, facecolors="none", edgecolors=CHOSEN, linewidths=2, zorder=4, label="recommended")
    q_axis.axhline(tree.network_value, color="grey", linewidth=1, linestyle="--", label="network's value")
    q_axis.set_title("Q of the candidates (area: visits)", fontsize=9)
    q_axis.set_ylabel("Q", fontsize=8)
    q_axis.margins(y=0.2)
    q_axis.legend(fontsize=7, markerscale=0.5)
    low, high = float(policy.action_space.low.reshape(-1)[0]), float(policy.action_space.high.reshape(-1)[0])
    grid = np.linspace(-0.995, 0.995, 400, dtype=np.float32)
    obs, _ = policy.obs_to_tensor(observation)
    with th.no_grad():
        gaussian = SquashedGaussian(policy.averaged_network.initial_inference(obs)[2])
        density = gaussian.log_prob(th.from_numpy(grid)[:, None].to(gaussian.mean.device)).exp().cpu().numpy()
    density *= 2 / (high - low) if high > low else 1.0  # per unit of the environment's actions
    markers, _, _ = policy_axis.stem(actions, tree.policy, linefmt="C0-", markerfmt="C0o", basefmt="none")
    markers.set_markersize(4)
    markers.set_label("candidates, improved (left)")
    policy_axis.set_ylabel("improved policy", fontsize=8)
    policy_axis.set_ylim(0, 1.35 * tree.policy.max())
    density_axis = policy_axis.twinx()
    density_axis.fill_between(low + 0.5 * (grid + 1) * (high - low), density, color="grey", alpha=0.3, label="network (right)")
    density_axis.set_ylim(0, 1.35 * density.max())
    density_axis.set_ylabel("density", fontsize=8)
    density_axis.tick_params(labelsize=8)
    handles = [markers, *density_axis.collections]
    policy_axis.legend(handles=handles, fontsize=7, loc="upper center", ncols=2)
    policy_axis.set_title("policy", fontsize=9)
    for axis in (q_axis, policy_axis):
        axis.set_xlim(low - 0.04 * (high - low), high + 0.04 * (high - low))
        axis.set_xlabel("action", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25)


def _draw_plane(figure: Any, policy: Ezv2Policy, tree: SearchTree) -> None:
    """Candidates of two dimensions."""
    assert tree.candidates is not None and isinstance(policy.action_space, spaces.Box)
    low, high = policy.action_space.low.reshape(-1), policy.action_space.high.reshape(-1)
    visited = tree.visits > 0
    axes = figure.subplots(1, 2)
    x, y = tree.candidates[:, 0], tree.candidates[:, 1]
    for axis, color, shown, name in (
        (axes[0], tree.q, visited, "Q"),
        (axes[1], tree.policy, np.ones_like(visited), "improved policy"),
    ):
        points = axis.scatter(
            x[shown], y[shown], s=_sizes(tree.visits[shown]), c=color[shown], cmap="viridis", edgecolors="grey", zorder=3
        )
        figure.colorbar(points, ax=axis).ax.tick_params(labelsize=8)
        axis.scatter(
            x[tree.action],
            y[tree.action],
            s=_sizes(tree.visits)[tree.action] + 60,
            facecolors="none",
            edgecolors=CHOSEN,
            linewidths=2,
            zorder=4,
            label="recommended",
        )
        axis.set_title(f"{name} of the candidates (area: visits)", fontsize=9)
        margin = 0.06 * (high - low)
        axis.set(xlim=(low[0] - margin[0], high[0] + margin[0]), ylim=(low[1] - margin[1], high[1] + margin[1]))
        axis.set_xlabel("action, dimension 0", fontsize=8)
        axis.set_ylabel("action, dimension 1", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25)
        axis.legend(fontsize=7, markerscale=0.5)


def _sizes(visits: np.ndarray) -> np.ndarray:
    """Areas of markers."""
    return 18.0 + 30.0 * visits


def tree_layout(nodes: dict[str, np.ndarray], order: np.ndarray, max_depth: int) -> tuple[np.ndarray, np.ndarray]:
    """
    Where to draw the nodes of a tree: leaves side by side, parents above the middle of their children.

    :param nodes: of a :class:`~sb3_ezv2.introspection.SearchTree`
    :param order: [N], children are drawn by this from left to right
    :param max_depth: deeper nodes are left out
    :return: float [N], from left to right, NaN for nodes that are left out; int [N], depths
    """
    parent = nodes["parent"]
    depth = np.zeros(len(parent), int)
    for node in range(1, len(parent)):
        depth[node] = depth[parent[node]] + 1
    x = np.full(len(parent), np.nan)
    leaves = 0

    def place(node: int) -> None:
        nonlocal leaves
        children = np.flatnonzero(parent == node) if depth[node] < max_depth else np.array([], int)
        for child in children[np.argsort(order[children], kind="stable")]:
            place(int(child))
        if len(children) == 0:
            x[node] = leaves
            leaves += 1
        else:
            x[node] = (x[children].min() + x[children].max()) / 2

    place(0)
    return x, depth


def _draw_tree(figure: Any, tree: SearchTree, max_depth: int, names: list[str]) -> None:
    import matplotlib

    nodes, actions = tree.nodes, tree.node_actions
    parent, visits, q = nodes["parent"], nodes["visits"], nodes["q"]
    named = actions is None or actions.shape[1] == 1 or _written_out(actions)
    order = actions[:, 0] if actions is not None and actions.shape[1] == 1 else nodes["action"]
    x, depth = tree_layout(nodes, order, max_depth)
    shown = np.flatnonzero(np.isfinite(x))
    best = _best_path(tree)
    axis = figure.subplots()
    axis.set_axis_off()
    bottom = int(depth[shown].max())
    # With few nodes side by side there is room for larger ones
    width = max(x[shown].max() - x[shown].min(), 1.0)
    room = min(420.0, (8.0 * 72 * 0.8 / (width + 1)) ** 2)
    for node in shown[1:]:
        color, line = (CHOSEN, 2.0) if node in best else ("grey", 0.6 + 1.4 * visits[node] / max(1, visits[0]))
        axis.plot([x[parent[node]], x[node]], [-depth[parent[node]], -depth[node]], color=color, linewidth=line, zorder=1)
    inner = shown[1:]
    norm = matplotlib.colors.Normalize(*_bounds(q[inner]))
    # A node's area grows with its visits; labels of one or two digits fit into the smallest
    area = room * (0.45 + 0.55 * np.sqrt(visits / max(1, visits[0])))
    points = axis.scatter(
        x[inner],
        -depth[inner],
        s=area[inner],
        c=q[inner],
        cmap="viridis",
        norm=norm,
        zorder=2,
        edgecolors=[CHOSEN if node in best else "white" for node in inner],
        linewidths=[2.0 if node in best else 0.5 for node in inner],
    )
    axis.scatter(x[:1], -depth[:1], s=max(area[0], 260.0), color="white", edgecolors="black", zorder=2)
    size = float(np.clip(np.sqrt(room) * 0.45, 5.0, 9.0))
    axis.text(x[0], 0, str(visits[0]), ha="center", va="center", fontsize=9, zorder=3)
    for node in inner:
        dark = norm(q[node]) < 0.6
        axis.text(
            x[node],
            -depth[node],
            str(visits[node]),
            ha="center",
            va="center",
            fontsize=size,
            color="white" if dark else "black",
            zorder=3,
        )
        axis.annotate(
            _edge_label(tree, node, names),
            (x[node], -depth[node]),
            xytext=(0, np.sqrt(area[node]) / 2 + 2),
            textcoords="offset points",
            ha="center",
            va="bottom",
            fontsize=size,
            color="dimgrey",
            zorder=3,
            bbox=dict(facecolor="white", edgecolor="none", pad=0.3, alpha=0.8),
        )
        if depth[node] == max_depth and visits[node] > 1:
            axis.annotate(
                f"+{visits[node] - 1}",
                (x[node], -depth[node]),
                xytext=(0, -np.sqrt(area[node]) / 2 - 2),
                textcoords="offset points",
                ha="center",
                va="top",
                fontsize=size,
                color="dimgrey",
            )
    axis.set_ylim(-bottom - 0.35, 0.35)
    axis.set_xlim(x[shown].min() - 0.6, x[shown].max() + 0.6)
    hidden = len(parent) - len(shown)
    label = "above it the action" if named else "above it the action's number among the candidates"
    title = f"the tree: in a node its visits, {label};\norange: the recommended action, then the most visited ones"
    if hidden:
        title += f"; {hidden} nodes below depth {max_depth} are not drawn (+n)"
    figure.suptitle(title, fontsize=9)
    bar = figure.colorbar(points, ax=axis, shrink=0.8, pad=0.01)
    bar.set_label("Q of the action (reward + γ value)", fontsize=8)
    bar.ax.tick_params(labelsize=8)


def _edge_label(tree: SearchTree, node: int, names: list[str]) -> str:
    action = int(tree.nodes["action"][node])
    if tree.node_actions is None:
        return names[action]
    if _written_out(tree.node_actions):
        return _categories(tree.node_actions[node])
    if tree.node_actions.shape[1] == 1:
        digits = 1 if np.abs(tree.node_actions).max() >= 1 else 2
        return f"{tree.node_actions[node, 0]:.{digits}f}"
    return f"#{action}"


def _best_path(tree: SearchTree) -> set[int]:
    """The recommended root action's node, then the most visited children."""
    parent, visits = tree.nodes["parent"], tree.nodes["visits"]
    children = np.flatnonzero((parent == 0) & (tree.nodes["action"] == tree.action))
    path = set()
    while len(children):
        node = int(children[np.argmax(visits[children])])
        path.add(node)
        children = np.flatnonzero(parent == node)
    return path


def _bounds(values: np.ndarray) -> tuple[float, float]:
    low, high = float(values.min()), float(values.max())
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _frames(policy: Ezv2Policy, episode: Episode, start: int, horizon: int) -> list[tuple[int, np.ndarray]] | None:
    """Of image observations eight steps at most and their frames [height, width, channels]; None: there are no images."""
    space, obs = policy.observation_space, episode.observations
    if isinstance(space, spaces.Dict):
        keys = [key for key, member in space.spaces.items() if is_image_space(member)]
        if not keys:
            return None
        obs = obs[keys[0]]
    elif not is_image_space(space):
        return None
    steps = np.unique(np.linspace(0, horizon, min(8, horizon + 1)).round().astype(int))
    images = obs[start + steps].cpu().numpy()
    # Of stacked frames the newest
    planes = 3 if images.shape[1] % 3 == 0 else 1
    return [(int(step), image[-planes:].transpose(1, 2, 0)) for step, image in zip(steps, images)]


def _draw_frames(figure: Any, frames: list[tuple[int, np.ndarray]]) -> None:
    axes = figure.subplots(1, len(frames), squeeze=False)[0]
    for axis, (step, frame) in zip(axes, frames):
        axis.imshow(frame.squeeze(-1) if frame.shape[-1] == 1 else frame, cmap="gray", vmin=0, vmax=255)
        axis.set_title("start" if step == 0 else f"+{step}", fontsize=9)
        axis.set_axis_off()
