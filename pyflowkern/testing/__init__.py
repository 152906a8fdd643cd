"""Checks for bijections of any library, in the manner of :func:`torch.autograd.gradcheck`."""

from pyflowkern.testing.bijections import LAWS, BijectionError, check_bijection

__all__ = ["LAWS", "BijectionError", "check_bijection"]
