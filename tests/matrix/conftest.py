"""The pool of the ranks tier."""

from tests.ranks.conftest import pool

__all__ = ["pool"]
