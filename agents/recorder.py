"""What every search leaves behind while it runs: the trace, TensorBoard's curves, a progress bar."""

import shutil
import time
from pathlib import Path

import torch
from stable_baselines3.common.logger import Image, Logger, TensorBoardOutputFormat, configure
from tqdm import tqdm

from agents.trace import Episode, append_episode, count_episodes
from arq_env.bitwidths import MAX_BITS, MIN_BITS, Bits, free_layers
from arq_env.errors import ArqError
from arq_env.files import drop_partial_line, lock
from arq_env.layers import Layer
from arq_env.render import render_rgb

#: Episodes between two pictures of the map in TensorBoard.
PICTURE_EVERY = 10


class Recorder:
    """Turns each episode's outcome into a line of the trace and a row of TensorBoard values; a context manager.

    While it is open no other process can record into the same folder.

    :param folder: of the run; it holds ``config.json``, and ``trace.jsonl`` and ``tensorboard/`` in it are written
    :param layers: of the network
    :param episodes: to run in all
    :param known: episodes already in the trace, which are replayed but not written again
    :param progress: show a bar
    :raises ArqError: when another process records into the folder, or has done so since ``known`` was read
    """

    def __init__(self, folder: Path, layers: tuple[Layer, ...], episodes: int, known: list[Episode] = (), *, progress: bool = True):
        self.path, self.layers, self.episodes, self.known = folder / "trace.jsonl", layers, episodes, list(known)
        self.done: list[Episode] = []
        self._lock = lock(folder / "config.json")  # before anything in the folder is touched
        if count_episodes(self.path) != len(self.known):
            self._lock.close()
            raise ArqError(f"another process has just written {self.path}: run the same command again")
        drop_partial_line(self.path)
        shutil.rmtree(folder / "tensorboard", ignore_errors=True)  # replaying writes the same curves again
        self.logger: Logger = configure(str(folder / "tensorboard"), ["tensorboard"])
        self._maps = set()
        self._start, self._before = time.perf_counter(), self.known[-1].seconds if self.known else 0.0
        self._bar = tqdm(total=episodes, unit="episode", disable=not progress)

    def add(self, info: dict) -> Episode:
        """Record an episode from the ``info`` of its last step.

        The values for TensorBoard are written when the logger's ``dump`` is called.

        :raises ArqError: when the trace holds this episode with another outcome, or cannot be written
        """
        bit_widths = {name: Bits(*bits) for name, bits in info["bit_widths"].items()}
        self._maps.add(tuple(bit_widths.items()))
        told = ("reward", "bops_fraction", "acr", "clean_accuracy", "certified_accuracy", "reference_acr", "evaluation_seconds")
        episode = Episode(
            episode=len(self.done) + 1,
            bit_widths=bit_widths,
            evaluations=len(self._maps),
            seconds=self._before + time.perf_counter() - self._start,
            **{key: info[key] for key in told},
        )
        self.done.append(episode)
        if len(self.done) > len(self.known):
            append_episode(self.path, episode)
        elif not episode.same_outcome(self.known[len(self.done) - 1]):
            raise ArqError(
                f"episode {episode.episode} did not come out as {self.path} says, so other versions or another machine wrote it: "
                "choose another --output"
            )
        best = max(done.reward for done in self.done)
        self._log(episode, best)
        self._bar.update()
        self._bar.set_postfix(reward=f"{episode.reward:.3f}", best=f"{best:.3f}", refresh=False)
        return episode

    def _log(self, episode: Episode, best: float) -> None:
        record = self.logger.record
        for key in ("reward", "acr", "clean_accuracy", "certified_accuracy", "bops_fraction", "evaluation_seconds"):
            record(f"arq/{key}", getattr(episode, key))
        record("arq/acr_over_fp32", episode.acr / episode.reference_acr)
        record("arq/best_reward", best)
        if episode.episode % PICTURE_EVERY == 0 or episode.episode in (1, self.episodes):
            picture = Image(render_rgb(self.layers, episode.bit_widths), "HWC")
            record("arq/map", picture, exclude=("stdout", "csv", "json", "log"))
        free = free_layers(self.layers)
        bits = [bit for layer in free for bit in episode.bit_widths[layer.name]]
        for output in self.logger.output_formats:
            if isinstance(output, TensorBoardOutputFormat):  # SB3's logger has no histogram of integers with its own bins
                edges = torch.arange(MIN_BITS, MAX_BITS + 2) - 0.5
                output.writer.add_histogram("arq/bits", torch.tensor(bits), episode.episode * len(free), bins=edges)

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, *_) -> None:
        self._bar.close()
        self.logger.close()
        self._lock.close()
