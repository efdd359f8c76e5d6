"""The norms that `convert` knows by name, and what each changes beside the BatchNorm layer."""
