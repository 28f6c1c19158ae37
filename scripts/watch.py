"""`vista watch` for those who launch from a checkout: python scripts/watch.py [KEY=VALUE ...]."""

import sys

from vista.cli import main

if __name__ == "__main__":
    sys.exit(main(["watch", *sys.argv[1:]]))
