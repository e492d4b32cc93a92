"""Encodes clips: `python tools/encode_videos.py --weights DIR --clips DIR --out DIR`.

Clips lie in a folder with their captions: clip.mp4 and clip.txt, or captions.jsonl or captions.csv
with `file` and `caption`. Their first frames become latents of the autoencoder. What is cut short
goes on with the same command; --process 0/4 to 3/4 share the work.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from hfjax.data import command

NAME = "encode_videos"


def main(argv: list[str] | None = None) -> int:
  """Command line; the exit status."""
  argv = sys.argv[1:] if argv is None else argv
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  flag = parser.add_argument
  flag("--weights", required=True, metavar="DIR", help="folder, repository, or random:NAME")
  flag("--clips", metavar="DIR", help="folder of clips with captions")
  flag("--shapes", type=int, metavar="N", help="instead, so many clips of the shapes world")
  flag("--split", choices=("train", "held_out"), default="train", help="of the shapes world")
  flag("--seed", type=int, default=0, help="of the shapes world")
  flag("--spins", type=float, default=0.0, metavar="SHARE",
       help="of clips of the shapes world in which something must spin")  # fmt: skip
  flag("--batch", type=int, default=8, help="clips of the shapes world that are encoded at once")
  flag("--workers", type=int, default=1, help="threads that draw the shapes world")
  flag("--frames", type=int, default=81, help="frames of each clip: 1 and a multiple of 4")
  flag("--size", default="832x480", help="columns and rows of pixels, multiples of 8")
  flag("--fps", default="16", help="frames per second that are taken")
  flag("--vae", choices=("full", "tiny"), default="full", help="autoencoder")
  flag("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
  command.add_flags(parser)
  args = parser.parse_args(argv)

  def act():
    from hfjax import pipeline
    from hfjax.data import contexts, shapes, videos
    from hfjax.data.rejects import DataError, Rejects

    options = command.options(args, NAME, argv, "clips")
    if (args.clips is None) == (args.shapes is None):
      raise DataError("Give either --clips DIR or --shapes N.")
    rejects = Rejects(args.on_bad)
    clips = [] if args.clips is None else videos.find(args.clips, rejects.add)
    autoencoder = pipeline.load_autoencoder(args.weights, args.vae, args.dtype)
    model = f"{contexts.fingerprint(autoencoder.params)} {args.dtype}"
    if args.shapes is not None:
      source = shapes.Shapes(args.split, args.shapes, args.seed, args.frames, spins=args.spins)
      return videos.write_pixels(
        args.out, source, autoencoder, batch=args.batch, workers=args.workers, model=model,
        **options,
      )  # fmt: skip
    written = videos.write(
      args.out, args.clips, clips, autoencoder, frames=args.frames, size=command.size(args.size),
      fps=args.fps, model=model, **options,
    )  # fmt: skip
    written.rejects.merge(rejects.to_json())
    return written

  return command.run(NAME, act)


if __name__ == "__main__":
  sys.exit(main())
