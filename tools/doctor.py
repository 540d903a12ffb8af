#!/usr/bin/env python3
"""What is installed, and what of focal_plugin works here: to paste into an issue.

Exit code: 0 if all works, 1 if something does not; the last line says what, and what to do.
"""

import argparse
import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main():
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    sys.stdout.reconfigure(errors="replace")
    if importlib.util.find_spec("focal_plugin") is None:
        sys.path.insert(0, str(ROOT))
    # By its path: to import it from its package would need what it may have to report as missing.
    spec = importlib.util.spec_from_file_location("focal_plugin_doctor", ROOT / "focal_plugin" / "doctor.py")
    doctor = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(doctor)
    report = doctor.diagnose()
    print("\n".join(report.lines))
    return 1 if report.problems else 0


if __name__ == "__main__":
    sys.exit(main())
