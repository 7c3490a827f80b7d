"""Train a recipe on 1..N processes.

    torchrun --nproc_per_node=N launch/pretrain.py RECIPE [key=value ...]

Also `fastmoco pretrain` for one process and `torchrun -m fastmoco.pretrain` without a clone.
"""

import sys

from fastmoco.pretrain import main

if __name__ == "__main__":
    sys.exit(main())
