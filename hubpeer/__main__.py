"""`python -m hubpeer` is `hubpeer`."""

from hubpeer.cli import main

main()
