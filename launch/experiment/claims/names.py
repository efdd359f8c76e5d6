"""The names of settings on the page."""

from experiment.claims.runs import Setting, Value

ARMS = {
    "none": "no norm",
    "bn": "BatchNorm",
    "ln": "LayerNorm",
    "gn": "GroupNorm",
    "noisy_bn": "BatchNorm with noise",
    "bn_shared": "BatchNorm for all steps",
    "bn_input": "BatchNorm on inputs",
    "bn_per_step": "BatchNorm per step",
    "bn_separate": "BatchNorm per step apart",
}
WITHOUT_NAME = ("arm", "activation", "how")


def name_of(key: str, value: Value) -> str:
    """Name one value: "BatchNorm", "tanh", "depth 10"."""
    if key == "arm":
        return ARMS.get(str(value), str(value))
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if key in WITHOUT_NAME else f"{key} {text}"


def describe(setting: Setting) -> str:
    """Name a setting: "BatchNorm, depth 10"."""
    return ", ".join(name_of(key, value) for key, value in setting.items()) or "all runs"
