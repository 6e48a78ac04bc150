"""Reads a build log with `-Xptxas -v`; fails if a kernel spills or ptxas warns (C75xx: serialised wgmma)."""

import re
import sys
from pathlib import Path


def main(path: str) -> int:
    """Prints each defect and the number of kernels seen; returns the exit status."""
    kernels, defects, kernel = 0, [], "?"
    for line in Path(path).read_text(encoding="utf-8", errors="replace").splitlines():
        if match := re.search(r"Compiling entry function '(\S+)' for '(\S+)'", line):
            kernel, kernels = f"{match[1]} ({match[2]})", kernels + 1
        elif match := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
            if match[1] != "0" or match[2] != "0":
                defects.append(f"{kernel}: {match[0]}")
        elif re.search(r"\bC7\d{3}\b|serializ|ptxas warning", line):
            defects.append(line.strip())
    print(f"ptxas: {kernels} kernels, {len(defects)} defects")
    print(*defects, sep="\n")
    return 1 if defects or kernels == 0 else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
