"""EfficientZero V2 for Stable-Baselines3."""

from importlib.metadata import PackageNotFoundError, version

from sb3_ezv2.base_policy import Ezv2Policy
from sb3_ezv2.ezv2 import EZV2
from sb3_ezv2.policies import CnnPolicy, MlpPolicy, MultiInputPolicy

try:
    __version__ = version("sb3-ezv2")
except PackageNotFoundError:  # a source tree that was not installed
    __version__ = "0+unknown"

__all__ = ["EZV2", "CnnPolicy", "Ezv2Policy", "MlpPolicy", "MultiInputPolicy", "__version__"]
