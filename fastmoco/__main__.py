"""`python -m fastmoco`: the command line where its script is not on the PATH."""

from fastmoco.cli import main

if __name__ == "__main__":
    main()
