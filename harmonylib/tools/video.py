"""Video files as folders of frames, and back. OpenCV reads and writes them: pictures alone, without sound."""

import contextlib
import shutil
import tempfile
from pathlib import Path

import cv2

from ..core.decoding import MASK_THRESHOLD, pictures_in
from ..core.errors import HarmonyError
from ..core.files import atomic_path, natural
from ..core.images import write_image

CODECS = {".mkv": "FFV1", ".avi": "FFV1", ".mp4": "mp4v", ".mov": "mp4v"}  # FFV1 is lossless
VIDEOS = (*CODECS, ".webm", ".m4v")


def is_video(path) -> bool:
    return Path(path).suffix.lower() in VIDEOS


@contextlib.contextmanager
def as_folders(composite, mask, output, force: bool = False):
    """Yield folders of frames, of masks and for the results in place of a video, its masks and the output.

    mask: a video, or a folder of one picture a frame in the order of the numbers in their names. A video as output is
    written at the end. Raises HarmonyError for an unreadable video, masks of another number, an output that exists.
    """
    output = Path(output)
    if is_video(output) and (output.suffix.lower() not in CODECS or (output.exists() and not force)):
        raise HarmonyError(f"{output}: exists already (add --force), or is none of {' '.join(CODECS)}")
    with tempfile.TemporaryDirectory() as root:
        frames, masks, results = (Path(root, name) for name in ("frames", "masks", "results"))
        count, rate = unpack(composite, frames)
        if is_video(mask):
            found, _ = unpack(mask, masks, mask=True)
        else:
            listed = sorted(pictures_in(mask)[0], key=natural) if Path(mask).is_dir() else []
            masks.mkdir()
            for number, path in enumerate(listed):
                shutil.copyfile(path, masks / f"{number:06d}{path.suffix}")
            found = len(listed)
        if found != count:
            raise HarmonyError(f"{mask}: {found} masks for {count} frames of {composite}; give one a frame")
        yield frames, masks, results if is_video(output) else output
        if is_video(output):
            pack(results, output, rate)


def unpack(video, folder: Path, mask: bool = False) -> tuple[int, float]:
    """(number of frames, frames a second) of a video, written as folder/000000.png and so on; a mask is cut at 127."""
    reader, count = cv2.VideoCapture(str(video)), 0
    while (frame := reader.read()[1]) is not None:
        pixels = frame.max(-1) > MASK_THRESHOLD if mask else frame[..., ::-1]
        write_image(folder / f"{count:06d}.png", pixels)
        count += 1
    if not count:
        raise HarmonyError(f"{video}: not a readable video; replace or convert it")
    return count, reader.get(cv2.CAP_PROP_FPS) or 25.0


def pack(folder: Path, video: Path, rate: float) -> None:
    """Write a folder's pictures as a video. Raises HarmonyError where it cannot be made."""
    paths = sorted(folder.iterdir())
    height, width = cv2.imread(str(paths[0])).shape[:2]
    with atomic_path(video) as temporary:
        codec = cv2.VideoWriter.fourcc(*CODECS[video.suffix.lower()])
        writer = cv2.VideoWriter(str(temporary), codec, rate, (width, height))
        if not writer.isOpened():
            raise HarmonyError(f"{video}: cannot be written here; name a folder for the frames")
        for path in paths:
            writer.write(cv2.imread(str(path)))
        writer.release()
