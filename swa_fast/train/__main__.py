"""``python -m swa_fast.train OPTIONS`` is ``swa-fast train OPTIONS``."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]], command=["python", "-m", "swa_fast.train"]))
