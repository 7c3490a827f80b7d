"""`python -m fastmoco` is `fastmoco`."""

from fastmoco.cli import main

if __name__ == "__main__":
    main()
