"""What every search leaves behind while it runs: the trace, TensorBoard's curves, a progress bar."""

import contextlib
import json
import shutil
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from stable_baselines3.common.logger import HParam, Logger, TensorBoardOutputFormat
from tqdm import tqdm

from arq_env.bitwidths import MAX_BITS, MIN_BITS, Bits, free_layers
from arq_env.layers import Layer
from arq_env.support.errors import ArqError
from arq_env.support.files import drop_partial_line, lock, read_json
from arq_env.support.render import render_pareto, render_rgb

from .trace import Episode, append_episode, count_episodes

#: Episodes between two pictures of the map in TensorBoard, at least, and pictures of a search, at most (about).
PICTURE_EVERY, PICTURES = 10, 20
#: TensorBoard sorts its sections by name, and the curves of each: these stand in the order in which they are read.
REWARD, CERTIFICATE, BUDGET, MAP, SEARCH, EXPORTED = (
    f"{place}_{name}" for place, name in enumerate(("reward", "certificate", "budget", "map", "search", "exported_map"), start=1)
)
_SHOWN = {
    REWARD: "10 (ACR / ACR of FP32 - 1) of each episode's map, and the highest so far",
    CERTIFICATE: "by the reward's certifier, on images of no test: ACR (mean certified radius), also over FP32's; share of images "
    "that are right, and right with a radius of at least sigma / 2",
    BUDGET: "bit operations of the map as a fraction of FP32's",
    MAP: "the map as a picture, and how many layers have which bits",
    SEARCH: "seconds that an evaluation took; share of an agent's actions at the bounds, where it may be stuck",
    EXPORTED: "at the end: the chosen map, its place among all that were tried, its reward, and that on fresh draws",
    "rollout, time, train": "stable-baselines3's own",
}
#: Shown by TensorBoard under Text.
ABOUT = "\n".join(
    [
        "Every x axis counts episodes: one map tried in each. HPARAMS compares runs: their settings, and what came out.",
        "",
        "| section | shows |",
        "| --- | --- |",
        *(f"| {section} | {what} |" for section, what in _SHOWN.items()),
    ]
)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turn what the block raises where nothing can be written into one sentence.

    :raises ArqError: for any OSError
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise ArqError(f"cannot write {path} ({reason}): make room for it there; the same command then goes on") from error


