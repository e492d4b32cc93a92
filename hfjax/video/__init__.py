"""Videos, images, contact sheets and GIFs; frames are uint8 arrays `[t y x 3]`."""

from hfjax.models.clips import to_uint8
from hfjax.video.pictures import contact_sheet, read_image, write_gif, write_image
from hfjax.video.pixels import VideoError
from hfjax.video.preview import Preview
from hfjax.video.reader import Clip, VideoReader, frames_of, read_video
from hfjax.video.writer import VideoWriter

__all__ = [
  "Clip",
  "Preview",
  "VideoError",
  "VideoReader",
  "VideoWriter",
  "contact_sheet",
  "frames_of",
  "read_image",
  "read_video",
  "to_uint8",
  "write_gif",
  "write_image",
]
