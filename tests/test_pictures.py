"""Images, contact sheets, GIFs and previews written and read back."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from hfjax.video import (
  Preview,
  VideoError,
  contact_sheet,
  read_image,
  read_video,
  write_gif,
  write_image,
)
from tests.test_video import halves, moving, noise, numbers

# Images


@pytest.mark.parametrize("turn", range(1, 9))
def test_images_stand_upright(tmp_path, turn):
  picture = halves(64, 32)
  picture[:8] = (0, 255, 0)
  stored = {
    1: picture, 2: picture[:, ::-1], 3: picture[::-1, ::-1], 4: picture[::-1],
    5: picture.transpose(1, 0, 2), 6: np.rot90(picture), 7: picture[::-1, ::-1].transpose(1, 0, 2),
    8: np.rot90(picture, -1),
  }[turn]  # fmt: skip
  exif = Image.Exif()
  exif[0x0112] = turn
  path = tmp_path / "a.jpg"
  image = Image.fromarray(np.ascontiguousarray(stored))
  image.save(path, quality=100, subsampling=0, exif=exif)
  got = read_image(path)
  assert got.shape == picture.shape
  assert np.abs(got.astype(int) - picture).mean() < 4


def test_all_kinds_of_images_become_rgb(tmp_path):
  picture = halves(64, 32)
  image = Image.fromarray(picture)
  clear = image.convert("RGBA")
  clear.putalpha(Image.fromarray(np.where(picture[..., 0] == 0, 0, 255).astype(np.uint8)))
  white = np.where(picture[..., :1] == 0, 255, picture)
  grey = np.arange(0, 65536, 32, np.uint16).reshape(32, 64)
  shades = np.repeat((grey // 256).astype(np.uint8)[..., None], 3, 2)
  for name, made, want in [
    ("rgb.png", image, picture),
    ("palette.png", image.convert("P", palette=Image.Palette.ADAPTIVE), picture),
    ("palette.gif", image, picture),
    ("bits.png", image.convert("L").convert("1"), None),
    ("grey.png", image.convert("L"), np.asarray(image.convert("L").convert("RGB"))),
    ("cmyk.tiff", image.convert("CMYK"), picture),
    ("clear.png", clear, white),
    ("clear.webp", clear, None),
    ("deep.png", Image.fromarray(grey), shades),
    ("deep.tiff", Image.fromarray(grey), shades),
    ("deep.pgm", Image.fromarray(grey), shades),
  ]:
    made.save(tmp_path / name)
    got = read_image(tmp_path / name)
    assert got.shape == (32, 64, 3) and got.dtype == np.uint8
    if want is not None:
      np.testing.assert_allclose(got, want, atol=1, err_msg=name)
  keyed = image.convert("P", palette=Image.Palette.ADAPTIVE)
  keyed.save(tmp_path / "keyed.png", transparency=keyed.getpixel((0, 0)))
  np.testing.assert_array_equal(read_image(tmp_path / "keyed.png")[0, 0], 255)
  assert read_image(tmp_path / "rgb.png", size=(16, 16)).shape == (16, 16, 3)


def test_what_no_image_is(tmp_path):
  Image.new("RGB", (64, 15)).save(tmp_path / "tiny.png")
  Image.fromarray(noise(1)[0]).save(tmp_path / "whole.png")
  (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:3000])
  Image.fromarray(np.zeros((32, 32), np.float32)).save(tmp_path / "float.tiff")
  (tmp_path / "text.png").write_text("not an image")
  (tmp_path / "empty.png").touch()
  for name, match in {
    "tiny.png": "is 64 x 15 pixels; give an image of at least 16 x 16",
    "cut.png": "cannot be read as an image",
    "float.tiff": "cannot be read as an image",
    "text.png": "cannot be read as an image",
    "empty.png": "cannot be read as an image",
    "missing.png": "is not there",
    ".": "is a folder",
  }.items():
    with pytest.raises(VideoError, match=match):
      read_image(tmp_path / name)


def test_too_many_pixels_are_a_sentence(tmp_path, monkeypatch):
  write_image(tmp_path / "a.png", halves(64, 32))
  monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
  with pytest.raises(VideoError, match="too many pixels"):
    read_image(tmp_path / "a.png")


def test_png_is_exact(tmp_path):
  picture = noise(1)[0]
  write_image(tmp_path / "a.png", picture)
  np.testing.assert_array_equal(read_image(tmp_path / "a.png"), picture)
  with pytest.raises(VideoError, match=r"does not end in \.png"):
    write_image(tmp_path / "a.jpg", picture)
  with pytest.raises(ValueError, match="give uint8"):
    write_image(tmp_path / "b.png", picture / 255.0)


# Previews


def test_contact_sheets_show_first_to_last():
  sheet = contact_sheet(moving(61), columns=3, rows=2, width=200)
  assert sheet.shape == (2 + 2 * (48 + 2), 200, 3)
  middles = sheet[2 + 24 :: 50, 2 + 32 :: 66][:, :, 0]
  np.testing.assert_array_equal((middles.astype(int) - 10) // 3, [[0, 12, 24], [36, 48, 60]])
  assert contact_sheet(moving(2), width=200).shape[0] == 2 + 73 + 2  # side by side, one row
  with pytest.raises(ValueError, match="got no frames"):
    contact_sheet(moving(0))
  with pytest.raises(ValueError, match="do not fit"):
    contact_sheet(moving(100), columns=100, rows=1, width=120)


@pytest.mark.parametrize(("fps", "rate"), [(8, 8), (12.5, 12.5), (50, 50), (60, 50)])
def test_gifs(tmp_path, fps, rate):
  frames = np.stack([np.roll(halves(64, 32), 4 * i, axis=1) for i in range(10)])
  path = tmp_path / "a.gif"
  write_gif(path, frames, fps)
  with Image.open(path) as image:
    assert image.n_frames == 10 and image.info["loop"] == 0
    total = 0
    for i in range(10):
      image.seek(i)
      total += image.info["duration"]
      np.testing.assert_allclose(np.asarray(image.convert("RGB")), frames[i], atol=8)
  assert total == pytest.approx(10_000 / rate, abs=20)
  with pytest.raises(ValueError, match="got no frames"):
    write_gif(path, frames[:0], fps)
  with pytest.raises(VideoError, match=r"does not end in \.gif"):
    write_gif(tmp_path / "a.mp4", frames, fps)


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(
  capacity=st.integers(2, 9),
  chunks=st.lists(st.integers(0, 40), max_size=12),
)
def test_previews_are_evenly_spaced(capacity, chunks):
  preview, count = Preview(capacity, width=2), 0
  shades = np.arange(sum(chunks), dtype=np.uint16)
  stream = np.stack([shades // 256, shades % 256, 0 * shades], -1).astype(np.uint8)
  stream = np.broadcast_to(stream[:, None, None], (len(shades), 2, 2, 3))
  for length in chunks:
    preview.add(stream[count : count + length])
    count += length
    kept = preview.numbers
    assert len(kept) <= capacity
    assert kept == list(range(0, count, preview.stride))
    assert len(kept) >= min(count, capacity / 2)
    if count:
      np.testing.assert_array_equal(preview.frames, stream[kept])


def test_previews_are_written(tmp_path):
  preview = Preview(capacity=8, width=32)
  with pytest.raises(ValueError, match="has got no frames"):
    preview.sheet()
  for i in range(10):
    preview.add(moving(7, 7 * i))
  assert preview.frames.shape == (5, 24, 32, 3) and preview.stride == 16
  assert numbers(preview.frames) == [0, 16, 32, 48, 64]
  png, gif = preview.write(tmp_path / "v1.5-0", fps=16)
  assert (png.name, gif.name) == ("v1.5-0.png", "v1.5-0.gif")
  assert read_image(png).shape[1] == 4 * 32  # not made larger
  clip = read_video(gif)
  assert len(clip.frames) == 5 and 7 < clip.fps < 9
  with pytest.raises(ValueError, match="give 2 and 1 or more"):
    Preview(capacity=1)
