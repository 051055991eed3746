"""
Settings that several benchmarks share.

Everything here is handed to the constructor of :class:`sb3_ezv2.EZV2`; what is not named keeps its default.
"""

from typing import Any

#: Smaller networks than the paper's, and a quarter of its batch four times a step: the same for every state task, so that a
#: run takes minutes on two cores.
SMALL: dict[str, Any] = {
    "batch_size": 64,
    "gradient_steps": 4,
    "policy_kwargs": {"net_arch": [128], "n_blocks": 1, "projection_dim": 128},
}

#: The same for images of about a hundred pixels a side.
SMALL_IMAGES: dict[str, Any] = {
    "batch_size": 16,
    "n_simulations": 8,
    "learning_rate": 1e-3,
    "policy_kwargs": {"channels": 16, "net_arch": [128], "projection_dim": 128},
}
