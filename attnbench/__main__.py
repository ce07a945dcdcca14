"""`python -m attnbench`."""

from attnbench.cli.main import main

if __name__ == "__main__":
    main()
