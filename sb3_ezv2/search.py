"""
Sampling-based Gumbel search (EfficientZero V2 4.2, App. B): the loop between the networks and the tree.

The states of a batch of searches stay in one pool on the model's device; per simulation the tree says which rows to
expand (:class:`sb3_ezv2.ctree.Tree`), the model makes one step from all of them at once, and two scalars per root
(with the priors of discrete actions) go back.
"""

from __future__ import annotations

import hashlib
import operator
import threading
from typing import Any, NamedTuple

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.type_aliases import PyTorchObs

from sb3_ezv2.ctree import Driver, Tree, fill_normal
from sb3_ezv2.distributions import MAX_ACTION, SquashedGaussian
from sb3_ezv2.inference import HostCopy, NativeModel, SearchModel, TracedModel
from sb3_ezv2.multi_discrete import MultiDiscreteCandidates, are_sampled, category_sizes
from sb3_ezv2.observations import apply, batch_size, device_of

MIN_Q_RANGE = 0.01
"""Least range of the q's when they are normalised, in units of the reward scale (EfficientZero Eq. 10)."""

TREE_THREADS = 1
"""Beside a model on two threads, what lies between its steps takes less time on one (docs/performance.md)."""

NATIVE_MAX_ROOTS = 64
"""Up to so many roots are searched with the model in C++, if there is one for the model."""

HOST_MAX_ROOTS = 8
"""
Up to so many roots of a model on a device are searched with its C++ version on the host: S simulations are S + 1 evaluations
in turn, each of some eighty operations, and to have a device begin them takes longer than to do them here.
"""


class SearchSettings(NamedTuple):
    """
    :param n_simulations: simulations per root (S)
    :param n_sampled_actions: candidates at the root of Box and MultiDiscrete actions (K); discrete actions that enter
        sequential halving
    :param n_inner_actions: candidates at the other nodes, Box and MultiDiscrete actions only (M)
    :param policy_action_fraction: share of the root candidates drawn from the policy (one at least), the rest from its
        flattened version
    :param flat_std_scale: standard deviation of the flattened policy over the policy's
    :param c_visit: of sigma, Eq. 19
    :param c_scale: of sigma, Eq. 19
    :param gamma: discount of one step
    :param improved_value: the search-based value is the mean of q under the improved policy, not that of the simulations
    """

    n_simulations: int = 32
    n_sampled_actions: int = 16
    n_inner_actions: int = 2
    policy_action_fraction: float = 0.25
    flat_std_scale: float = 3.0
    c_visit: float = 50.0
    c_scale: float = 0.1
    gamma: float = 0.997
    improved_value: bool = False


def searches_all_actions(action_space: spaces.Space, n_sampled_actions: int) -> bool:
    """
    :param action_space: of the environment
    :param n_sampled_actions: candidates at the root
    :return: whether all actions are candidates, with the policy's logits as priors, and not a sample with equal priors.
        Three defaults differ:

        - ``c_scale``: 0.1 (Table 3) for a sample, which sigma alone weights; 0.3 where it improves the policy's own priors
          refresh by refresh
        - ``search_value``: sequential halving gives each of two actions half of the simulations, so that their mean
          (Eq. 10) is the value of a policy that takes the worse one every second time
        - ``exploration_eps``: a sample is in part drawn from a flattened policy, which explores
    """
    if sizes := category_sizes(action_space):
        return not are_sampled(sizes, n_sampled_actions)
    return isinstance(action_space, spaces.Discrete)


class SearchResult(NamedTuple):
    """
    Of B searches with K root actions (all actions if discrete).

    :param action: int64 [B], index of the recommended root action a*_S
    :param policy: [B, K], improved policy over the root actions (Eq. 18)
    :param value: [B], search-based value (Eq. 10, or see ``improved_value``), in the units of the rewards
    :param candidates: [B, K, A], the root actions in [-1, 1], or int64 [B, K, D] of MultiDiscrete ones; None for discrete ones
    :param network_value: [B], the network's value of the roots
    :param depth: [B], mean depth of the simulations
    """

    action: th.Tensor
    policy: th.Tensor
    value: th.Tensor
    candidates: th.Tensor | None
    network_value: th.Tensor
    depth: th.Tensor

    def best(self) -> th.Tensor:
        """:return: the recommended actions, int64 [B], int64 [B, D] or [B, A] in [-1, 1]"""
        if self.candidates is None:
            return self.action
        return self.candidates[th.arange(len(self.action), device=self.action.device), self.action]


