"""Are there known vulnerabilities in constraints.txt? Asks PyPI, then OSV, through pip-audit.

Exit status 1 where there are any. Where neither answers that is said, and the status is 0: a
network is no fault of the pins. Of a package that the index does not know pip-audit says only that
it was skipped, and ends well: what was skipped counts as not asked.
"""

import json
import subprocess
import sys
from typing import Any

PIP_AUDIT = "pip-audit==2.10.1"
SERVICES = ("pypi", "osv")
LIMIT_S = 60  # for each


def asked(uv: str, service: str) -> list[dict[str, Any]] | str:
    """What pip-audit found of each package, or why it found nothing."""
    command = [uv, "tool", "run", "--from", PIP_AUDIT, "pip-audit"]
    command += ["--vulnerability-service", service, "--requirement", "constraints.txt"]
    command += ["--require-hashes", "--disable-pip", "--format", "json"]
    command += ["--progress-spinner", "off", "--timeout", "5"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
        found: list[dict[str, Any]] = json.loads(done.stdout)["dependencies"]
    except subprocess.TimeoutExpired:
        return f"no answer in {LIMIT_S} s"
    except (ValueError, KeyError):
        return (done.stderr.strip().splitlines() or ["it said nothing"])[-1][:200]
    return found


def main(uv: str) -> int:
    """Says what is known, and gives the exit status."""
    for service in SERVICES:
        found = asked(uv, service)
        if isinstance(found, str):
            sys.stderr.write(f"advisories of {service}: {found}\n")
            continue
        known = [package for package in found if "skip_reason" not in package]
        if not known:
            reason = found[0]["skip_reason"] if found else "no packages"
            sys.stderr.write(f"advisories of {service}: {reason[:200]}\n")
            continue
        faults = [(package, fault) for package in known for fault in package["vulns"]]
        for package, fault in faults:
            mended = ", ".join(fault["fix_versions"]) or "no release yet"
            name = f"{package['name']} {package['version']}"
            sys.stdout.write(f"{name}: {fault['id']}, mended in {mended}\n")
        sys.stdout.write(
            f"{len(faults)} known vulnerabilities in {len(known)} of {len(found)} packages "
            f"({service}; the others it does not know)\n"
        )
        return 1 if faults else 0
    sys.stderr.write("no advisory data can be reached from here: nothing is said of the pins\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
