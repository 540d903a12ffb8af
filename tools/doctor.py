#!/usr/bin/env python3
"""What is installed, and what of focal_plugin works here: to paste into an issue.

tools/doctor.py
tools/doctor.py --json > doctor.json
tools/doctor.py --upstream          (with Detectron2's own report below it)

Exit code: 0 if all works, 1 if something does not; the last line says what, and what to do.
"""

import argparse
import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def load_doctor():
    """The module by its path: to import it from its package would need what it may have to report as missing."""
    if importlib.util.find_spec("focal_plugin") is None:
        sys.path.insert(0, str(ROOT))
    spec = importlib.util.spec_from_file_location("focal_plugin_doctor", ROOT / "focal_plugin" / "doctor.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.add_argument("--upstream", action="store_true", help="Detectron2's collect_env_info as well")
    args = parser.parse_args(argv)
    sys.stdout.reconfigure(errors="replace")
    report = load_doctor().diagnose(args.upstream)
    print(report.to_json() if args.json else report.to_text())
    return 0 if report.ok else 1


if __name__ == "__main__":
    sys.exit(main())
