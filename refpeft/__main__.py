"""`python -m refpeft` is `refpeft`."""

from refpeft.cli import main

if __name__ == "__main__":
    main(prog_name="refpeft")
