"""`python -m edge.cli`: the command line without its script."""

from edge.cli.main import main

main()
