"""`python -m convservice.cli`: the console script `convservice` for this very interpreter."""

from convservice.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
