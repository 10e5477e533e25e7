"""Compiles every configuration of the kernels for Hopper without a GPU; prints JSON: registers, spills, shared memory.

Run as a program of its own, without TRITON_INTERPRET: python -m tests.compile_kernels [configuration ...]
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sft.kernels.cross_entropy_kernels import cross_entropy_kernel, scale_kernel
from sft.kernels.masked_cross_entropy import CONFIGURATIONS, SCALE_BLOCK, constants

HOPPER = GPUTarget("cuda", 90, 32)
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
USAGE = re.compile(r"(REG|STACK|LOCAL):(\d+)")


def compiled(kernel: Any, types: dict[str, str], constexprs: dict[str, Any], divisible: set[str], warps: int) -> Any:
    """A kernel for Hopper; arguments without a type are constants, None unless given."""
    names = kernel.arg_names
    signature = {name: types.get(name, "constexpr") for name in names}
    constants = {name: constexprs.get(name) for name in names if name not in types}
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in types if name in divisible}
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=HOPPER, options={"num_warps": warps})


def resources(kernel: Any) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [str(CUOBJDUMP), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        sass = subprocess.run([str(CUOBJDUMP), "--dump-sass", file.name], capture_output=True, text=True, check=True)
    usage = {name: int(value) for name, value in USAGE.findall(text)}
    return {
        "registers": usage["REG"],
        "spilled_bytes": usage["STACK"] + usage["LOCAL"],
        "shared_bytes": kernel.metadata.shared,
        "vector_loads": len(re.findall(r"LDG\.\S*128|LDGSTS\.\S*128", sass.stdout)),
    }


def cross_entropy(index: int, *, dtype: str, gradient: bool, details: bool, weights: bool, divisible: bool) -> Any:
    configuration = CONFIGURATIONS[index]
    types = {"logits": f"*{dtype}", "labels": "*i64", "losses": "*fp32"}
    types |= {"columns": "i32", "stride": "i32", "grad_scale": "fp32"}
    types |= {"gradient": f"*{dtype}"} if gradient else {}
    types |= {"weights": "*fp32"} if weights else {}
    types |= {"entropies": "*fp32", "correct": "*i1"} if details else {}
    itemsize = 4 if dtype == "fp32" else 2
    width = 151_936 if divisible else 151_669
    constexprs = constants(configuration, columns=width, stride=width, itemsize=itemsize)
    aligned = {name for name in types if types[name].startswith("*")} | ({"columns", "stride"} if divisible else set())
    return compiled(cross_entropy_kernel, types, constexprs, aligned, configuration.warps)


VARIANTS = {
    "gradient": {"dtype": "bf16", "gradient": True, "details": False, "weights": False, "divisible": True},
    "everything": {"dtype": "bf16", "gradient": True, "details": True, "weights": True, "divisible": True},
    "evaluation": {"dtype": "bf16", "gradient": False, "details": True, "weights": False, "divisible": True},
    "odd vocabulary": {"dtype": "bf16", "gradient": True, "details": False, "weights": True, "divisible": False},
    "fp32": {"dtype": "fp32", "gradient": True, "details": False, "weights": False, "divisible": True},
}


def main(chosen: list[int]) -> None:
    table = {}
    for index in chosen or range(len(CONFIGURATIONS)):
        for name, variant in VARIANTS.items():
            table[f"{index} {name}"] = resources(cross_entropy(index, **variant))
    types = {"tensor": "*bf16", "factor": "*fp32", "divisor": "fp32", "rows": "i32", "columns": "i64", "stride": "i64"}
    scale = compiled(scale_kernel, types, {"BLOCK": SCALE_BLOCK}, set(types) - {"divisor", "rows"}, 8)
    table["scale"] = resources(scale)
    print(json.dumps({"triton": triton.__version__, "kernels": table}))


if __name__ == "__main__":
    main([int(index) for index in sys.argv[1:]])
