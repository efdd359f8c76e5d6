"""One process that computes what several ranks would."""
