"""`python -m verbtune` is `verbtune`."""

from .cli import main

main()
