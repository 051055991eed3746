"""
What makes a training run survive: saving and loading at any moment, steps and rollouts that are never left half done,
Ctrl-C, and failures of environments.
"""

from __future__ import annotations

import copy
import io
import pathlib
import pickle
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch as th
from stable_baselines3.common.base_class import maybe_make_env
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback, CallbackList, ConvertCallback
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, RolloutReturn, TrainFreq, TrainFrequencyUnit
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

from sb3_ezv2.checkpoint import restore_checkpoint, save_checkpoint
from sb3_ezv2.interrupts import DeferredInterrupt
from sb3_ezv2.replay_buffer import SequenceReplayBuffer
from sb3_ezv2.saving import READ_ERRORS, check_agent_file, reading, replacing, unreadable
from sb3_ezv2.search import SearchResult
from sb3_ezv2.validation import check_replay_buffer, check_transition, explain_spaces

if TYPE_CHECKING:
    from typing_extensions import Self

STEP_INFOS = ("TimeLimit.truncated", "terminal_observation", "episode", "is_success")
"""Entries of an environment's ``info`` that are still needed after its step."""


@dataclass
class OpenRollout:
    """
    What of a rollout was collected but not learned from yet. It is saved with the agent.

    :param steps: calls of ``env.step()`` that are stored
    :param episodes: episodes that ended in them
    :param step: a step that was made but is not stored yet: arguments of ``_store_transition`` by their names
    :param search: that chose its action
    """

    steps: int = 0
    episodes: int = 0
    step: dict[str, Any] | None = None
    search: SearchResult | None = None


class LeftUpdates(BaseCallback):
    """When training starts, makes the updates that an interruption has left of the last rollout."""

    @classmethod
    def after(cls, callback: MaybeCallback) -> CallbackList:
        """:param callback: as ``learn()`` takes it :return: that, then this one, so that it sees what happens here"""
        if callback is None:
            first: list[BaseCallback] = []
        elif isinstance(callback, list):
            first = callback
        else:
            first = [callback if isinstance(callback, BaseCallback) else ConvertCallback(callback)]
        return CallbackList([*first, cls()])

    def _on_training_start(self) -> None:
        self.model.make_updates()  # type: ignore[attr-defined]

    def _on_step(self) -> bool:
        return True


