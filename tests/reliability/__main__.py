"""Try the cases and print the table; exit code 1 if any failed: `python tests/reliability [KIND ...]`."""

import argparse
import importlib
import os
import pkgutil
import sys
import tempfile
from pathlib import Path


# As tests/conftest.py, before torch is imported: equal to the bit, wherever tensors lie in memory.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_CBWR", "AVX2,STRICT")

HERE = Path(__file__).parent
KINDS = sorted({module.name for module in pkgutil.iter_modules([str(HERE)])} - {"__main__", "case"})


def main() -> int:
    sys.path.insert(0, str(HERE.parent))
    parser = argparse.ArgumentParser(prog="python tests/reliability")
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"of {', '.join(KINDS)}; default: all")
    parser.add_argument("--only", default="", help="only cases with this in their names")
    parser.add_argument("--output", type=Path, help="also write the table into this file")
    args = parser.parse_args()
    if unknown := sorted(set(args.kinds) - set(KINDS)):
        parser.error(f"KIND must be of {', '.join(KINDS)}, got {unknown[0]!r}")
    rows, failed = ["| kind | cases | survived |", "|---|---|---|"], []
    for kind in args.kinds or KINDS:
        cases = [case for case in importlib.import_module(f"{HERE.name}.{kind}").CASES if args.only in case.name]
        bad = [case.name for case in cases if not survives(kind, case)]
        rows.append(f"| {kind.replace('_', ' ')} | {len(cases)} | {len(cases) - len(bad)} |")
        failed += bad
    table = "\n".join(rows)
    print(f"\n{table}")
    if args.output:
        args.output.write_text(table + "\n")
    return 1 if failed else 0


def survives(kind, case) -> bool:
    with tempfile.TemporaryDirectory(prefix="hf-fae-reliability-") as folder:
        try:
            case.run(Path(folder))
        except BaseException as error:  # pytest's failures are no Exceptions
            if isinstance(error, KeyboardInterrupt):
                raise
            print(f"FAILED {kind}: {case.name}: {str(error)[-1500:]}", flush=True)
            return False
    print(f"survived {kind}: {case.name}", flush=True)
    return True


if __name__ == "__main__":
    sys.exit(main())
