"""The command line: arguments -> settings -> one call; prints results and exit codes.

Exit codes: 0 done; 1 the hub (or a check) said no; 2 wrong usage or settings; 3 no hub or no bus there.
"""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point of `hubpeer`."""
    try:
        from hubpeer.cli.commands import cli
    except ModuleNotFoundError as exc:
        if (exc.name or "").startswith("hubpeer"):
            raise
        print(f"the command line needs {exc.name}: pip install 'hubpeer[hub]'", file=sys.stderr)
        raise SystemExit(2) from None
    cli()
