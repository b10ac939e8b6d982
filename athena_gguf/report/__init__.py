"""What a file is and how good it is: `inspect` and `eval`."""
