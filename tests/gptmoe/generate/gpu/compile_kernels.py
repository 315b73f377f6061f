"""Compile every kernel for a GPU that need not be here: python compile_kernels.py 90 bf16

Prints a line of JSON for each: its name, and how often its code multiplies tiles in which way. In a
process of its own, because Triton compiles or interprets, not both.
"""

import json
import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gptmoe.generate.gpu import attention, kernels, products
from gptmoe.generate.slots import BLOCK

HEAD = {"WIDTH": 80, "LANES": 128}
PART = {"PART": attention.PART}
TILE = {
    "M": products.TILE_ROWS,
    "N": products.TILE_OUTPUTS,
    "I": products.TILE_INPUTS,
    "GELU": True,
}
MOST = triton.next_power_of_2(products.MOST_ROWS)
ALIGNED = [["tt.divisibility", 16]]
UNALIGNED = ("slot_R", "position_R", "most_pages", "num_parts", "rows", "tokens", "scale")
"""What kernels are not compiled anew for, and numbers that are seldom multiples of 16."""
ROW = ["*i64", "*i64", "*i32"]
"""slot_R, position_R, table_SX."""


def main() -> None:
    """Compile them all."""
    capability, x = int(sys.argv[1]), f"*{sys.argv[2]}"
    wide, number = "*fp32", "i32"
    cases: list[tuple[Any, list[str], dict[str, Any]]] = [
        (kernels.store, [x] * 4 + ROW + [number] * 3, HEAD | {"BLOCK": BLOCK}),
        (
            kernels.attend_part,
            [wide] * 3 + [x] * 3 + ROW + [number] * 4 + ["fp32"],
            HEAD | PART | {"BLOCK": BLOCK, "AT_ONCE": attention.AT_ONCE},
        ),
        (
            kernels.merge_parts,
            [x, wide, wide, wide, "*i64", number, number],
            HEAD | PART | {"PARTS": 8},
        ),
        (kernels.product, [x] * 4 + [number] * 3, TILE | {"BIASED": True}),
        (kernels.expert_product, [x] * 4 + ["*i64"] + [number] * 4, TILE | {"ROWS": MOST}),
        (kernels.norm, [x, wide, wide, x, number], {"LANES": 2048}),
    ]
    for kernel, types, constants in cases:
        code = compiled(kernel, types, constants, GPUTarget("cuda", capability, 32))
        counts = {way: code.count(way) for way in ("mma.sync", "wgmma.mma_async")}
        print(json.dumps({"name": kernel.__name__, **counts}))  # noqa: T201


def compiled(kernel: Any, types: list[str], constants: dict[str, Any], target: GPUTarget) -> str:
    """Its PTX."""
    names = kernel.arg_names
    left = iter(types)
    signature = {name: "constexpr" if name in constants else next(left) for name in names}
    assert not list(left)
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={
            (place,): ALIGNED
            for place, name in enumerate(names)
            if name not in constants and name not in UNALIGNED
        },
    )
    return str(triton.compile(source, target=target).asm["ptx"])


if __name__ == "__main__":
    main()
