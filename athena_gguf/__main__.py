"""`python -m athena_gguf` is the command line."""

from athena_gguf.cli import main

if __name__ == "__main__":
    main()
