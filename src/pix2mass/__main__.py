"""The command line as ``python -m pix2mass``."""

from pix2mass.cli import main

if __name__ == "__main__":
    main()
