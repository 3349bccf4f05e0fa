"""`python -m bestrq2`, the same as the command `bestrq2`."""

from bestrq2.cli import main

main()
