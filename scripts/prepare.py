"""`vista prepare` for those who launch from a checkout: python scripts/prepare.py [KEY=VALUE ...]."""

import sys

from vista.cli import main

if __name__ == "__main__":
    sys.exit(main(["prepare", *sys.argv[1:]]))
