"""Compiles every configuration of the kernels for Hopper without a GPU; prints JSON: registers, spills, shared memory.

A program of its own, to be run without TRITON_INTERPRET: python -m tests.compile_kernels [--all]
Without --all: what training uses by default.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sft.kernels.cross_entropy_kernels import cross_entropy_kernel, scale_kernel
from sft.kernels.masked_cross_entropy import CONFIGURATIONS, SCALE_BLOCK, SCALE_WARPS, Configuration, constants

HOPPER = GPUTarget("cuda", 90, 32)
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
USAGE = re.compile(r"(REG|STACK|LOCAL):(\d+)")


def compiled(kernel: Any, types: dict[str, str], constants: dict[str, Any], divisible: set[str], **options: Any) -> Any:
    """A kernel for Hopper; arguments without a type are constants, None unless given."""
    names = kernel.arg_names
    signature = {name: types.get(name, "constexpr") for name in names}
    values = {name: constants.get(name) for name in names if name not in types}
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in types if name in divisible}
    source = ASTSource(kernel, signature, values, attributes)
    return triton.compile(source, target=HOPPER, options={name: value for name, value in options.items() if value})


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


class Variant(NamedTuple):
    """What Triton is told, and what it sees in the arguments: which are 1 or multiples of 16."""

    gradient: bool = True
    details: bool = False
    weights: bool = False
    dtype: str = "bf16"
    columns: int = 151_936
    stride: int = 151_936


VARIANTS = {
    "training": Variant(),
    "everything": Variant(details=True, weights=True),
    "evaluation": Variant(gradient=False, details=True),
    "odd columns": Variant(columns=151_669, stride=151_680),
    "odd rows": Variant(weights=True, columns=151_669, stride=151_669),
    "fp32": Variant(dtype="fp32"),
}
ONE_COLUMN = Variant(columns=1, stride=1)


def cross_entropy(configuration: Configuration, variant: Variant) -> Any:
    types = {"logits": f"*{variant.dtype}", "labels": "*i64", "losses": "*fp32", "grad_scale": "*fp32"}
    types |= {"gradient": f"*{variant.dtype}"} if variant.gradient else {}
    types |= {"weights": "*fp32"} if variant.weights else {}
    types |= {"entropies": "*fp32", "correct": "*i1"} if variant.details else {}
    sizes = {"columns": variant.columns, "stride": variant.stride}
    itemsize = 4 if variant.dtype == "fp32" else 2
    given = constants(configuration, columns=variant.columns, stride=variant.stride, itemsize=itemsize)
    given |= {name: size for name, size in sizes.items() if size == 1}
    divisible = {name for name in types if types[name].startswith("*")}
    divisible |= {name for name, size in sizes.items() if size % 16 == 0}
    types |= {name: "i32" for name, size in sizes.items() if size != 1}
    options = {"num_warps": configuration.warps, "maxnreg": configuration.registers}
    return compiled(cross_entropy_kernel, types, given, divisible, **options)


def scale(dtype: str, **ones: int) -> Any:
    types = {
        "tensor": f"*{dtype}",
        "factor": "*fp32",
        "divisor": "*fp32",
        "rows": "i32",
        "columns": "i64",
        "stride": "i64",
    }
    types = {name: type for name, type in types.items() if name not in ones}
    divisible = set(types) - {"rows"}
    return compiled(scale_kernel, types, {"BLOCK": SCALE_BLOCK, **ones}, divisible, num_warps=SCALE_WARPS)


def main(everything: bool) -> None:
    configurations = CONFIGURATIONS if everything else CONFIGURATIONS[:1]
    variants = VARIANTS if everything else {"training": Variant()}
    table = {
        f"{index} {name}": resources(cross_entropy(configuration, variant))
        for index, configuration in enumerate(configurations)
        for name, variant in variants.items()
    }
    table["one column"] = resources(cross_entropy(CONFIGURATIONS[0], ONE_COLUMN))
    table["scale rows"] = resources(scale("bf16"))
    table["scale contiguous"] = resources(scale("fp32", rows=1))
    table["scale one number"] = resources(scale("fp32", rows=1, columns=1, stride=1))
    print(json.dumps({"triton": triton.__version__, "kernels": table}))


if __name__ == "__main__":
    main(everything="--all" in sys.argv)
