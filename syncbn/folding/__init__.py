"""Fold BatchNorm into the convolution or linear layer before it; which layer feeds which, also for audit."""
