"""`python -m hf_fae.cli`, as `accelerate launch -m hf_fae.cli` runs it."""

from . import main


if __name__ == "__main__":
    main()
