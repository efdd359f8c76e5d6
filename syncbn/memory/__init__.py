"""Save memory in training: compute maps again in backward that are an activation of a normalized map."""