class GumbelSearch:
    """
    Searches with one model. The trees and the state pool are allocated for the largest batch seen and reused; calls from
    several threads wait for each other.

    :param model: see :class:`sb3_ezv2.inference.SearchModel`; its weights may change between searches
    :param settings: see :class:`SearchSettings`
    :param max_roots: larger batches are searched in pieces of this size, which bounds the memory
    :param bfloat16: matrix products of batches of more than :data:`NATIVE_MAX_ROOTS` roots in bfloat16, on processors
        that have it
    """

    def __init__(self, model: SearchModel, settings: SearchSettings, max_roots: int = 2048, bfloat16: bool = False):
        self.model = model
        self.settings = settings
        self.max_roots = max_roots
        self.bfloat16 = bfloat16
        self.num_root_actions = model.action_dim if model.discrete else settings.n_sampled_actions
        self.num_inner_actions = model.action_dim if model.discrete else settings.n_inner_actions
        self.candidate_dim = model.action_dim  # numbers of one candidate
        self._multi: MultiDiscreteCandidates | None = None
        if model.category_sizes:
            multi = self._multi = MultiDiscreteCandidates(
                model.category_sizes,
                settings.n_sampled_actions,
                settings.n_inner_actions,
                settings.policy_action_fraction,
                settings.flat_std_scale,
            )
            self.num_root_actions, self.num_inner_actions = multi.n_root, multi.n_inner
            self.candidate_dim = multi.dimensions
        self._forget()

    def _forget(self) -> None:
        self._lock = threading.Lock()
        self._workspace: _Workspace | None = None
        self._traced = TracedModel(self.model, self.bfloat16)
        self._native = NativeModel(self.model)
        self._host_copy = HostCopy(self.model)
        self._host_search: GumbelSearch | None = None  # of the copy
        self._searched_on_host = False  # the latest batch

    def __getstate__(self) -> dict[str, Any]:
        made_again = ("_lock", "_workspace", "_traced", "_native", "_host_copy", "_host_search", "_searched_on_host")
        return {k: v for k, v in self.__dict__.items() if k not in made_again}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Storage and compiled code are made again when needed
        self.__dict__.update(state)
        self._forget()

    def digest(self) -> bytes:
        """:return: of all that a search depends on but its observation and noise: the settings and the network's weights"""
        digest = hashlib.blake2b(repr((self.settings, self.bfloat16)).encode())
        for name, tensor in self.model.state_dict().items():
            digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.digest()

    @th.no_grad()
    def run(self, obs: PyTorchObs, rng: np.random.Generator | None) -> SearchResult:
        """
        :param obs: [B, ...] observations on the model's device
        :param rng: source of all noise; None: no Gumbel noise and fixed candidates of the policy itself with its mode
            first, so that the result depends on the observation and the weights alone
        :return: the results, on the model's device
        :raises ValueError: the model gave NaN or infinite values
        """
        if self.model.training:
            self.model.eval()
        num_roots, device = batch_size(obs), device_of(obs)
        with self._lock:
            host = self._on_host(device) if num_roots <= HOST_MAX_ROOTS else None
            self._searched_on_host = host is not None
            if host is not None:
                result = host._run(obs, rng, features=self.model.features(obs).cpu())  # type: ignore[attr-defined]
                return SearchResult(*(None if x is None else x.to(device) for x in result))  # type: ignore[arg-type]
            if num_roots <= self.max_roots:
                return self._run(obs, rng)
            pieces = [slice(start, start + self.max_roots) for start in range(0, num_roots, self.max_roots)]
            parts = [self._run(apply(operator.itemgetter(piece), obs), rng) for piece in pieces]
        return SearchResult(*(None if field[0] is None else th.cat(field) for field in zip(*parts)))  # type: ignore[arg-type]

    def _on_host(self, device: th.device) -> GumbelSearch | None:
        """
        :param device: of the model
        :return: a search on the host with the model as it is now; None: it is there already, or has no C++ version
        """
        network = None if device.type == "cpu" else self._host_copy.get()
        if network is None:
            return None
        if self._host_search is None or self._host_search.model is not network:
            self._host_search = GumbelSearch(network, self.settings)
        return None if self._host_search._native.get() is None else self._host_search

    def _run(self, obs: PyTorchObs, rng: np.random.Generator | None, features: th.Tensor | None = None) -> SearchResult:
        """:param features: of the observations, for the model in C++; None: they are still to be computed"""
        num_roots = batch_size(obs)
        native = self._native.get() if num_roots <= NATIVE_MAX_ROOTS else None
        if native is None:
            state, value, policy = self.model.initial_inference(obs)
        else:
            if features is None:
                features = self.model.features(obs)  # type: ignore[attr-defined]
            state, value, policy = (th.from_numpy(x) for x in native.initial(features.float().contiguous().numpy()))
        network_value = value
        work = self._get_workspace(num_roots, state)
        tree = work.tree
        states = work.states[: (self.settings.n_simulations + 1) * num_roots]
        states[:num_roots] = state
        candidates, noise, actions = None, None, None
        root_logits = gumbel = work.zeros[:num_roots]
        if self.model.discrete:
            root_logits = _to_numpy(policy)
            if rng is not None:
                gumbel = rng.gumbel(size=(num_roots, self.num_root_actions)).astype(np.float32)
        else:
            if self._multi is None:
                candidates, noise = self.sample_candidates(policy, rng)
            else:
                candidates, logits, gumbel = self._multi.at_root(policy, rng)
                root_logits = _to_numpy(logits)
                noise = self._multi.inner_noise(self.settings.n_simulations, num_roots, rng).to(policy.device)
            # [B * K + S * B * M, A]: the roots' candidates, then those of each simulation's new states
            edges = self.num_root_actions + self.settings.n_simulations * self.num_inner_actions
            actions = work.actions[: num_roots * edges]
            actions[: num_roots * self.num_root_actions] = candidates.flatten(0, 1)
        try:
            tree.reset(_to_numpy(value), root_logits, gumbel)
        except ValueError as error:
            raise ValueError(f"the model's outputs for the observations cannot be searched: {error}") from error
        tree.select()
        if native is not None:
            of_actions = None if actions is None else actions.numpy()
            of_noise = None if noise is None else noise.numpy()
            native.search(tree, states.numpy(), of_actions, of_noise, MAX_ACTION)
        elif state.device.type == "cpu" and state.dtype == th.float32 and self._multi is None:
            self._simulate_on_cpu(work, states, actions, noise)
        else:
            self._simulate(work, states, actions, noise)
        device = state.device
        improved_policy = tree.policy()
        search_value = (improved_policy * tree.q_values()).sum(1) if self.settings.improved_value else tree.root_value()
        return SearchResult(
            action=th.from_numpy(tree.best_action()).to(device),
            policy=th.from_numpy(improved_policy).to(device),
            value=th.from_numpy(search_value).to(device),
            candidates=candidates,
            network_value=network_value,
            depth=th.from_numpy(tree.depth()).to(device),
        )

    def _simulate_on_cpu(
        self, work: _Workspace, states: th.Tensor, actions: th.Tensor | None, noise: th.Tensor | None
    ) -> None:
        """:meth:`_simulate` for float32 states on the CPU: all but the model's step is one call."""
        tree = work.tree
        num_roots = len(tree.parent)
        leaf_states, leaf_actions = work.leaf_states[:num_roots], work.leaf_actions[:num_roots]
        # views: a copy would never be read again
        rows = states.view(len(states), -1).numpy(), leaf_states.view(num_roots, -1).numpy()
        if actions is None or noise is None:
            leaf_actions = th.from_numpy(tree.action)
            driver = Driver(tree, *rows)
        else:
            driver = Driver(tree, *rows, actions.numpy(), leaf_actions.numpy(), noise.numpy(), MAX_ACTION)
        step = self._traced.step(leaf_states, leaf_actions)
        for simulation in range(self.settings.n_simulations):
            new_state, reward, value, policy = step(leaf_states, leaf_actions)
            try:
                driver.step(_to_numpy(new_state), _to_numpy(reward), _to_numpy(value), _to_numpy(policy))
            except ValueError as error:
                raise _unsearchable(simulation, error) from error

    def _simulate(self, work: _Workspace, states: th.Tensor, actions: th.Tensor | None, noise: th.Tensor | None) -> None:
        """
        All simulations of B searches, in a tree that has selected the first edges.

        :param states: [(S + 1) * B, ...], the first B of them filled
        :param actions: [B * K + S * B * M, A or D], the first B * K of them filled; None for discrete actions
        :param noise: [S, B or 1, M, A or D], of the candidates of the inner nodes; None for discrete actions
        """
        tree, device, settings = work.tree, states.device, self.settings
        num_roots = len(tree.parent)
        leaf_states, leaf_actions = work.leaf_states[:num_roots], work.leaf_actions[:num_roots]
        pool = states.unflatten(0, (-1, num_roots)).unbind()  # of the nodes that each simulation makes, after the roots
        if actions is not None:
            shape = settings.n_simulations, num_roots * self.num_inner_actions, self.candidate_dim
            inner_actions = actions[num_roots * self.num_root_actions :].view(shape).unbind()
        for simulation in range(settings.n_simulations):
            parent, action, edge = (th.from_numpy(x).to(device) for x in (tree.parent, tree.action, tree.edge))
            th.index_select(states, 0, parent, out=leaf_states)
            if actions is None:
                leaf_actions = action
            else:
                th.index_select(actions, 0, edge, out=leaf_actions)
            if simulation == 0:
                step = self._traced.step(leaf_states, leaf_actions)
            new_state, reward, value, policy = step(leaf_states, leaf_actions)
            pool[simulation + 1].copy_(new_state)
            priors = policy if actions is None else None
            if self._multi is not None:
                assert noise is not None
                priors = self._multi.at_node(policy, noise[simulation], inner_actions[simulation])
            try:
                tree.step(_to_numpy(reward), _to_numpy(value), None if priors is None else _to_numpy(priors))
            except ValueError as error:
                raise _unsearchable(simulation, error) from error
            if noise is not None and self._multi is None:
                candidates = SquashedGaussian(policy.unsqueeze(1)).sample(noise[simulation])
                inner_actions[simulation].copy_(candidates.flatten(0, 1))

    def sample_candidates(self, policy: th.Tensor, rng: np.random.Generator | None) -> tuple[th.Tensor, th.Tensor]:
        """
        The actions that a Box search compares. All noise of a batch is drawn at once, from a key that the generator draws.

        :param policy: [B, 2A] output of the policy head at the roots
        :param rng: of the noise; None: the fixed noise of a deterministic search
        :return: root candidates [B, K, A]; standard normal noise of the inner nodes, broadcastable to [S, B, M, A]
        """
        settings = self.settings
        num_roots, num_actions, num_inner = len(policy), self.num_root_actions, self.num_inner_actions
        action_dim = self.model.action_dim
        std_scale = np.ones((num_actions, 1), dtype=np.float32)
        if rng is None:
            # The same noise for every root: a search does not depend on its batch
            fixed = np.random.default_rng(0)
            root_noise = fixed.standard_normal((1, num_actions, action_dim), dtype=np.float32)
            root_noise[:, 0] = 0.0
            inner_noise = fixed.standard_normal((settings.n_simulations, 1, num_inner, action_dim), dtype=np.float32)
        else:
            from_policy = max(1, round(settings.policy_action_fraction * num_actions))
            std_scale[from_policy:] = settings.flat_std_scale
            at_roots = num_roots * num_actions * action_dim
            noise = np.empty(at_roots + settings.n_simulations * num_roots * num_inner * action_dim, np.float32)
            fill_normal(int(rng.integers(2**64, dtype=np.uint64)), noise)
            root_noise = noise[:at_roots].reshape(num_roots, num_actions, action_dim)
            inner_noise = noise[at_roots:].reshape(settings.n_simulations, num_roots, num_inner, action_dim)
        device = policy.device
        distribution = SquashedGaussian(policy.unsqueeze(1))
        candidates = distribution.sample(th.from_numpy(root_noise).to(device), th.from_numpy(std_scale).to(device))
        return candidates, th.from_numpy(inner_noise).to(device)

    def last_tree(self) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
        """
        The trees of the latest :meth:`run`; of its last piece, if it was searched in pieces.

        :return: see :meth:`sb3_ezv2.ctree.Tree.nodes`; the actions that lead to the nodes (0 for the roots), float32
            [B, N, A] in [-1, 1] of Box actions, int64 [B, N, D] of MultiDiscrete ones, None for discrete ones
        :raises RuntimeError: nothing has been searched yet
        """
        if self._searched_on_host and self._host_search is not None:
            return self._host_search.last_tree()
        if self._workspace is None:
            raise RuntimeError("there is no tree yet: run() a search first")
        nodes = self._workspace.tree.nodes()
        if self.model.discrete:
            return nodes, None
        parent, action = nodes["parent"].astype(np.int64), nodes["action"].astype(np.int64)
        num_roots = len(parent)
        root = np.arange(num_roots)[:, None]
        # Rows of the pool of candidates, see Tree.select
        inner = num_roots * self.num_root_actions + ((parent - 1) * num_roots + root) * self.num_inner_actions + action
        edges = np.where(parent == 0, root * self.num_root_actions + action, inner)
        edges[:, 0] = 0
        actions = self._workspace.actions.cpu().numpy()[edges]
        actions[:, 0] = 0
        return nodes, actions

    def _get_workspace(self, num_roots: int, state: th.Tensor) -> _Workspace:
        # The scale is read on every run: it is set after the first transitions have been seen
        min_q_range = MIN_Q_RANGE * float(self.model.reward_support.scale)
        work = self._workspace
        if (
            work is None
            or work.tree.num_roots < num_roots
            or work.min_q_range != min_q_range
            or work.states.device != state.device
        ):
            settings = self.settings
            nodes = (settings.n_simulations + 1) * num_roots
            edges = num_roots * (self.num_root_actions + settings.n_simulations * self.num_inner_actions)
            dtype = state.dtype if self._multi is None else th.int64
            work = _Workspace(
                tree=Tree(
                    num_roots,
                    settings.n_simulations,
                    self.num_root_actions,
                    self.num_inner_actions,
                    num_considered=min(settings.n_sampled_actions, self.num_root_actions),
                    discount=settings.gamma,
                    c_visit=settings.c_visit,
                    c_scale=settings.c_scale,
                    min_q_range=min_q_range,
                    num_threads=TREE_THREADS,
                ),
                min_q_range=min_q_range,
                states=_empty_pool(state, nodes),
                actions=state.new_empty(0 if self.model.discrete else edges, self.candidate_dim, dtype=dtype),
                # the driver writes here row by row, whatever the layout of the model's own states (channels last)
                leaf_states=th.empty_like(state, memory_format=th.contiguous_format),
                leaf_actions=state.new_empty(num_roots, self.candidate_dim, dtype=dtype),
                zeros=np.zeros((num_roots, self.num_root_actions), dtype=np.float32),
            )
            self._workspace = work
        return work


