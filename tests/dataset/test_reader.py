"""Reading more shards than a process may open files."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from PIL import Image
from tars import encoded, write_tar

from fastmoco.pack.adopt import adopt

READ_ALL = """
import resource, sys
from pathlib import Path
import numpy as np
from fastmoco.dataset.reader import Reader
from fastmoco.dataset.shard_set import ConcatShardSets, ShardSet

resource.setrlimit(resource.RLIMIT_NOFILE, (60, 60))
data = ConcatShardSets([ShardSet(Path(sys.argv[1]))])
print(len(Reader(data).fetch(np.arange(len(data)))))
"""


def test_many_shards_under_few_open_files(
    tmp_path: Path, make_picture: Callable[..., Image.Image]
) -> None:
    for number in range(80):
        image = encoded(make_picture(number, (8, 8)))
        write_tar(tmp_path / "set" / f"{number:03d}.tar", [(f"{number:03d}.jpg", image)])
    adopt(tmp_path / "set")
    command = [sys.executable, "-c", READ_ALL, str(tmp_path / "set")]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (found.stdout, found.returncode) == ("80\n", 0), found.stderr
