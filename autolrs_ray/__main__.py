"""The command `autolrs`, also as `python -m autolrs_ray`; where the extra "tune" is not installed, it says so."""

from __future__ import annotations

import sys

from autolrs_ray import INSTALL_TUNE, lacks_tune


def main() -> None:
    """Run the command line in `sys.argv`. Exits with status 1 and one line on stderr where a package is missing."""
    try:
        from autolrs_ray.cli import app

        app()
    except ModuleNotFoundError as error:
        if not lacks_tune(error):
            raise
        sys.exit(f"autolrs: {error.name} is not installed: {INSTALL_TUNE}")


if __name__ == "__main__":
    main()