class _Workspace(NamedTuple):
    """
    Storage of a search, for at most ``tree.num_roots`` roots.

    :param states: [(S + 1) * roots, D], row ``slot * B + root`` for the current batch of B roots
    :param actions: [roots * K + S * roots * M, A or D], candidates of Box or MultiDiscrete actions
    :param leaf_states: [roots, D], what the model's step begins with
    :param leaf_actions: [roots, A or D]
    :param zeros: float32 [roots, K]
    """

    tree: Tree
    min_q_range: float
    states: th.Tensor
    actions: th.Tensor
    leaf_states: th.Tensor
    leaf_actions: th.Tensor
    zeros: np.ndarray


def _empty_pool(state: th.Tensor, rows: int) -> th.Tensor:
    """:return: [rows, ...] of states; on the CPU from NumPy, which asks the system for large pages, and PyTorch does not"""
    if state.device.type == "cpu" and state.dtype == th.float32:
        return th.from_numpy(np.empty((rows, *state.shape[1:]), np.float32))
    return state.new_empty(rows, *state.shape[1:])


def _unsearchable(simulation: int, error: ValueError) -> ValueError:
    return ValueError(f"the model's outputs in simulation {simulation} cannot be searched: {error}")


def _to_numpy(x: th.Tensor) -> np.ndarray:
    if x.device.type != "cpu":
        x = x.cpu()
    return x.numpy() if x.is_contiguous() else x.contiguous().numpy()
