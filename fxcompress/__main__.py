"""`python -m fxcompress`: the command line."""

from fxcompress.cli import main

if __name__ == "__main__":
    main()
