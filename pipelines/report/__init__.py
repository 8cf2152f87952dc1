"""The report of an index version: one HTML page, and the same figures as JSON."""
