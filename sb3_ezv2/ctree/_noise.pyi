import numpy as np
from numpy.typing import NDArray

def fill_normal(key: int | np.integer, out: NDArray[np.float32], level: int = 2) -> None: ...
