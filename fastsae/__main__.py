"""`python -m fastsae` is `fastsae`."""

from fastsae.cli import main

if __name__ == "__main__":
    main()
