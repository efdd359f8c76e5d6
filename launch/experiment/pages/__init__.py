"""What the reports have in common: their looks, and figures as files and within the page."""
