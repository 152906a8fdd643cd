"""Flows of FrEIA: its blocks and layers as steps of a chain, its networks as runs of them."""
