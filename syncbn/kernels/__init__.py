"""The four per-device primitives behind one interface; none of them communicates.

``local_sums`` and ``normalize`` make the forward pass, ``backward_sums`` and ``input_gradient`` the backward pass.
`reference` is the one implementation so far and serves every device; faster ones take its place here. `ghost`
stands beside them: it is what GhostBatchNorm computes.
"""

from .reference import backward_sums, input_gradient, local_sums, normalize

__all__ = ["backward_sums", "input_gradient", "local_sums", "normalize"]
