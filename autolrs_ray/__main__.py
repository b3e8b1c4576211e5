"""The command `autolrs`, also as `python -m autolrs_ray`; where the extra "tune" is not installed, it says so."""

from __future__ import annotations

import io
import sys

from autolrs_ray import INSTALL_TUNE, lacks_tune


def main() -> None:
    """Run the command line in `sys.argv`. Exits with status 1 and one line on stderr where a package is missing, and where
    standard output cannot be written."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")  # names of folders that are not UTF-8
    try:
        from autolrs_ray.cli import app

        app()
    except ModuleNotFoundError as error:
        if not lacks_tune(error):
            raise
        sys.exit(f"autolrs: {error.name} is not installed: {INSTALL_TUNE}")
    except OSError as error:
        sys.exit(f"autolrs: cannot write to standard output: {error}")


if __name__ == "__main__":
    main()
