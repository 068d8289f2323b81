"""The command line under its former name: `python -m harmonylib.cli` and `from harmonylib.cli import main` go on."""

from .tools.cli import main

if __name__ == "__main__":
    main()