class ResumableAlgorithm(OffPolicyAlgorithm):
    """Base of :class:`sb3_ezv2.ezv2.EZV2`: see the module. It adds no argument to SB3's."""

    replay_buffer: SequenceReplayBuffer | None  # type: ignore[assignment]
    on_failure: list[Callable[[BaseException], None]]
    """Called with the exception that ends ``learn()``, after the agent was put into a state from which it can go on."""
    checkpoint_extra: Any = None
    """What was given to :func:`sb3_ezv2.checkpoint.save_checkpoint` besides the agent."""

    def __init__(self, *args: Any, **kwargs: Any):
        self.on_failure = []
        self._interrupt = DeferredInterrupt()
        self._rollout = OpenRollout()
        self._updates_left = 0  # updates of the last rollout that are still to be made
        self._last_search: SearchResult | None = None
        # Sums of device tensors and their counts, read once per log interval
        self._stats: dict[str, tuple[Any, int]] = {}
        self._callback: BaseCallback | None = None
        # Actions of the step that is being made, as they will be stored; None between two steps
        self._open_actions: np.ndarray | None = None
        self._normalizer_before: tuple[Any, Any] | None = None
        self._saved_progress: dict[str, Any] | None = None
        super().__init__(*args, **kwargs)

    # ------------------------------------------------------------------ saving and loading

    def _excluded_save_params(self) -> list[str]:
        return [
            *super()._excluded_save_params(),
            *("on_failure", "_interrupt", "_rollout", "_last_search", "_stats", "_callback", "_open_actions"),
            *("_normalizer_before", "checkpoint_extra"),
        ]

    def save(
        self,
        path: str | pathlib.Path | io.BufferedIOBase,
        exclude: Iterable[str] | None = None,
        include: Iterable[str] | None = None,
    ) -> None:
        """
        Save all the attributes of the object and the model parameters in a zip-file. A file of that name is replaced
        only when the new one is complete.

        :param path: path to the file where the rl agent should be saved
        :param exclude: name of parameters that should be excluded in addition to the default ones
        :param include: name of parameters that might be excluded but should be included anyway
        :raises OSError: the file could not be written; one that was there is as it was
        """
        rollout = replace(self._rollout, step=self._made_step())
        if rollout.step is not None and self._last_search is not None:
            parts = {name: x.cpu() for name, x in self._last_search._asdict().items() if x is not None}
            rollout.search = self._last_search._replace(**parts)
        self._saved_progress = {
            "rollout": rollout,
            # Plain numbers: they are loaded on any device, and the sums go on exactly as they would have
            "stats": {name: (float(total), count) for name, (total, count) in self._stats.items()},
        }
        try:
            if not isinstance(path, (str, pathlib.Path)):
                super().save(path, exclude, include)
                return
            # In memory first: what PyTorch raises when a disk is full does not tell so
            agent = io.BytesIO()
            super().save(agent, exclude, include)
        finally:
            self._saved_progress = None
        with replacing(path, "zip") as file:
            file.write(agent.getbuffer())

    @classmethod
    def load(  # type: ignore[override]
        cls,
        path: str | pathlib.Path | io.BufferedIOBase,
        env: GymEnv | str | None = None,
        device: th.device | str = "auto",
        custom_objects: dict[str, Any] | None = None,
        print_system_info: bool = False,
        force_reset: bool = True,
        **kwargs: Any,
    ) -> Self:
        """
        As in SB3; the environment may be an id registered in Gym, too.

        :raises ValueError: the environment's spaces are not the agent's; the file is damaged or of another algorithm
        """
        check_agent_file(path, ("n_simulations", "unroll_steps", "td_steps"))
        env = maybe_make_env(env, 0) if isinstance(env, str) else env
        try:
            model = super().load(path, env, device, custom_objects, print_system_info, force_reset, **kwargs)
        except ValueError as error:
            if isinstance(error.__cause__, zipfile.BadZipFile):
                raise unreadable(path, error.__cause__) from error
            raise explain_spaces(error) from None
        except READ_ERRORS as error:
            raise unreadable(path, error) from error
        if (progress := model._saved_progress) is not None:
            model._rollout, model._stats = progress["rollout"], progress["stats"]
            model._saved_progress = None
        return model

    def save_replay_buffer(self, path: str | pathlib.Path | io.BufferedIOBase) -> None:
        """
        Save the replay buffer as a pickle file, with the searches that the reanalysis remembers. A file of that name is
        replaced only when the new one is complete.

        :param path: Path to the file where the replay buffer should be saved.
        :raises OSError: the file could not be written; one that was there is as it was
        """
        if not isinstance(path, (str, pathlib.Path)):
            super().save_replay_buffer(path)
            return
        assert self.replay_buffer is not None, "The replay buffer is not defined"
        with replacing(path, "pkl") as file:
            pickle.dump(self.replay_buffer, file, protocol=pickle.HIGHEST_PROTOCOL)

    def load_replay_buffer(self, path: str | pathlib.Path | io.BufferedIOBase, truncate_last_traj: bool = True) -> None:
        """
        Load a replay buffer from a pickle file.

        :param path: Path to the pickled replay buffer.
        :param truncate_last_traj: If set to ``True``, the episodes that were open when the buffer was saved are over,
            and end by truncation. If set to ``False``, the environments are still in these episodes and go on with them.
        :raises ValueError: it is damaged, no buffer of EZV2 or not of this agent's spaces; the agent keeps the one it had
        """
        with reading(path, "pkl") as file:
            try:
                buffer = pickle.load(file)
            except (*READ_ERRORS, ValueError, TypeError, ImportError, IndexError, MemoryError) as error:
                raise unreadable(path, error) from error
        check_replay_buffer(buffer, SequenceReplayBuffer, self.observation_space, self.action_space)
        buffer.device = self.device
        if truncate_last_traj:
            buffer.truncate_open_episodes()
        self.replay_buffer = buffer

    def save_checkpoint(self, path: str | pathlib.Path) -> None:
        """
        Save all that is needed to go on as if there had been no interruption: agent, replay buffer, searches, environments,
        random states; see :func:`sb3_ezv2.checkpoint.save_checkpoint`.

        :param path: of the file, which is replaced when the new one is complete; ``.zip`` is appended if it has no ending
        :raises OSError: the file could not be written; one that was there is as it was
        """
        save_checkpoint(self, path)

    @classmethod
    def load_checkpoint(
        cls,
        path: str | pathlib.Path,
        env: GymEnv | str,
        device: th.device | str = "auto",
        custom_objects: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Self:
        """
        The agent of :meth:`save_checkpoint`, in the middle of its episodes. It goes on by
        ``learn(model.remaining_timesteps, reset_num_timesteps=False)``.

        Python's, NumPy's and PyTorch's random generators are set to the states that they had. Like ``load()``, this executes
        code from the file if someone has put it there: only load files that you trust.

        :param path: of the file
        :param env: environments and wrappers as the agent had; their states are replaced
        :param device: Device on which the code should be run.
        :param custom_objects: see SB3's ``load``
        :param kwargs: extra arguments to change the model when loading
        :return: the agent
        :raises ValueError: the file is no checkpoint, is damaged, or is of other environments
        """
        model = cls.load(path, env, device, custom_objects, force_reset=False, **kwargs)
        if model.env is None:
            raise ValueError("a checkpoint goes on in environments: give env, or use load() for the agent alone.")
        restore_checkpoint(model, path)
        return model

    @property
    def remaining_timesteps(self) -> int:
        """Environment steps that the last ``learn()`` had still to make when it was interrupted or the agent saved."""
        return max(0, self._total_timesteps - self.num_timesteps)

    # ------------------------------------------------------------------ learning

    def learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 4,
        tb_log_name: str = "run",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> Self:
        """
        As in SB3. After an exception the agent can be saved, and can go on: between two steps on Ctrl-C (a second Ctrl-C
        raises at once), with new episodes if the environment has failed.
        """
        self.on_failure = []
        try:
            with DeferredInterrupt() as self._interrupt:
                return super().learn(total_timesteps, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar)
        except BaseException as error:
            self._recover()
            for function in self.on_failure:
                function(error)
            raise
        finally:
            self.on_failure = []
            self._callback = None

    def _recover(self) -> None:
        """Leave no step half done, whatever has ended ``learn()``."""
        self.policy.set_training_mode(False)
        if self._made_step() is not None:
            try:
                self._finish_step(None)
            except ValueError:  # NaN in a step in which a callback has failed
                pass
        if self._open_actions is not None:
            # The environment has failed, or was interrupted: what it observes next is not what followed
            self._open_actions = None
            self._last_obs = None
        normalizer = self._vec_normalize_env
        if normalizer is not None and self._normalizer_before is not None and not _finite(normalizer):
            # NaN has gone into the means
            observations, returns = self._normalizer_before
            normalizer.ret_rms = returns
            if observations is not None:
                normalizer.obs_rms = observations

    def collect_rollouts(
        self,
        env: VecEnv,
        callback: BaseCallback,
        train_freq: TrainFreq,
        replay_buffer: ReplayBuffer,
        action_noise: ActionNoise | None = None,
        learning_starts: int = 0,
        log_interval: int | None = None,
    ) -> RolloutReturn:
        """
        As in SB3, with two differences: a rollout that was open when the agent was saved or stopped is completed, and the
        step in which a callback stops the training is stored, too.
        """
        self._callback = callback
        if self._rollout.step is not None:
            self._finish_step(log_interval)
        steps, episodes = self._rollout.steps, self._rollout.episodes
        done = steps if train_freq.unit == TrainFrequencyUnit.STEP else episodes
        rollout = RolloutReturn(0, 0, continue_training=True)
        if done < train_freq.frequency:
            rollout = super().collect_rollouts(
                env,
                callback,
                TrainFreq(train_freq.frequency - done, train_freq.unit),
                replay_buffer,
                action_noise,
                learning_starts,
                log_interval,
            )
        if not rollout.continue_training:
            self._finish_step(log_interval)
            return rollout
        self._rollout = OpenRollout()
        return RolloutReturn(
            steps * env.num_envs + rollout.episode_timesteps, episodes + rollout.n_episodes, rollout.continue_training
        )

    def _begin_step(self, buffer_actions: np.ndarray) -> None:
        """:param buffer_actions: the actions that are taken next, as they will be stored"""
        self._open_actions = buffer_actions
        if self._vec_normalize_env is not None:
            # Without norm_obs it has no obs_rms
            normalizer = self._vec_normalize_env
            self._normalizer_before = copy.deepcopy((getattr(normalizer, "obs_rms", None), normalizer.ret_rms))

    def _made_step(self) -> dict[str, Any] | None:
        """:return: the step that the environments have made and that is not stored yet; None if there is none"""
        if self._rollout.step is not None:
            return self._rollout.step
        if self._open_actions is None or self._callback is None:
            return None
        known = self._callback.locals
        if known.get("buffer_actions") is not self._open_actions:
            return None  # the environments are in the middle of it
        infos = [{key: info[key] for key in STEP_INFOS if key in info} for info in known["infos"]]
        names = {"buffer_action": "buffer_actions", "new_obs": "new_obs", "reward": "rewards", "dones": "dones"}
        return {**{name: known[local] for name, local in names.items()}, "infos": infos}

    def _finish_step(self, log_interval: int | None) -> None:
        """What ``collect_rollouts`` does with a step after its callback."""
        step = self._made_step()
        assert step is not None and self.replay_buffer is not None
        if self._rollout.step is not None:
            self._last_search = self._rollout.search
        self._rollout.step, self._rollout.search = None, None
        self._update_info_buffer(step["infos"], step["dones"])
        self._store_transition(self.replay_buffer, **step)
        self._update_current_progress_remaining(self.num_timesteps, self._total_timesteps)
        self._on_step()
        for _ in range(int(np.sum(step["dones"]))):
            self._episode_num += 1
            if log_interval is not None and self._episode_num % log_interval == 0:
                self.dump_logs()

    def _store_transition(
        self,
        replay_buffer: ReplayBuffer,
        buffer_action: np.ndarray,
        new_obs: np.ndarray | dict[str, np.ndarray],
        reward: np.ndarray,
        dones: np.ndarray,
        infos: list[dict[str, Any]],
    ) -> None:
        """As in SB3. :raises ValueError: NaN or infinite values of an environment"""
        try:
            if (normalizer := self._vec_normalize_env) is None:
                check_transition(new_obs, reward, dones, infos, self.num_timesteps)
            else:
                # One NaN is in the means by now, and makes everything that is normalised NaN
                original = normalizer.get_original_obs(), normalizer.get_original_reward()
                check_transition(*original, dones, infos, self.num_timesteps)
            super()._store_transition(replay_buffer, buffer_action, new_obs, reward, dones, infos)
        except BaseException:
            self._last_obs = None  # the episodes cannot go on after a step that is not there
            self._open_actions = None
            raise
        self._open_actions = None
        self._rollout.steps += 1
        self._rollout.episodes += int(np.sum(dones))


def _finite(normalizer: VecNormalize) -> bool:
    """:return: whether all means and variances are finite"""
    observations = getattr(normalizer, "obs_rms", None)
    parts = [*observations.values()] if isinstance(observations, dict) else [observations]
    numbers = [x for part in [*parts, normalizer.ret_rms] if part is not None for x in (part.mean, part.var)]
    return all(np.isfinite(x).all() for x in numbers)
