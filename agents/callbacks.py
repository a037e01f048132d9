"""What is recorded while an agent learns: the trace, TensorBoard, a progress bar."""

import time
from pathlib import Path

import numpy as np
import torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Image, TensorBoardOutputFormat
from tqdm import tqdm

from agents.trace import Episode, append_episode
from arq_env.bitwidths import MAX_BITS, MIN_BITS, Bits, free_layers
from arq_env.errors import ArqError
from arq_env.render import render_rgb

#: An action this close to -1 or 1 counts as being at the bounds.
AT_BOUNDS = 0.99
#: Episodes between two pictures of the map in TensorBoard.
PICTURE_EVERY = 10


class SearchRecorder(BaseCallback):
    """Writes one trace line and one set of TensorBoard values an episode.

    :param path: of the trace
    :param episodes: to run in all
    :param known: episodes already in the trace, which are replayed but not written again
    :param progress: show a bar
    """

    def __init__(self, path: Path, episodes: int, known: list[Episode] = (), *, progress: bool = True):
        super().__init__()
        self.path, self.episodes, self.known, self.progress = path, episodes, list(known), progress
        self.done: list[Episode] = []

    def _on_training_start(self) -> None:
        self.layers = self.training_env.get_attr("layers")[0]
        self._start, self._before = time.perf_counter(), self.known[-1].seconds if self.known else 0.0
        self._maps, self._actions = set(), []
        self._bar = tqdm(total=self.episodes, unit="episode", disable=not self.progress)

    def _on_step(self) -> bool:
        self._actions.append(self.locals["actions"][0])
        if self.locals["dones"][0]:
            self._on_episode(self.locals["infos"][0])
        return True

    def _on_episode(self, info) -> None:
        bit_widths = {name: Bits(*bits) for name, bits in info["bit_widths"].items()}
        self._maps.add(tuple(bit_widths.items()))
        measured = (
            "bops_fraction",
            "acr",
            "clean_accuracy",
            "certified_accuracy",
            "reference_acr",
            "evaluation_seconds",
        )
        episode = Episode(
            episode=len(self.done) + 1,
            reward=float(self.locals["rewards"][0]),
            bit_widths=bit_widths,
            evaluations=len(self._maps),
            seconds=self._before + time.perf_counter() - self._start,
            **{key: info[key] for key in measured},
        )
        self.done.append(episode)
        if len(self.done) > len(self.known):
            append_episode(self.path, episode)
        elif not episode.same_outcome(self.known[len(self.done) - 1]):
            raise ArqError(
                f"episode {episode.episode} did not come out as {self.path} says, so other versions or another machine wrote it: "
                "choose another --output"
            )
        self._log(episode)
        self._actions.clear()
        best = max(self.done, key=lambda done: done.reward)
        self._bar.update()
        self._bar.set_postfix(reward=f"{episode.reward:.3f}", best=f"{best.reward:.3f}", refresh=False)

    def _log(self, episode: Episode) -> None:
        record = self.logger.record
        for key in ("reward", "acr", "clean_accuracy", "certified_accuracy", "bops_fraction", "evaluation_seconds"):
            record(f"arq/{key}", getattr(episode, key))
        record("arq/acr_over_fp32", episode.acr / episode.reference_acr)
        record("arq/best_reward", max(done.reward for done in self.done))
        record("arq/actions_at_bounds", float((np.abs(self._actions) > AT_BOUNDS).mean()))
        if episode.episode % PICTURE_EVERY == 0 or episode.episode in (1, self.episodes):
            record(
                "arq/map",
                Image(render_rgb(self.layers, episode.bit_widths), "HWC"),
                exclude=("stdout", "csv", "json", "log"),
            )
        bits = [bit for layer in free_layers(self.layers) for bit in episode.bit_widths[layer.name]]
        for output in self.logger.output_formats:
            if isinstance(output, TensorBoardOutputFormat):  # SB3's logger has no histogram of integers with its own bins
                edges = torch.arange(MIN_BITS, MAX_BITS + 2) - 0.5
                output.writer.add_histogram("arq/bits", torch.tensor(bits), self.num_timesteps, bins=edges)

    def _on_training_end(self) -> None:
        self._bar.close()
