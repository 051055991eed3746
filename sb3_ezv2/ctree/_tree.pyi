from typing import Any

import numpy as np
from numpy.typing import NDArray

def considered_visits(num_considered: int | np.integer, num_simulations: int | np.integer) -> NDArray[np.int32]: ...

class Tree:
    num_roots: int
    num_simulations: int
    num_root_actions: int
    num_inner_actions: int
    parent: NDArray[np.int64]
    action: NDArray[np.int64]
    edge: NDArray[np.int64]
    def __init__(
        self,
        num_roots: int | np.integer,
        num_simulations: int | np.integer,
        num_root_actions: int | np.integer,
        num_inner_actions: int | np.integer,
        *,
        num_considered: int | np.integer,
        discount: float,
        c_visit: float | np.floating = 50.0,
        c_scale: float = 0.1,
        min_q_range: float = 0.01,
        num_threads: int | np.integer = 1,
    ) -> None: ...
    @property
    def nbytes(self) -> int: ...
    def reset(self, root_value: NDArray[Any], root_logits: NDArray[Any], gumbel: NDArray[Any]) -> None: ...
    def select(self) -> None: ...
    def backup(self, reward: NDArray[Any], value: NDArray[Any], logits: NDArray[Any] | None = None) -> None: ...
    def best_action(self) -> NDArray[np.int64]: ...
    def policy(self) -> NDArray[np.float32]: ...
    def root_value(self) -> NDArray[np.float32]: ...
    def visits(self) -> NDArray[np.int32]: ...
    def q_values(self) -> NDArray[np.float32]: ...
    def depth(self) -> NDArray[np.float32]: ...
