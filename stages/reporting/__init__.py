"""The report: one page for a person to look at."""
