"""`python -m tidepool.deploy` is the command line."""

from .cli import main

main()
