"""``python -m respiro`` is the command ``respiro``."""

from respiro.cli import main

if __name__ == "__main__":
    main()
