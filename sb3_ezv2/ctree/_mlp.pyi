from typing import Any

import numpy as np
from numpy.typing import NDArray

from sb3_ezv2.ctree._tree import Tree

class Mlp:
    features: int
    state_dim: int
    action_dim: int
    outputs: int
    discrete: bool
    def __init__(self, weights: dict[str, Any], discrete: bool, sources: list[NDArray[Any]], level: int = 2) -> None: ...
    def is_current(self) -> bool: ...
    def initial(self, features: NDArray[Any]) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]: ...
    def search(
        self, tree: Tree, states: NDArray[Any], actions: NDArray[Any] | None, noise: NDArray[Any] | None, limit: float
    ) -> None: ...
