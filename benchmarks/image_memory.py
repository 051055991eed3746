"""
Device memory of an Atari update at the paper's size, counted without a device::

    python -m benchmarks.image_memory

All tensors are fake: they have shapes and storages but no contents, so that this takes seconds anywhere. What is counted are
the storages alive at once; workspaces of convolutions and the fragmentation of an allocator come on top.
"""

from __future__ import annotations

import argparse
import weakref
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sb3_ezv2.augmentation import augment
from sb3_ezv2.image_networks import ImageNetwork
from sb3_ezv2.losses import Targets, compute_losses
from sb3_ezv2.replay_buffer import Batch

UNROLL, ACTIONS, SIMULATIONS = 5, 18, 16


class Counter(TorchDispatchMode):
    """Bytes of the storages that operations make, now (``live``) and at most (``peak``)."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()

    def _free(self, nbytes: int) -> None:
        self.live -= nbytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, th.Tensor):
                storage = tensor.untyped_storage()
                if storage not in self._known:
                    self._known[storage] = storage.nbytes()
                    self.live += storage.nbytes()
                    weakref.finalize(storage, self._free, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return result


def count(batch_size: int, planes: int = 12, size: int = 96) -> dict[str, float]:
    """
    :param batch_size: sequences in a batch
    :param planes: of an observation
    :param size: height and width of an observation
    :return: peaks in GB, by part
    """
    space = spaces.Box(0, 255, (planes, size, size), np.uint8)
    support = (58705.58, 601, "h")
    roots = batch_size * (UNROLL + 1)
    with FakeTensorMode(allow_non_fake_inputs=True), Counter() as counter:

        def network() -> ImageNetwork:
            return ImageNetwork(
                space, spaces.Discrete(ACTIONS), net_arch=[32], channels=64, n_blocks=1, n_downsamples=4, head_channels=16,
                action_embedding_dim=16, projection_dim=512, value_support=support, reward_support=support,  # type: ignore[arg-type]
                prefix_window=5, lstm_dim=512,
            )  # fmt: skip

        # the trained network and its three copies
        networks = [network() for _ in range(4)]
        optimizer = th.optim.SGD(networks[0].parameters(), lr=0.2, momentum=0.9)
        peaks = {"networks": counter.peak}

        def mask(*shape: int) -> th.Tensor:
            return th.ones(*shape, dtype=th.bool)

        observations = th.zeros(batch_size, UNROLL + 1, planes, size, size, dtype=th.uint8)
        ends = th.zeros_like(observations)
        with th.no_grad():
            counter.peak = counter.live
            networks[3].eval().values(ends.flatten(0, 1))
            peaks["values at the windows' ends"] = counter.peak
            counter.peak = counter.live
            state, _, _ = networks[2].eval().initial_inference(observations.flatten(0, 1))
            pool = th.zeros((SIMULATIONS + 1) * roots, state.shape[1])
            networks[2].recurrent_inference(pool[:roots], th.zeros(roots, dtype=th.long))
            peaks["search of all states"] = counter.peak
            del state  # the pool stays for the next search
        counter.peak = counter.live
        del ends
        batch = Batch(
            slots=np.zeros((batch_size, UNROLL + 1), np.int64),
            observations=augment(observations, space, 4, 0.05, np.random.default_rng(0)),
            actions=th.zeros(batch_size, UNROLL, dtype=th.long),
            rewards=th.zeros(batch_size, UNROLL),
            returns=th.zeros(batch_size, UNROLL + 1),
            bootstrap_observations=None,
            bootstrap_discounts=th.zeros(batch_size, UNROLL + 1),
            observed=mask(batch_size, UNROLL + 1),
            reward_mask=mask(batch_size, UNROLL),
            value_mask=mask(batch_size, UNROLL + 1),
            policy_mask=mask(batch_size, UNROLL + 1),
            weights=th.ones(batch_size),
            ages=np.zeros(batch_size, np.int64),
        )
        del observations
        policies = th.full((batch_size, UNROLL + 1, ACTIONS), 1 / ACTIONS)
        targets = Targets(th.zeros(batch_size, UNROLL + 1), batch.value_mask, policies, None)
        losses = compute_losses(networks[0].train(), batch, targets, np.random.default_rng(0))
        losses.total.backward()
        optimizer.step()
        peaks["losses, gradient and optimizer"] = counter.peak
        del pool
    peaks["the largest"] = max(peaks.values())
    return {name: value / 1e9 for name, value in peaks.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=256)
    options = parser.parse_args()
    for name, value in count(options.batch_size).items():
        print(f"{name}: {value:.2f} GB")


if __name__ == "__main__":
    main()
