"""``python -m swa_fast.train OPTIONS`` is ``swa-fast train OPTIONS``."""

import sys

from .cli import main
from .distributed import World

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]], command=World.command("swa_fast.train")))
