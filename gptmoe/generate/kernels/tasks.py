"""What the kernels are told, as their files of C have it. All tasks begin with their counters.

Letters: R rows, I inputs, O outputs, E experts, K choices of a row.
"""

import ctypes

_Address, _Number = ctypes.c_void_p, ctypes.c_int64
_ROWS = tuple((name, _Number) for name in ("next", "first", "end"))
"""What the tasks of products begin with: rows `first` to `end` - 1 of x and out; see common.h."""


class Product(ctypes.Structure):
    """The task of `product`, as in product.c, and of `wide_product`, as in wide_product.c."""

    _fields_ = (
        *_ROWS,
        *((name, _Address) for name in ("weight", "x", "bias", "out")),
        *((name, _Number) for name in ("blocks", "steps", "chunk", "outputs")),
    )


class Plain(ctypes.Structure):
    """The task of `plain_product`, as in plain.c."""

    _fields_ = (
        *_ROWS,
        *((name, _Address) for name in ("weight", "x", "bias", "out")),
        *((name, _Number) for name in ("outputs", "inputs")),
    )


class FewBits(ctypes.Structure):
    """The task of `halve`, `product8` and `product4`, as in few_bits.c."""

    _fields_ = (
        *_ROWS,
        *((name, _Address) for name in ("weight", "scale", "x", "low", "high", "sums", "unit")),
        *((name, _Address) for name in ("bias", "out")),
        *((name, _Number) for name in ("blocks", "quads", "group", "outputs")),
    )


class Scores(ctypes.Structure):
    """The task of `scores`, as in scores.c."""

    _fields_ = (
        ("next", _Number),
        *((name, _Address) for name in ("weight", "x", "half", "out")),
        *((name, _Number) for name in ("rows", "outputs", "inputs")),
    )


class Choose(ctypes.Structure):
    """The task of `choose`, as in experts.c."""

    _fields_ = (
        ("next", _Number),
        *((name, _Address) for name in ("logits", "bias", "expert", "weight")),
        *((name, _Number) for name in ("rows", "experts", "choices")),
    )


class Each(ctypes.Structure):
    """The task of `each`, as in experts.c."""

    _fields_ = (
        ("next", _Number),
        *((name, _Address) for name in ("kernel", "tasks")),
        ("size", _Number),
        ("chosen", _Address),
    )


class Group(ctypes.Structure):
    """The task of `group`, as in experts.c."""

    _fields_ = (
        ("next", _Number),
        *((name, _Address) for name in ("expert", "x", "out", "place", "chosen", "ends")),
        *((name, _Address) for name in ("up", "down")),
        *((name, _Number) for name in ("rows", "experts", "choices", "width")),
    )


class Weigh(ctypes.Structure):
    """The task of `weigh`, as in experts.c."""

    _fields_ = (
        ("next", _Number),
        *((name, _Address) for name in ("x", "place", "weight", "out")),
        *((name, _Number) for name in ("rows", "choices", "width")),
    )


class Attention(ctypes.Structure):
    """The task of `store` and `attend`, as in attention.c."""

    _fields_ = (
        *((name, _Number) for name in ("next", "threads", "stored")),
        *((name, _Address) for name in ("q", "keys", "values", "out", "places", "segments")),
        ("scratch", _Address),
        *((name, _Number) for name in ("layer", "rows", "heads", "width")),
        *((name, _Number) for name in ("stride", "num_segments", "slots", "most_keys")),
    )


class Norm(ctypes.Structure):
    """The task of `norm`, as in rows.c."""

    _fields_ = (
        ("next", _Number),
        *((name, _Address) for name in ("x", "added", "sum", "weight", "bias", "out")),
        *((name, _Number) for name in ("rows", "width")),
    )


class Gelu(ctypes.Structure):
    """The task of `gelu` and `wide_gelu`, as in rows.c."""

    _fields_ = (("next", _Number), ("x", _Address), ("count", _Number))


class Call(ctypes.Structure):
    """One kernel of a program, as in program.c."""

    _fields_ = (("kernel", _Address), ("task", _Address), ("counters", _Number))


class Calls(ctypes.Structure):
    """What `run_program` is told, as in program.c."""

    _fields_ = (
        *((name, _Address) for name in ("on_threads", "meet", "calls")),
        ("count", _Number),
    )


ProductTask = Product | Plain | FewBits
Task = ProductTask | Scores | Choose | Each | Group | Weigh | Attention | Norm | Gelu
