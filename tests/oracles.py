"""Reference searches that the tree of ``sb3_ezv2.ctree`` is compared with.

Three things live here, none of which imports the package:

- :class:`Problem`, a batch of random deterministic models given as tables, so that every search reads the very same
  float32 numbers and no difference can come from evaluating a network;
- :func:`plain_search`, Gumbel search in plain Python: explicit nodes, every return kept in a list, every mean and bound
  taken anew over all that was ever seen. It is slow and follows the text, nothing else;
- :func:`mctx_search`, DeepMind's ``mctx.gumbel_muzero_policy`` in float64, with the Q normalisation of this project.

Letters in shapes: B roots, S simulations, K root actions, M inner actions, T states of a model, C action codes.
"""

import dataclasses
import functools
import importlib
import itertools
import math
from typing import Any, NamedTuple

import numpy as np


class Settings(NamedTuple):
    """What a search is configured with besides its sizes (see the keyword arguments of ``Tree``)."""

    num_considered: int
    discount: float = 0.997
    c_visit: float = 50.0
    c_scale: float = 0.1
    min_q_range: float = 0.01


@dataclasses.dataclass
class Problem:
    """A batch of roots, each with a deterministic model of its own, given as tables. The root is in state 0.

    A node offers candidate actions; candidate ``i`` of a node stands for an action code, and codes index the model's
    tables. For discrete actions the code is the index; for sampled ones each node has its own codes, so that a search
    that confuses candidates (the ``edge`` of the tree) ends up in other states.

    :param root_value: float32 [B]
    :param root_logits: float32 [B, K]
    :param gumbel: float32 [B, K]
    :param next_state: int64 [B, T, C], the state after an action code in a state
    :param reward: float32 [B, T, C]
    :param value: float32 [B, T]
    :param logits: float32 [B, T, M], the prior logits of a node's candidates in a state
    :param root_codes: int64 [B, K], action code of each root candidate
    :param inner_codes: int64 [S, B, M], action code of each candidate of the node that simulation s creates
    """

    root_value: np.ndarray
    root_logits: np.ndarray
    gumbel: np.ndarray
    next_state: np.ndarray
    reward: np.ndarray
    value: np.ndarray
    logits: np.ndarray
    root_codes: np.ndarray
    inner_codes: np.ndarray

    @property
    def num_roots(self) -> int:
        return len(self.root_value)

    @property
    def num_simulations(self) -> int:
        return len(self.inner_codes)

    @property
    def num_root_actions(self) -> int:
        return self.root_logits.shape[1]

    @property
    def num_inner_actions(self) -> int:
        return self.logits.shape[2]

    def take(self, roots: Any) -> "Problem":
        """The problem of some of the roots alone. ``roots``: an index array or a slice."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        inner_codes = fields.pop("inner_codes")
        return Problem(**{name: array[roots] for name, array in fields.items()}, inner_codes=inner_codes[:, roots])

    def scaled(self, factor: float) -> "Problem":
        """The same problem with its rewards and values multiplied by ``factor``."""
        factor32 = np.float32(factor)
        return dataclasses.replace(
            self, root_value=self.root_value * factor32, value=self.value * factor32, reward=self.reward * factor32
        )


class Result(NamedTuple):
    """What a batch of searches found.

    :param parent: [B, S] slot of the node that simulation s extended (0 = root, s + 1 = made by simulation s)
    :param action: [B, S] the candidate of that node
    :param visits: [B, K]
    :param best_action: [B]
    :param policy: [B, K]
    :param root_value: [B]
    :param q_values: [B, K] completed, in raw units
    :param depth: [B] mean number of edges between the root and a simulation's new node
    :param margin: [B] the smallest lead that any choice of this search had over the next best option; where it is tiny,
        rounding decides and searches may rightly differ
    """

    parent: np.ndarray
    action: np.ndarray
    visits: np.ndarray
    best_action: np.ndarray
    policy: np.ndarray
    root_value: np.ndarray
    q_values: np.ndarray
    depth: np.ndarray
    margin: np.ndarray


def random_problem(
    rng: np.random.Generator,
    num_roots: int,
    num_simulations: int,
    num_root_actions: int,
    num_inner_actions: int | None = None,
    num_states: int = 40,
) -> Problem:
    """Draw models over many scales of value, offset, reward sparsity and sharpness of the prior.

    :param num_inner_actions: None for discrete actions (Gumbel noise, the same actions everywhere);
        a number for sampled candidates (no noise, equal priors, codes drawn for each node)
    """
    discrete = num_inner_actions is None
    inner = num_root_actions if num_inner_actions is None else num_inner_actions
    codes = num_root_actions if discrete else 4 * max(num_root_actions, inner)
    # Per root: the scale goes from far below to far above min_q_range, values have either sign.
    scale = rng.choice([1e-3, 0.02, 1.0, 30.0, 1000.0], size=(num_roots, 1))
    offset = scale * rng.uniform(-3.0, 3.0, size=(num_roots, 1))
    value = offset + scale * rng.normal(size=(num_roots, num_states))
    reward = 0.5 * scale[..., None] * rng.normal(size=(num_roots, num_states, codes))
    reward *= rng.random(size=reward.shape) < rng.choice([0.0, 0.3, 1.0], size=(num_roots, 1, 1))
    if discrete:
        sharpness = rng.choice([0.0, 0.5, 2.0, 8.0], size=(num_roots, 1))
        root_logits = sharpness * rng.normal(size=(num_roots, num_root_actions))
        logits = sharpness[..., None] * rng.normal(size=(num_roots, num_states, inner))
        gumbel = rng.gumbel(size=root_logits.shape)
        root_codes = np.tile(np.arange(num_root_actions), (num_roots, 1))
        inner_codes = np.tile(np.arange(inner), (num_simulations, num_roots, 1))
    else:
        root_logits = gumbel = np.zeros((num_roots, num_root_actions))
        logits = np.zeros((num_roots, num_states, inner))
        root_codes = rng.integers(codes, size=(num_roots, num_root_actions))
        inner_codes = rng.integers(codes, size=(num_simulations, num_roots, inner))
    return Problem(
        root_value=(offset[:, 0] + scale[:, 0] * rng.normal(size=num_roots)).astype(np.float32),
        root_logits=root_logits.astype(np.float32),
        gumbel=gumbel.astype(np.float32),
        next_state=rng.integers(num_states, size=(num_roots, num_states, codes)),
        reward=reward.astype(np.float32),
        value=value.astype(np.float32),
        logits=logits.astype(np.float32),
        root_codes=root_codes,
        inner_codes=inner_codes,
    )


# --------------------------------------------------------------------------------------------------------------------
# The plain search
# --------------------------------------------------------------------------------------------------------------------


class Node:
    """A node of the plain search.

    ``returns`` starts with the network's value of the node and collects every return backed up through it: its mean is
    the node's value, its length the node's visits.
    """

    def __init__(self, slot: int, state: int, reward: float, value: float, logits: list[float], codes: list[int]):
        self.slot = slot
        self.state = state
        self.reward = reward  # of the edge that leads here
        self.raw_value = value
        self.logits = logits
        self.codes = codes
        self.returns = [value]
        self.children: dict[int, Node] = {}

    def value(self) -> float:
        return math.fsum(self.returns) / len(self.returns)

    def visits(self, action: int) -> int:
        """How often an action was taken here: once to make the child, then once for each return through it."""
        return len(self.children[action].returns) if action in self.children else 0

    def history(self, action: int, discount: float) -> tuple[float, ...]:
        """All that the score of an action depends on, apart from its prior: actions alike in it tie exactly."""
        child = self.children.get(action)
        if child is None:
            return ()
        return (child.reward, *(child.returns if discount > 0.0 else [0.0] * len(child.returns)))


def softmax(logits: list[float]) -> list[float]:
    top = max(logits)
    weights = [math.exp(logit - top) for logit in logits]
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def sequential_halving(num_considered: int, num_simulations: int) -> list[int]:
    """The visit count that the root's next action must have, for each simulation (Karnin et al. 2013, Gumbel MuZero).

    Each phase gives every remaining action the same number of visits, then keeps the better half (at least two).
    """
    if num_considered == 1:
        return list(range(num_simulations))
    phases = math.ceil(math.log2(num_considered))
    schedule: list[int] = []
    remaining, visits = num_considered, 0
    while len(schedule) < num_simulations:
        for _ in range(max(1, num_simulations // (phases * remaining))):
            schedule += [visits] * remaining
            visits += 1
        remaining = max(2, remaining // 2)
    return schedule[:num_simulations]


class PlainSearch:
    """The search of one root, by the text: nothing is kept incrementally, nothing is shared with the package."""

    def __init__(self, problem: Problem, index: int, settings: Settings):
        one = problem.take(slice(index, index + 1))
        self.settings = settings
        self.num_simulations = one.num_simulations
        self.next_state = one.next_state[0]
        self.reward = one.reward[0].astype(np.float64)
        self.model_value = one.value[0].astype(np.float64)
        self.model_logits = one.logits[0].astype(np.float64)
        self.inner_codes = one.inner_codes[:, 0]
        self.gumbel = one.gumbel[0].astype(np.float64).tolist()
        root_logits = one.root_logits[0].astype(np.float64).tolist()
        self.root = Node(0, 0, 0.0, float(one.root_value[0]), root_logits, one.root_codes[0].tolist())
        self.seen_q: list[float] = []  # every q that has appeared in this tree
        self.parents: list[int] = []
        self.actions: list[int] = []
        self.depths: list[int] = []
        self.margin = math.inf

    def q(self, node: Node, action: int) -> float:
        child = node.children[action]
        return child.reward + self.settings.discount * child.value()

    def completed_q(self, node: Node) -> list[float]:
        """q of the visited actions; the unvisited ones get the mixed value of Gumbel MuZero (appendix D)."""
        prior = softmax(node.logits)
        visited = sorted(node.children)
        mixed = node.raw_value
        if visited:
            count = sum(node.visits(action) for action in visited)
            weighted = math.fsum(prior[a] * self.q(node, a) for a in visited) / math.fsum(prior[a] for a in visited)
            mixed = (node.raw_value + count * weighted) / (1 + count)
        return [self.q(node, a) if a in node.children else mixed for a in range(len(node.logits))]

    def sigma(self, node: Node) -> list[float]:
        if not self.seen_q:
            return [0.0] * len(node.logits)
        low, high = min(self.seen_q), max(self.seen_q)
        spread = max(high - low, self.settings.min_q_range)
        most = max(node.visits(action) for action in range(len(node.logits)))
        scale = (self.settings.c_visit + most) * self.settings.c_scale
        return [scale * (q - low) / spread for q in self.completed_q(node)]

    def improved_policy(self, node: Node) -> list[float]:
        return softmax([logit + sigma for logit, sigma in zip(node.logits, self.sigma(node), strict=True)])

    def choose(self, scores: dict[int, float], alike: dict[int, Any]) -> int:
        """Highest score, ties to the lowest index. The lead over the best action that is not ``alike`` is noted."""
        best = max(scores, key=lambda action: (scores[action], -action))
        for action, score in scores.items():
            if alike[action] != alike[best]:
                self.margin = min(self.margin, scores[best] - score)
        return best

    def choose_at_root(self, considered_visit: int) -> int:
        root, sigma, top = self.root, self.sigma(self.root), max(self.root.logits)
        allowed = [a for a in range(len(root.logits)) if root.visits(a) == considered_visit]
        scores = {a: max(-1e9, self.gumbel[a] + (root.logits[a] - top) + sigma[a]) for a in allowed}
        return self.choose(
            scores, {a: (self.gumbel[a], root.logits[a], root.history(a, self.settings.discount)) for a in allowed}
        )

    def choose_inside(self, node: Node) -> int:
        improved = self.improved_policy(node)
        total = sum(node.visits(action) for action in node.children)
        actions = range(len(node.logits))
        scores = {a: improved[a] - node.visits(a) / (1 + total) for a in actions}
        return self.choose(scores, {a: (node.logits[a], node.history(a, self.settings.discount)) for a in actions})

    def simulate(self, considered_visit: int) -> None:
        path = [self.root]
        action = self.choose_at_root(considered_visit)
        while action in path[-1].children:
            path.append(path[-1].children[action])
            action = self.choose_inside(path[-1])
        parent = path[-1]
        self.parents.append(parent.slot)
        self.actions.append(action)
        self.depths.append(len(path))

        code = parent.codes[action]
        state = int(self.next_state[parent.state, code])
        slot = len(self.parents)
        new = Node(
            slot,
            state,
            float(self.reward[parent.state, code]),
            float(self.model_value[state]),
            self.model_logits[state].tolist(),
            self.inner_codes[slot - 1].tolist(),
        )
        parent.children[action] = new
        path.append(new)

        backed_up = new.raw_value
        for above, below in zip(path[-2::-1], path[:0:-1], strict=True):
            backed_up = below.reward + self.settings.discount * backed_up
            above.returns.append(backed_up)
        for above, below in itertools.pairwise(path):
            self.seen_q += [self.q(above, a) for a, child in above.children.items() if child is below]

    def run(self) -> None:
        for considered_visit in sequential_halving(self.settings.num_considered, self.num_simulations):
            self.simulate(considered_visit)


def plain_search(problem: Problem, settings: Settings) -> Result:
    """Search every root of a problem on its own in plain Python."""
    rows = []
    for index in range(problem.num_roots):
        search = PlainSearch(problem, index, settings)
        search.run()
        visits = [search.root.visits(action) for action in range(problem.num_root_actions)]
        rows.append(
            Result(
                parent=np.array(search.parents),
                action=np.array(search.actions),
                visits=np.array(visits),
                best_action=np.array(search.choose_at_root(max(visits))),
                policy=np.array(search.improved_policy(search.root)),
                root_value=np.array(search.root.value()),
                q_values=np.array(search.completed_q(search.root)),
                depth=np.array(np.mean(search.depths)),
                margin=np.array(search.margin),
            )
        )
    return Result(*(np.stack(column) for column in zip(*rows, strict=True)))


# --------------------------------------------------------------------------------------------------------------------
# mctx
# --------------------------------------------------------------------------------------------------------------------


@functools.cache
def _compiled_mctx(num_considered: int, num_simulations: int) -> Any:
    """The jitted policy for one pair of static settings. jax and mctx are imported here, so that the rest needs neither.

    Three hooks of mctx are used and none of its code is replaced:

    - ``loop_fn``: around mctx's body it keeps, in the tree's ``extra_data``, the smallest and largest q seen so far, taken
      after each simulation from the edges on the path of the new node (simulation s makes node s + 1);
    - ``qtransform``: mctx's own mixed value, then normalised by those two;
    - ``gumbel_scale``: mctx draws its noise as ``gumbel(split(rng_key)[1])``. Repeating that draw and passing wanted / drawn
      as the scale makes mctx use the wanted noise, up to one float64 rounding.
    """
    import chex
    import jax
    import jax.numpy as jnp
    import mctx

    @chex.dataclass(frozen=True)
    class ExtraData:
        root_gumbel: Any  # [B, K]
        q_min: Any  # [B]
        q_max: Any  # [B]

    make_extra_data: Any = ExtraData  # type checkers do not see the arguments that chex gives it

    def fold_path(tree: Any, leaf: Any) -> Any:
        """Bounds of one tree after the q of the edges between the root and ``leaf`` were folded in."""

        def body(carry: Any) -> Any:
            low, high, node = carry
            parent = tree.parents[node]
            q = tree.qvalues(parent)[tree.action_from_parent[node]]
            return jnp.minimum(low, q), jnp.maximum(high, q), parent

        start = (tree.extra_data.q_min, tree.extra_data.q_max, jnp.asarray(leaf, dtype=tree.parents.dtype))
        low, high, _ = jax.lax.while_loop(lambda carry: carry[2] != tree.ROOT_INDEX, body, start)
        return low, high

    def loop_with_bounds(lower: int, upper: int, body: Any, init: Any) -> Any:
        key, tree = init
        no_q = jnp.full(tree.node_values.shape[:1], jnp.inf, dtype=tree.node_values.dtype)
        tree = tree.replace(extra_data=make_extra_data(root_gumbel=tree.extra_data.root_gumbel, q_min=no_q, q_max=-no_q))

        def body_with_bounds(simulation: Any, state: Any) -> Any:
            key, tree = body(simulation, state)
            low, high = jax.vmap(fold_path, in_axes=(0, None))(tree, simulation + 1)
            bounds = make_extra_data(root_gumbel=tree.extra_data.root_gumbel, q_min=low, q_max=high)
            return key, tree.replace(extra_data=bounds)

        return jax.lax.fori_loop(lower, upper, body_with_bounds, (key, tree))

    def completed_q(tree: Any, node: Any) -> Any:
        """mctx's completed q in raw units: its scale, set to 1 + max visits, is divided out."""
        scaled = mctx.qtransform_completed_by_mix_value(tree, node, value_scale=1.0, maxvisit_init=1.0, rescale_values=False)
        return scaled / (1.0 + jnp.max(tree.children_visits[node]))

    def recurrent(tables: Any, key: Any, action: Any, state: Any) -> Any:
        del key
        row = jnp.arange(len(action))
        after = tables["next_state"][row, state, action]
        output = mctx.RecurrentFnOutput(
            reward=tables["reward"][row, state, action],
            discount=tables["discount"],
            prior_logits=tables["logits"][row, after],
            value=tables["value"][row, after],
        )
        return output, after

    def policy(tables: Any, invalid: Any, key: Any, c_visit: Any, c_scale: Any, min_q_range: Any) -> Any:
        def qtransform(tree: Any, node: Any) -> Any:
            low, high = tree.extra_data.q_min, tree.extra_data.q_max
            normalised = (completed_q(tree, node) - low) / jnp.maximum(high - low, min_q_range)
            normalised = jnp.where(low <= high, normalised, 0.0)
            return (c_visit + jnp.max(tree.children_visits[node])) * c_scale * normalised

        wanted = tables["gumbel"]
        drawn = jax.random.gumbel(jax.random.split(key)[1], shape=wanted.shape, dtype=wanted.dtype)
        root = mctx.RootFnOutput(
            prior_logits=tables["root_logits"],
            value=tables["root_value"],
            embedding=jnp.zeros(wanted.shape[0], dtype=jnp.int64),
        )
        output = mctx.gumbel_muzero_policy(
            params=tables,
            rng_key=key,
            root=root,
            recurrent_fn=recurrent,
            num_simulations=num_simulations,
            invalid_actions=invalid,
            loop_fn=loop_with_bounds,
            qtransform=qtransform,
            max_num_considered_actions=num_considered,
            gumbel_scale=wanted / drawn,
        )
        tree = output.search_tree
        return (
            tree.parents[:, 1:],
            tree.action_from_parent[:, 1:],
            tree.summary().visit_counts,
            output.action,
            output.action_weights,
            tree.node_values[:, 0],
            jax.vmap(completed_q, in_axes=(0, None))(tree, tree.ROOT_INDEX),
        )

    return jax.jit(policy)


