"""Random shifts and intensities against loops, and where they are applied: in training only, on both branches."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch as th
from common import TINY, SpacesEnv
from gymnasium import spaces

import sb3_ezv2.ezv2 as algorithm
from sb3_ezv2 import EZV2
from sb3_ezv2.augmentation import AugmentedImages, augment, random_intensity, random_shift

IMAGE = spaces.Box(0, 255, (2, 16, 18), np.uint8)
MIXED = spaces.Dict(camera=IMAGE, speed=spaces.Box(-1, 1, (3,), np.float32))


def images(*shape: int) -> th.Tensor:
    return th.randint(256, shape, dtype=th.uint8, generator=th.Generator().manual_seed(0))


@pytest.mark.parametrize("pixels", [1, 4])
def test_shift_is_a_crop_of_the_padded_image(pixels: int) -> None:
    found = random_shift(images(10, 5, 3, 9, 12), pixels, np.random.default_rng(3))
    assert found.dtype == th.uint8
    seen = set()
    padded = np.pad(images(50, 3, 9, 12).numpy(), [(0, 0), (0, 0), (pixels, pixels), (pixels, pixels)], mode="edge")
    for image, whole in zip(found.flatten(0, 1).numpy(), padded):
        offsets = [(y, x) for y in range(2 * pixels + 1) for x in range(2 * pixels + 1)]
        matches = [(y, x) for y, x in offsets if np.array_equal(image, whole[:, y : y + 9, x : x + 12])]
        assert len(matches) == 1
        seen.update(matches)
    # every offset between the largest ones is drawn
    assert {y for y, _ in seen} == {x for _, x in seen} == set(range(2 * pixels + 1))


def test_intensity_is_one_factor_per_image() -> None:
    original = images(4000, 2, 3, 3).clamp(min=1)
    view = random_intensity(original, 0.05, np.random.default_rng(0))
    assert view.images is original and view.factors.dtype == th.float32  # bytes until they are needed
    found = view.floats()
    assert found.dtype == th.float32 and th.equal(found, original * view.factors)
    factors = found / original
    th.testing.assert_close(factors, factors[:, :1, :1, :1].expand_as(factors))
    factors = factors[:, 0, 0, 0]
    assert abs(factors.mean() - 1) < 0.003 and 0.045 < factors.std() < 0.05
    assert factors.min() >= 0.9 - 1e-6 and factors.max() <= 1.1 + 1e-6 and (factors > 1.0999).any()


def test_each_observation_has_a_view_of_its_own() -> None:
    obs = images(1, 1, 2, 16, 18).expand(6, 5, 2, 16, 18)
    found = augment(obs, IMAGE, 4, 0.0, np.random.default_rng(0))
    assert isinstance(found, th.Tensor) and found.shape == obs.shape
    assert len({x.numpy().tobytes() for x in found.flatten(0, 1)}) > 20
    again = augment(obs, IMAGE, 4, 0.0, np.random.default_rng(0))
    assert isinstance(again, th.Tensor) and th.equal(found, again)
    unchanged = augment(obs, IMAGE, 0, 0.0, np.random.default_rng(0))
    assert isinstance(unchanged, th.Tensor) and th.equal(unchanged, obs)


def test_dictionaries_vectors_stay() -> None:
    obs = {"camera": images(4, 3, 2, 16, 18), "speed": th.rand(4, 3, 3)}
    found = augment(obs, MIXED, 4, 0.05, np.random.default_rng(0))
    assert isinstance(found, dict) and th.equal(found["speed"], obs["speed"])
    camera = found["camera"]
    assert isinstance(camera, AugmentedImages)
    assert camera.floats().shape == obs["camera"].shape and not th.equal(camera.floats(), obs["camera"].float())


@pytest.mark.parametrize("space, policy", [(IMAGE, "CnnPolicy"), (MIXED, "MultiInputPolicy")], ids=["image", "dict"])
def test_only_the_losses_see_it(space: spaces.Space, policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Targets, priorities, actions and the replay are of the observations as they are."""
    sizes: dict[str, Any] = dict(channels=4, n_downsamples=2, head_channels=2, projection_dim=4, net_arch=[8])
    settings = {**TINY, "policy_kwargs": sizes, "batch_size": 8, "learning_starts": 20}
    model = EZV2(policy, SpacesEnv(space, spaces.Discrete(2)), seed=0, **settings).learn(24)
    batches: dict[str, list[Any]] = {"targets": [], "losses": []}
    assert model._reanalyzer is not None
    targets, losses = model._reanalyzer.targets, algorithm.compute_losses

    def see_targets(batch: Any, *arguments: Any) -> Any:
        batches["targets"].append(batch.observations)
        return targets(batch, *arguments)

    def see_losses(network: Any, batch: Any, *arguments: Any, **coefs: Any) -> Any:
        batches["losses"].append(batch.observations)
        return losses(network, batch, *arguments, **coefs)

    monkeypatch.setattr(model._reanalyzer, "targets", see_targets)
    monkeypatch.setattr(algorithm, "compute_losses", see_losses)
    model.train(1, 8)
    original, view = (x["camera"] if isinstance(x, dict) else x for x in (*batches["targets"], *batches["losses"]))
    assert isinstance(view, AugmentedImages)
    seen = [original, view.floats()]
    assert seen[0].dtype == th.uint8 and seen[1].dtype == th.float32 and seen[0].shape == seen[1].shape
    # both branches: the first observations and those that follow
    for step in range(seen[0].shape[1]):
        assert not th.equal(seen[0][:, step].float(), seen[1][:, step])
    # none if so wanted
    sizes.update(random_shift=0, random_intensity=0.0)
    plain = EZV2(policy, SpacesEnv(space, spaces.Discrete(2)), seed=0, **settings)
    unchanged = plain.policy.augment(batches["targets"][0], np.random.default_rng(0))
    unchanged = unchanged["camera"] if isinstance(unchanged, dict) else unchanged
    assert th.equal(unchanged, seen[0])


@pytest.mark.parametrize(
    "kwargs, message",
    [
        (dict(random_shift=-1), "random_shift must be a number of pixels"),
        (dict(random_shift=1.5), "random_shift must be a number of pixels"),
        (dict(random_intensity=0.5), "random_intensity must be at least 0 and below 0.5"),
    ],
    ids=str,
)
def test_bad_input(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EZV2("CnnPolicy", SpacesEnv(IMAGE, spaces.Discrete(2)), policy_kwargs=dict(n_downsamples=2, **kwargs))