class EpisodeLogger(Logger):
    """SB3's logger with TensorBoard alone, whose x axis counts episodes, whatever steps it is given.

    :param folder: for TensorBoard's files
    :param done: the episodes so far, a list that grows
    :raises ArqError: when nothing can be written there
    """

    def __init__(self, folder: Path, done: list[Episode]):
        self._folder, self._done, self._hook = folder, done, threading.excepthook
        threading.excepthook = self._in_a_thread
        try:
            with _writing(folder):
                self._tensorboard = TensorBoardOutputFormat(str(folder))
                self._tensorboard.writer.add_text("about", ABOUT, 0)
        except ArqError:
            threading.excepthook = self._hook
            raise
        super().__init__(str(folder), [self._tensorboard])

    def _in_a_thread(self, failed: threading.ExceptHookArgs) -> None:
        """No traceback of TensorBoard's thread for what its next call raises here."""
        if not (isinstance(failed.exc_value, OSError) and type(failed.thread).__module__.startswith("tensorboard.")):
            self._hook(failed)

    def dump(self, step: int = 0) -> None:
        """Write what was recorded, as of the last episode."""
        with _writing(self._folder):
            super().dump(len(self._done))

    def histogram(self, name: str, bits: list[int]) -> None:
        """Write how often each bit-width occurs, in bins of width 1 around the whole numbers.

        Raw, since TensorBoard draws densities and lets the outermost bins end at "min" and "max".
        """
        values, widths = np.array(bits), np.arange(MIN_BITS, MAX_BITS + 1)
        told = {
            "min": min(bits) - 0.5,
            "max": max(bits) + 0.5,
            "num": len(values),
            "sum": int(values.sum()),
            "sum_squares": int((values**2).sum()),
            "bucket_limits": (widths + 0.5).tolist(),
            "bucket_counts": (values[:, None] == widths).sum(0).tolist(),
        }
        with _writing(self._folder):
            self._tensorboard.writer.add_histogram_raw(name, **told, global_step=len(self._done))

    def picture(self, name: str, layers: tuple[Layer, ...], episode: Episode) -> None:
        """Write an episode's map as a picture."""
        title = f"episode {episode.episode}: reward {episode.reward:.3f}, {episode.bops_fraction:.3%} of FP32's bit operations"
        self.image(name, render_rgb(layers, episode.bit_widths, title), episode.episode)

    def image(self, name: str, picture: np.ndarray, step: int) -> None:
        """Write a picture, uint8 [h, w, 3]."""
        with _writing(self._folder):
            self._tensorboard.writer.add_image(name, picture, step, dataformats="HWC")

    def outcome(self, settings: dict[str, bool | float | str], metrics: dict[str, float]) -> None:
        """Write what came out of a run with these settings, for TensorBoard's HPARAMS; not what else is recorded."""
        told = {"hparams": HParam(settings, metrics), **metrics}
        with _writing(self._folder):
            self._tensorboard.write(told, dict.fromkeys(told, ()), len(self._done))

    def close(self) -> None:
        """Write all and close the files."""
        try:
            with _writing(self._folder):
                super().close()
        finally:
            threading.excepthook = self._hook


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

    def __init__(
        self, folder: Path, layers: tuple[Layer, ...], episodes: int, known: Iterable[Episode] = (), *, progress: bool = True
    ):
        self.folder, self.path, self.layers, self.episodes = folder, folder / "trace.jsonl", layers, episodes
        self.known = list(known)
        self.done: list[Episode] = []
        with contextlib.ExitStack() as opened:
            opened.enter_context(lock(folder / "config.json"))  # before anything in the folder is touched
            if count_episodes(self.path) != len(self.known):
                raise ArqError(f"another process has just written {self.path}: run the same command again")
            drop_partial_line(self.path)
            shutil.rmtree(folder / "tensorboard", ignore_errors=True)  # replaying writes the same curves again
            self.logger = EpisodeLogger(folder / "tensorboard", self.done)
            self._opened = opened.pop_all()
        self._maps: set[tuple] = set()
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
        for name, value in (
            (f"{REWARD}/each_episode", episode.reward),
            (f"{REWARD}/highest_so_far", best),
            (f"{CERTIFICATE}/ACR", episode.acr),
            (f"{CERTIFICATE}/ACR_over_FP32", episode.acr / episode.reference_acr),
            (f"{CERTIFICATE}/certified_accuracy", episode.certified_accuracy),
            (f"{CERTIFICATE}/clean_accuracy", episode.clean_accuracy),
            (f"{BUDGET}/BOPs_fraction", episode.bops_fraction),
            (f"{SEARCH}/evaluation_seconds", episode.evaluation_seconds),
        ):
            self.logger.record(name, value)
        every = max(PICTURE_EVERY, self.episodes // PICTURES)
        if episode.episode % every == 0 or episode.episode in (1, self.episodes):
            self.logger.picture(f"{MAP}/map", self.layers, episode)
        chosen = [episode.bit_widths[layer.name] for layer in free_layers(self.layers)]
        self.logger.histogram(f"{MAP}/weight_bits", [bits.weight for bits in chosen])
        self.logger.histogram(f"{MAP}/activation_bits", [bits.activation for bits in chosen])

    def exported(self, episode: Episode, metrics: dict) -> None:
        """Show the map that the search exports, its place among all that were tried, and what came out, in TensorBoard.

        :param metrics: of the map's file
        """
        self.logger.picture(f"{EXPORTED}/map", self.layers, episode)
        ratios = [done.acr / done.reference_acr for done in self.done]
        picture = render_pareto([done.bops_fraction for done in self.done], ratios, episode.episode - 1)
        self.logger.image(f"{EXPORTED}/pareto", picture, episode.episode)
        told = {"reward": metrics["reward"], "fresh_reward": metrics["fresh_reward"], "ACR": metrics["acr"]}
        told |= {"clean_accuracy": metrics["clean_accuracy"], "BOPs_fraction": episode.bops_fraction}
        self.logger.outcome(
            _settings(read_json(self.folder / "config.json")), {f"{EXPORTED}/{name}": value for name, value in told.items()}
        )

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._opened:  # whatever happens, the lock is released
            self._bar.close()
            with contextlib.suppress(ArqError) if kind else contextlib.nullcontext():  # what happened first is told
                self.logger.close()


def _settings(config: dict) -> dict[str, bool | float | str]:
    """What of ``config.json`` a reader compares runs by: the search, the problem, and hyperparameters, nested ones as JSON."""
    problem = {key: config[key] for key in ("env", "algorithm", "seed", "budget", "sigma") if key in config}
    given = {key: value for key, value in (problem | config["hyperparameters"]).items() if value is not None}
    return {key: value if isinstance(value, bool | int | float | str) else json.dumps(value) for key, value in given.items()}
