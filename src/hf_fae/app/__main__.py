"""`python -m hf_fae.app`. Copied as `app.py`, it is the code of a Hugging Face Space: docs/guides/web-demo.md."""

from hf_fae.app import main


if __name__ == "__main__":
    main()
