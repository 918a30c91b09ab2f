"""Compile every kernel for a list of GPUs without having one.

Prints, as JSON, the shared memory each needs and whether it multiplies by WGMMA. Run as a program, because a process in
which Triton interprets kernels cannot compile them.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from nemo_automodel.kernels import (
    copy_many,
    dropped_products,
    fp8,
    fp8_grad,
    host_rows,
    linear_ce,
    lora,
    nf4,
    norm,
    norm_grad,
    rope,
    swiglu_lora_triton,
)

_ROPE = {"NUM_Q": 32, "NUM_KV": 8, "HEAD": 128, "HAS_BIAS": True, "HAS_NORM": True, "BLOCK_H": 16, "BLOCK_E": 64}
_NF4_TYPES = {"codes_ptr": "*u8", "absmax_ptr": "*u8", "num_numbers": "i64"}
_NF4_TYPES |= {f"{name}_ptr": "*fp32" for name in ("nested", "map", "offset", "values", "scale")}
_NF4 = {"IS_NESTED": True, "LARGEST": 448.0, "SIZE": 64}
_ADD = {"HAS_RESIDUAL": True, "BLOCK_R": 64, "BLOCK_N": lora._BLOCK_N, "factor_col": 1, "num_warps": 4}
_PRODUCT = {"SHARES": ((0, 16, 7), (16, 32, 0xDAA66D2B), (32, 48, 9)), "THRESHOLD": 6554, "SCALE": 1.1111}
_PRODUCT |= {"BLOCK_R": 64, "num_warps": 4}
TALL = ", tiles of 64 rows"
"""Ends the names of what only Hopper launches, with an assembler that gets WGMMA right: see `tile_rows`."""


def _tiled(name: str, kernel: Any, constants: dict[str, Any], block_t: int, block_n: int, height: int) -> tuple:
    tile = {"BLOCK_T": block_t, "BLOCK_N": block_n}
    return name + TALL * (height == 64), kernel, {"partial_ptr": "*fp32", "seed_ptr": "*i64"}, constants | tile


def _low_rank_products(height: int) -> list[tuple]:
    """Return the cases of products of low rank, launched with tiles of one height."""
    masks = {key: _PRODUCT[key] for key in ("SHARES", "THRESHOLD", "SCALE")}
    no_masks = {"SHARES": ((0, 128, 0),), "THRESHOLD": 0, "SCALE": 1.0}
    add, n = lora._add_update_kernel, lora._BLOCK_N
    low, grad = dropped_products._dropped_low_kernel, dropped_products._dropped_grad_kernel
    low_cols, grad_rows = dropped_products.LOW_COLS[height], dropped_products.GRAD_ROWS[height]
    return [
        _tiled("update in place, rank 128", add, _ADD | no_masks, height, n, height),
        _tiled("update in place under masks", add, _ADD | masks, height, n, height),
        _tiled("dropped low", low, _PRODUCT, height, low_cols, height),
        _tiled("dropped grad", grad, _PRODUCT, grad_rows, height, height),
    ]


def _swiglu_lora(rank: int, way: str, has_update: bool, drops: str, height: int) -> tuple[str, Any, dict, dict]:
    """Return a case of SwiGLU at one rank of every adapter, launched as `swiglu_lora` does."""
    fits = rank <= lora.MAX_BLOCK_R
    constants = {"HAS_UPDATE": has_update, "GATE_FROM": 0, "UP_FROM": rank, "UP_TO": 2 * rank, "b_rank": 1}
    constants |= {"BLOCK_R": lora.block_r(rank), "A_BLOCK": lora.block_r(rank), "A_RANK": rank}
    constants |= swiglu_lora_triton.shape_of(way == "backward", rank, drops != "nothing", height)
    constants |= {"DROPS_A": drops == "a", "SALT": 5, "THRESHOLD": 0xE666, "SCALE": 10.0}
    constants |= {"num_warps": swiglu_lora_triton.NUM_WARPS}
    if way == "backward":
        kernel, own = swiglu_lora_triton._swiglu_lora_backward_kernel, {"MULTIPLIES": fits, "a_col": 1}
    else:
        kernel = swiglu_lora_triton._swiglu_lora_forward_kernel
        own = {"DROPS_UPDATE": drops == "update", "IS_EVEN": True} | ({} if fits else {"A_RANK": 0})
    name = f"swiglu {way}, rank {rank}, update {has_update}, mask over {drops}" + TALL * (height == 64)
    return name, kernel, {"partial_ptr": "*fp32", "seed_ptr": "*i64"}, constants | own


# kernel, pointers to the model's dtype and to others, floats, int64 values, constants: the largest that 8B models need
CASES: list[tuple[str, Any, dict[str, str], dict[str, Any]]] = [
    (
        "norm forward",
        norm._norm_forward_kernel,
        {"rstd_ptr": "*fp32", "rounded_ptr": "*fp8e4nv", "scale_ptr": "*fp32", "eps": "fp32"},
        {"HAS_RESIDUAL": True, "ROUNDS": True, "LARGEST": 448.0, "BLOCK": 8192},
    ),
    (
        "norm backward",
        norm._norm_backward_kernel,
        {"rstd_ptr": "*fp32"},
        {"HAS_RESIDUAL": True, "WRITES_Y": True, "BLOCK": 8192},
    ),
    (
        "norm weight gradient",
        norm_grad._norm_weight_grad_kernel,
        {"rstd_ptr": "*fp32", "partial_ptr": "*fp32"},
        {"BLOCK_T": norm_grad._BLOCK_T, "BLOCK_N": norm_grad._BLOCK_N},
    ),
    (
        "head norm gradients",
        norm_grad._head_norm_grad_kernel,
        {"rstd_ptr": "*fp32", "partial_ptr": "*fp32"},
        {key: _ROPE[key] for key in ("NUM_Q", "NUM_KV", "HEAD", "HAS_BIAS", "BLOCK_H", "BLOCK_E")},
    ),
    ("rope forward", rope._rope_forward_kernel, {"rstd_ptr": "*fp32", "eps": "fp32"}, _ROPE),
    ("rope backward", rope._rope_backward_kernel, {"rstd_ptr": "*fp32"}, _ROPE),
    (
        "cross entropy",
        linear_ce._cross_entropy_kernel,
        {"labels_ptr": "*i64", "scale_ptr": "*fp32", "losses_ptr": "*fp32"},
        {"BLOCK": 4096},
    ),
    (
        "fp8 quantize",
        fp8._fp8_quantize_kernel,
        {"factor_ptr": "*fp32", "out_ptr": "*fp8e4nv", "scale_ptr": "*fp32"},
        {"LARGEST": 448.0, "HAS_FACTOR": True, "BLOCK": 32768},
    ),
    (
        "fp8 quantize long rows",
        fp8._fp8_quantize_long_kernel,
        {"factor_ptr": "*fp32", "out_ptr": "*fp8e4nv", "scale_ptr": "*fp32"},
        {"LARGEST": 448.0, "HAS_FACTOR": True, "BLOCK": 4096},
    ),
    ("rows of the host", host_rows._host_rows_kernel, {"ids_ptr": "*i64"}, {"BLOCK": host_rows._BLOCK}),
    ("nf4 to 16 bits", nf4._nf4_kernel, _NF4_TYPES, _NF4 | {"HAS_SCALE": False, "IS_ALIGNED": True, "BLOCKS": 16}),
    (
        "nf4 to e4m3",
        nf4._nf4_kernel,
        _NF4_TYPES | {"out_ptr": "*fp8e4nv"},
        _NF4 | {"HAS_SCALE": True, "IS_ALIGNED": True, "BLOCKS": 16},
    ),
    (
        "nf4 to e4m3, transposed",
        nf4._nf4_transposed_kernel,
        _NF4_TYPES | {"out_ptr": "*fp8e4nv"},
        _NF4 | {"BLOCK_N": nf4._TILE_N},
    ),
    (
        "fp8 scale",
        fp8._fp8_scale_kernel,
        {"out_ptr": "*fp8e4nv", "scale_ptr": "*fp32"},
        {"LARGEST": 448.0, "BLOCK": fp8._SCALE_BLOCK},
    ),
    (
        "fp8 to 16 bits",
        fp8._fp8_dequantize_kernel,
        {"x_ptr": "*fp8e4nv", "scale_ptr": "*fp32"},
        {"BLOCK": fp8._SCALE_BLOCK},
    ),
    (
        "fp8 quantize transposed",
        fp8_grad._fp8_quantize_transposed_kernel,
        {"out_ptr": "*fp8e4nv", "scale_ptr": "*fp32"},
        {"LARGEST": 448.0, "SCALE_ROW": 1, "SCALE_COL": 0, "TILE": fp8_grad._TILE},
    ),
    ("fp8 transpose", fp8._fp8_transpose_kernel, {"x_ptr": "*u8", "out_ptr": "*u8"}, {"TILE": fp8._TILE}),
    *(case for height in (32, 64) for case in _low_rank_products(height)),
    *(
        _swiglu_lora(rank, way, has_update, drops, height)
        for height, ranks in ((32, (16, 32, 64, 128)), (64, (16, 64)))
        for rank in ranks
        for way in ("forward", "backward")
        for has_update in (False, True)
        for drops in ("nothing", "a", "update")
        if (rank > 32 or has_update) and (drops != "update" or (has_update and way == "forward"))
    ),
    (
        "copy many",
        copy_many._copy_many_kernel,
        {"table_ptr": "*i64", "tiles_ptr": "*i32", "scales_ptr": "*fp32", "like_source_ptr": "*fp32"},
        {"BLOCK": copy_many.BLOCK},
    ),
    (
        "sum of pieces",
        swiglu_lora_triton._sum_pieces_kernel,
        {"partial_ptr": "*fp32"},
        {"RANK": 128, "WIDTH": 128, "BLOCK_T": swiglu_lora_triton._SUM_BLOCK_T},
    ),
]


def compiled_for(
    kernel: Any, types: dict[str, str], constants: dict[str, Any], capability: int
) -> dict[str, int | bool]:
    """Compile one kernel for one GPU and return the shared memory of a block, and whether it multiplies by WGMMA.

    Where ``constants`` do not say how many warps and stages a launch has, it is eight and three.
    """
    options = {"num_warps": 8} | {key: n for key, n in constants.items() if key in ("num_warps", "num_stages")}
    constants = {key: value for key, value in constants.items() if key not in options}
    # as for the shapes of real models: loads are wide then, and wide loads are what waits in shared memory
    attributes = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if name not in constants}
    signature = {
        name: "constexpr" if name in constants else types.get(name, "*bf16" if name.endswith("_ptr") else "i32")
        for name in kernel.arg_names
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert compiled.asm["cubin"], "ptxas made nothing"
    return {"shared": int(compiled.metadata.shared), "wgmma": "wgmma" in compiled.asm["ptx"]}


if __name__ == "__main__":
    print(
        json.dumps(
            {
                f"{name} sm_{capability}": compiled_for(kernel, types, constants, capability)
                for name, kernel, types, constants in CASES
                for capability in map(int, sys.argv[1:])
                if capability == 90 or not name.endswith(TALL)
            }
        )
    )
