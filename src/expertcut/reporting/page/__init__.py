"""`report.html`: everything that a run found, in one file that a browser opens."""

from expertcut.reporting.page.writing import write

__all__ = ["write"]
