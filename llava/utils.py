"""Small helpers under the names of LLaVA's and LLaVA-NeXT's `llava.utils`; none of our own code needs them.

Light: torch and the video readers are loaded by the functions that use them.
"""

from __future__ import annotations

import json
import logging
import os
import urllib.request
from logging.handlers import TimedRotatingFileHandler
from typing import TYPE_CHECKING, Any

from llava.constants import LOGDIR

if TYPE_CHECKING:
    import numpy as np

#: what a chat page shows instead of an answer
server_error_msg = "**The server is busy or cannot be reached. Please try again.**"
moderation_msg = "This text is against the rules of content moderation. Please try another one."

_MODERATION_URL = "https://api.openai.com/v1/moderations"


def disable_torch_init() -> None:
    """Do nothing. Checkpoints are loaded without random weights being drawn first, so there is nothing to switch off.

    (The official function replaces ``reset_parameters`` of torch's Linear and LayerNorm in the whole process.)
    """


# -- printing ----------------------------------------------------------------------------------------------------------


def _rank() -> int | None:
    """Number of this process in a group of torch.distributed; None outside of one."""
    import torch.distributed as dist

    return dist.get_rank() if dist.is_available() and dist.is_initialized() else None


def rank0_print(*args: Any) -> None:
    """Print in the first process only, with its rank in front; outside of a group print as ever."""
    if _rank() in (None, 0):
        rank_print(*args)


def rank_print(*args: Any) -> None:
    """Print with the rank of the process in front; outside of a group print as ever."""
    rank = _rank()
    print(*(args if rank is None else (f"Rank {rank}:", *args)))


def build_logger(logger_name: str, logger_filename: str) -> logging.Logger:
    """A logger that writes to the terminal and to a file in ``llava.constants.LOGDIR``, which is renewed every day.

    Asked for again, the same logger is returned. Unlike the official one it leaves ``sys.stdout`` and ``sys.stderr``
    alone.
    """
    logger = logging.getLogger(logger_name)
    logger.setLevel(logging.INFO)
    if not logger.handlers:
        os.makedirs(LOGDIR, exist_ok=True)
        path = os.path.join(LOGDIR, logger_filename)
        form = logging.Formatter("%(asctime)s | %(levelname)s | %(name)s | %(message)s", "%Y-%m-%d %H:%M:%S")
        handlers = logging.StreamHandler(), TimedRotatingFileHandler(path, when="D", utc=True, encoding="utf-8")
        for handler in handlers:
            handler.setFormatter(form)
            logger.addHandler(handler)
        logger.propagate = False
    return logger


def pretty_print_semaphore(semaphore: Any) -> str:
    """An asyncio semaphore in a line of a log; "None" where there is none."""
    if semaphore is None:
        return "None"
    return f"Semaphore(value={semaphore._value}, locked={semaphore.locked()})"


# -- moderation --------------------------------------------------------------------------------------------------------


def violates_moderation(text: str) -> bool:
    """Whether OpenAI's moderation endpoint flags a text. Sends the text there, with the key in OPENAI_API_KEY.

    Raises:
        RuntimeError: no key. OSError: the endpoint cannot be reached, or refuses. (The official function takes both
            for a no.)
    """
    key = os.environ.get("OPENAI_API_KEY")
    if not key:
        raise RuntimeError(
            "violates_moderation asks OpenAI's endpoint: set OPENAI_API_KEY, or use a filter of your own"
        )
    body = json.dumps({"input": text.replace("\n", "")}).encode()
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    with urllib.request.urlopen(urllib.request.Request(_MODERATION_URL, body, headers), timeout=5) as answer:
        return bool(json.load(answer)["results"][0]["flagged"])


# -- videos ------------------------------------------------------------------------------------------------------------


def process_video_with_decord(video_file: str | os.PathLike[str], data_args: Any) -> tuple[np.ndarray, float, str, int]:
    """Frames of a video as LLaVA-Video samples them (:func:`llava.video_utils.sample_frames`), read by decord.

    Args:
        data_args: reads ``video_fps``, ``frames_upbound`` and, if there, ``force_sample``.
    Returns:
        frames uint8 [T, height, width, 3], seconds of the video, times of the frames ("0.00s,1.00s"), T.
    Raises:
        OSError: the video cannot be read. ValueError: a rate that is not positive.
    """
    video = _sampled(video_file, data_args, "decord", getattr(data_args, "force_sample", False))
    return video.frames, video.sample.video_time, video.sample.frame_time, len(video.frames)


def process_video_with_pyav(video_file: str | os.PathLike[str], data_args: Any) -> np.ndarray:
    """As :func:`process_video_with_decord`, read by PyAV and without ``force_sample``; the frames alone.

    The official function takes the frame rate from the time of the last frame; this one believes the file, so that both
    readers choose the same frames.
    """
    return _sampled(video_file, data_args, "pyav", False).frames


def _sampled(path: str | os.PathLike[str], data_args: Any, backend: str, force: bool) -> Any:
    from llava.video_utils import load_video, sample_frames

    fps, bound = data_args.video_fps, data_args.frames_upbound
    return load_video(path, backend=backend, choose=lambda total, rate: sample_frames(total, rate, fps, bound, force))
