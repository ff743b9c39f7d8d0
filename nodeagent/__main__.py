"""``python -m nodeagent`` and the console script."""

import sys

from nodeagent import cli


def main() -> None:
    sys.exit(cli.main())


if __name__ == "__main__":
    main()