def mctx_search(
    problem: Problem, settings: Settings, discount: np.ndarray | None = None, num_valid: np.ndarray | None = None
) -> Result:
    """Search a problem with discrete actions with ``mctx.gumbel_muzero_policy`` in float64.

    :param discount: [B] a discount for each root instead of the settings' one
    :param num_valid: [B] number of actions that root really has; the columns after them are padding that mctx masks at the
        root and that get no prior inside. It lets roots with different numbers of actions share one compiled function.
    """
    import jax

    # Where older versions of jax keep it.
    enable_x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else importlib.import_module("jax.experimental").enable_x64
    batch, actions = problem.root_logits.shape
    valid = np.full(batch, actions) if num_valid is None else num_valid
    padding = np.arange(actions) >= valid[:, None]  # [B, K]
    with enable_x64(True):
        tables = {
            "root_value": problem.root_value.astype(np.float64),
            "root_logits": problem.root_logits.astype(np.float64),
            "gumbel": problem.gumbel.astype(np.float64),
            "next_state": problem.next_state,
            "reward": problem.reward.astype(np.float64),
            "value": problem.value.astype(np.float64),
            "logits": np.where(padding[:, None, :], -1e30, problem.logits.astype(np.float64)),
            "discount": np.full(batch, settings.discount) if discount is None else discount,
        }
        run = _compiled_mctx(settings.num_considered, problem.num_simulations)
        key = jax.random.PRNGKey(0)
        found = run(tables, padding, key, settings.c_visit, settings.c_scale, settings.min_q_range)
        parent, action, visits, best_action, policy, root_value, q_values = (np.asarray(array) for array in found)
    # Node s + 1 is one deeper than its parent, and parents come before children.
    depth = np.zeros((batch, problem.num_simulations + 1))
    for simulation in range(problem.num_simulations):
        depth[:, simulation + 1] = 1 + depth[np.arange(batch), parent[:, simulation]]
    return Result(
        parent=parent,
        action=action,
        visits=visits.astype(np.int64),
        best_action=best_action,
        policy=policy,
        root_value=root_value,
        q_values=q_values,
        depth=depth[:, 1:].mean(axis=1),
        margin=np.full(batch, np.inf),
    )
