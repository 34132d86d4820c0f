"""`hf-fae inspect`: the parts, shapes and parameter counts of a preset or a saved folder."""

import argparse
import json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="PRESET|PATH", help="name of a preset, or a folder with a model or pipeline")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> None:
    from ..inspection import inspect

    report = inspect(args.model)
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        _print_report(report)


def _print_report(report: dict, indent: str = "") -> None:
    print(f"{indent}{report['name']}: {report['class']}")
    rows = [(part, count, "") for part, count in report["parameters"].items() if report["parameters"]["total"]]
    rows += [(part, count, "  frozen, not in the total") for part, count in report.get("frozen", {}).items()]
    width = max((len(part) for part, _, _ in rows), default=0)
    for part, count, remark in rows:
        print(f"{indent}  {part:{width}}  {count:>13,}  {count / 1e6:9.2f} M{remark}")
    for name, shape in report.get("shapes", {}).items():
        print(f"{indent}  {name}: {' x '.join(map(str, shape))}")
    for variant, summary in report.get("weights", {}).items():
        dtypes = ", ".join(f"{count:,} {dtype}" for dtype, count in summary["elements"].items())
        print(f"{indent}  weights{f' ({variant})' if variant else ''}: {summary['tensors']} tensors, {dtypes}")
    for component in report.get("components", {}).values():
        _print_report(component, indent + "  ")
