"""Exchange the normalizations of a model, and give them back: plan, convert, revert."""
