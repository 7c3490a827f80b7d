"""How much code is there? Lines, comments, long modules and functions, helpers with one caller.

python benchmarks/code_size.py [REVISION ...]     the working tree, or revisions of it
"""

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

PARTS = {"package": "fastmoco/", "package without bench": "fastmoco/", "benchmarks": "benchmarks/"}
SHORT = 6  # lines of a function that is hardly worth a name


@dataclass
class Size:
    """What is counted of some modules; lines that are blank count too."""

    files: int = 0
    lines: int = 0
    comments: int = 0
    docstrings: int = 0
    longest_module: int = 0
    longest_function: int = 0
    single_caller: int = 0
    short_single_caller: int = 0


def sources(revision: str | None, folder: str) -> Iterator[tuple[str, str]]:
    """Yield name and text of the Python files of a folder."""
    command = ["git", "ls-tree", "-r", "--name-only", revision] if revision else ["git", "ls-files"]
    names = subprocess.check_output(command, text=True).splitlines()
    for name in names:
        if name.startswith(folder) and name.endswith(".py"):
            if revision:
                yield (
                    name,
                    subprocess.check_output(["git", "show", f"{revision}:{name}"], text=True),
                )
            else:
                with open(name, encoding="utf-8") as file:
                    yield name, file.read()


def size_of(modules: list[tuple[str, str]]) -> Size:
    """Count."""
    size, everything = Size(), Counter(re.findall(r"\w+", "\n".join(text for _, text in modules)))
    for _, text in modules:
        lines = text.count("\n")
        size.files += 1
        size.lines += lines
        size.longest_module = max(size.longest_module, lines)
        tokens = tokenize.generate_tokens(io.StringIO(text).readline)
        size.comments += sum(token.type == tokenize.COMMENT for token in tokens)
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
                continue
            if ast.get_docstring(node):
                first = node.body[0]
                size.docstrings += (first.end_lineno or 0) - first.lineno + 1
            if isinstance(node, ast.FunctionDef):
                length = (node.end_lineno or 0) - node.lineno + 1
                size.longest_function = max(size.longest_function, length)
                private = node.name.startswith("_") and not node.name.startswith("__")
                if private and everything[node.name] == 2:  # where it is made, and where it is used
                    size.single_caller += 1
                    size.short_single_caller += length <= SHORT
    return size


def main(revisions: list[str]) -> None:
    """Print a line for each part of each revision."""
    for revision in revisions or [None]:
        for part, folder in PARTS.items():
            modules = list(sources(revision, folder))
            if part == "package without bench":
                modules = [m for m in modules if "/bench/" not in m[0]]
            numbers = ", ".join(f"{k} {v:,}" for k, v in vars(size_of(modules)).items())
            print(f"{revision or 'working tree'}, {part}: {numbers}")


if __name__ == "__main__":
    main(sys.argv[1:])
