"""Which code this process runs: workers of one run must run the same."""

import hashlib

from . import env

PACKAGES = ("gptmoe", "protos", "cluster", "train", "serve")


def code_digest() -> str:
    """12 hexadecimal digits that name the Python files of our packages by their content."""
    total = hashlib.sha256()
    for package in PACKAGES:
        for file in sorted((env.ROOT / package).rglob("*.py")):
            total.update(str(file.relative_to(env.ROOT)).encode())
            total.update(hashlib.sha256(file.read_bytes()).digest())
    return total.hexdigest()[:12]
