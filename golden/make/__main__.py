"""Make the golden vectors again, or check them:  python golden/make [--check | --limits] [GLOB over ids ...]"""

import argparse
import importlib
import sys
from fnmatch import fnmatch

import common

SCRIPTS = (
    *(
        "ops",
        "fused",
        "random_numbers",
        "models",
        "encoders",
        "heads",
        "blocks",
        "method_sites",
        "methods",
        "low_rank",
        "decompositions",
        "structured",
        "projections",
        "bottlenecks",
        "mixtures",
        "prompts",
        "transfers",
        "hybrids",
        "layer_prompts",
        "side_networks",
        "selective",
        "loftq",
        "quantized_bases",
        "compositions",
        "restores",
        "combined",
        "one_mistake",
        "adapter_files",
        "saved_files",
        "optimizers",
        "eight_bits",
        "chat_templates",
        "losses",
    ),
    *("nf4", "codebooks", "files", "decoding", "bitsandbytes_rules", "integers", "small_floats", "gguf_formats"),
)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python golden/make", description=__doc__)
    parser.add_argument("globs", nargs="*", default=["*"], metavar="GLOB", help="ids to make (default: all)")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--check", action="store_true", help="write nothing; compare with what is stored")
    how.add_argument("--limits", action="store_true", help="measure the limits in bfloat16 of what is stored, no more")
    options = parser.parse_args()
    seen: set[str] = set()
    problems: list[str] = []
    for script in SCRIPTS:
        for case in importlib.import_module(script).cases():
            case.script = f"{script}.py"
            if case.id in seen:
                raise SystemExit(f"two cases are called {case.id}")
            seen.add(case.id)
            if not any(fnmatch(case.id, glob) for glob in options.globs):
                continue
            if options.check:
                problems += common.check(case)
            elif options.limits:
                common.write_limits(case)
            else:
                common.write(case)
            print(".", end="", flush=True)
    print()
    if not options.check:
        common.write_manifest()
    stored = {path.stem for path in (common.GOLDEN / "v1").rglob("*.json")}
    problems += [f"{name}: stored, but no script makes it" for name in sorted(stored - seen)]
    print("\n".join(problems) or f"{len(seen)} cases known, all {'agree' if options.check else 'written'}")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
