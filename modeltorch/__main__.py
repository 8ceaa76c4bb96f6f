"""`python -m modeltorch` is the command `modeltorch`."""

from modeltorch.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
