"""What the kernels are told, as their files of C have it. All tasks begin with their counters.

Letters: R rows, I inputs, O outputs.
"""

import ctypes

_Address, _Number = ctypes.c_void_p, ctypes.c_int64


class Product(ctypes.Structure):
    """The task of `product`, as in product.c."""

    _fields_ = (
        ("next", _Number),
        *((name, _Address) for name in ("weight", "x", "bias", "out")),
        *((name, _Number) for name in ("blocks", "pairs", "chunk", "outputs", "rows")),
    )


class Plain(ctypes.Structure):
    """The task of `plain_product`, as in plain.c."""

    _fields_ = (
        ("next", _Number),
        *((name, _Address) for name in ("weight", "x", "bias", "out")),
        *((name, _Number) for name in ("rows", "outputs", "inputs")),
    )


class FewBits(ctypes.Structure):
    """The task of `halve`, `product8` and `product4`, as in few_bits.c."""

    _fields_ = (
        ("next", _Number),
        *((name, _Address) for name in ("weight", "scale", "x", "low", "high", "sums", "unit")),
        *((name, _Address) for name in ("bias", "out")),
        *((name, _Number) for name in ("blocks", "quads", "group", "outputs", "rows")),
    )


class Scores(ctypes.Structure):
    """The task of `scores`, as in scores.c."""

    _fields_ = (
        ("next", _Number),
        *((name, _Address) for name in ("weight", "x", "out")),
        *((name, _Number) for name in ("rows", "outputs", "inputs")),
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
    """The task of `gelu`, as in rows.c."""

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


Task = Product | Plain | FewBits | Scores | Attention | Norm | Gelu
