"""`python -m MMCLIP`, the same as the command `mmclip`."""

import sys

from .cli import main


if __name__ == "__main__":
    sys.exit(main())
