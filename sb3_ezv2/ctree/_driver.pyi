from typing import Any

from numpy.typing import NDArray

from sb3_ezv2.ctree._tree import Tree

def sample_actions(params: NDArray[Any], noise: NDArray[Any], limit: float, out: NDArray[Any], level: int = 2) -> None: ...

class Driver:
    def __init__(
        self,
        tree: Tree,
        states: NDArray[Any],
        leaf_states: NDArray[Any],
        actions: NDArray[Any] | None = None,
        leaf_actions: NDArray[Any] | None = None,
        noise: NDArray[Any] | None = None,
        limit: float = 1.0,
        level: int = 2,
    ) -> None: ...
    def step(self, new_states: NDArray[Any], reward: NDArray[Any], value: NDArray[Any], policy: NDArray[Any]) -> None: ...
