"""``python -m qrosa``: the ``qrosa`` command where its script is not on the path."""

from qrosa.cli.main import main

if __name__ == "__main__":
    main()
