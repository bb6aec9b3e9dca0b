"""``python -m samdetr`` is the command ``samdetr``."""

from samdetr.cli import main

if __name__ == "__main__":
    main()
