"""All claims, in the order of the page."""

from collections.abc import Sequence

from experiment.claims.activations import SIGMOID_AND_TANH
from experiment.claims.batches import NOISE_REGULARIZES, SMALL_BATCHES
from experiment.claims.claim import Claim
from experiment.claims.gradients import GRADIENTS
from experiment.claims.initialization import INITIALIZATION
from experiment.claims.rates import CONVERGES_FASTER, LARGER_RATES
from experiment.claims.recurrent import RECURRENT
from experiment.claims.regularization import DROPOUT_AND_DECAY
from experiment.claims.running_statistics import RUNNING_STATISTICS
from experiment.claims.shift import COVARIATE_SHIFT

CLAIMS = (
    LARGER_RATES,
    INITIALIZATION,
    CONVERGES_FASTER,
    COVARIATE_SHIFT,
    SIGMOID_AND_TANH,
    GRADIENTS,
    SMALL_BATCHES,
    DROPOUT_AND_DECAY,
    NOISE_REGULARIZES,
    RECURRENT,
    RUNNING_STATISTICS,
)
BY_NAME = {claim.name: claim for claim in CLAIMS}


def pick(names: Sequence[str] | None) -> list[Claim]:
    """Find claims by name; all without names.

    Raises:
        ValueError: an unknown name.
    """
    unknown = [name for name in names or () if name not in BY_NAME]
    if unknown:
        raise ValueError(f"expected claims to be some of {', '.join(BY_NAME)}; got {', '.join(map(str, unknown))}")
    return [claim for claim in CLAIMS if not names or claim.name in names]
